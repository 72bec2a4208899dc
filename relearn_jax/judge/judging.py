"""`relearn judge`: a judge rates stored answers, and its ratings stand among the results from then on; no model of the
audit is needed."""

import collections
import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from relearn_jax.audit.results_file import (
  ANSWERS,
  ANSWERS_FILE,
  KEY,
  QUESTION,
  RESULTS_FILE,
  read_rows,
  rows_table,
  write_rows,
)
from relearn_jax.audit.summary import summarize
from relearn_jax.errors import InputError
from relearn_jax.judge.agreement import Pair, every_pair
from relearn_jax.judge.endpoint import OPENAI, Endpoint, Reply
from relearn_jax.judge.judge_prompts import (
  JudgePrompt,
  fingerprint_of,
  get_prompt,
  is_cut,
  messages,
  opening_of,
  read_rating,
)
from relearn_jax.judge.local_judge import LocalJudge
from relearn_jax.judge.replies import Limits, all_replies, cache_key, open_cache, statement
from relearn_jax.metrics.ratings import PREFIX, is_rating
from relearn_jax.metrics.scores import Asked, judged
from relearn_jax.report.figures import last_step, worst_attack
from relearn_jax.workdir import only_process

CHOICES = ("table", "cells")
NO_RATING = "no rating, or several that differ"
KEYS = [name for name, _ in KEY]


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """Which judge, and what it is asked.

  Attributes:
    judge: "openai:MODEL" behind an endpoint, or "local:FOLDER".
    prompt: a key of `judge_prompts.PROMPTS`.
    answers: which are judged: "table", those behind the report's main table, or "cells", all that a verdict looks at.
    name: of the judge in results; "": its model's.
    base_url: of the endpoint.
    seed, timeout: sent with each request; seconds of a try.
    batch_size: answers that a local judge is asked about together.
    limits: what it may take.
  """

  judge: str
  prompt: str = "quality"
  answers: str = "table"
  name: str = ""
  base_url: str = OPENAI
  seed: int = 0
  timeout: float = 120.0
  batch_size: int = 8
  limits: Limits = dataclasses.field(default_factory=Limits)


def open_judge(settings: JudgeSettings) -> tuple[Endpoint | LocalJudge, str]:
  """The judge, and its name in results.

  Raises:
    InputError: there is no such judge, or a setting is wrong.
  """
  settings.limits.check()
  if settings.answers not in CHOICES:
    raise InputError(f"is {settings.answers!r}", field="--answers", mend=f"expected one of {', '.join(CHOICES)}")
  if not (0 < settings.timeout < float("inf") and settings.batch_size > 0):
    raise InputError(f"are {settings.timeout} and {settings.batch_size}", field="--timeout, --batch_size",
                     mend="expected positive numbers")
  judge = open_model(settings.judge, settings.base_url, settings.seed, settings.timeout, settings.batch_size,
                     opening=opening_of(get_prompt(settings.prompt)))
  return judge, settings.name or pathlib.PurePath(settings.judge.partition(":")[2]).name


def open_model(text: str, base_url: str, seed: int, timeout: float, batch_size: int, flag: str = "--judge",
               opening: tuple[str, str] = ("", "")) -> Endpoint | LocalJudge:
  """A model that is asked in words: "openai:MODEL" behind an endpoint, or "local:FOLDER", which reads `opening` once.

  Raises:
    InputError: it is of neither kind; `flag` is where it was set.
  """
  kind, _, model = text.partition(":")
  if kind not in ("openai", "local") or not model:
    raise InputError(f"is {text!r}", field=flag, mend="expected openai:MODEL (behind --base_url), or local:FOLDER")
  if kind == "openai":
    return Endpoint(model, base_url, seed=seed, timeout=timeout, flag=flag)
  return LocalJudge(str(pathlib.Path(model).expanduser()) if "~" in model else model, batch_size, opening)


def judge_workdir(workdir: pathlib.Path, settings: JudgeSettings, cache: pathlib.Path) -> str:
  """Rates the answers of an audit; returns the name of the scores.

  Args:
    workdir: of a finished audit.
    settings: which judge, and what it is asked.
    cache: folder of replies.

  Raises:
    InputError: there are no rows, a setting is wrong, another judge has that name, a limit is too low, or the endpoint
      refuses us.
  """
  prompt = get_prompt(settings.prompt)
  rows, facts = read_rows(workdir / RESULTS_FILE)
  answers, _ = read_rows(workdir / ANSWERS_FILE, ANSWERS)
  judge, name = open_judge(settings)
  metric = f"{PREFIX}{prompt.name}:{name}"
  about = {"judge": name, "prompt": prompt.name, "prompt_text": fingerprint_of(prompt), "identity": judge.identity()}
  _refuse_another(facts.get("judges", {}).get(metric), about)
  with only_process(workdir):
    asked = _selected(_plain(answers), rows, facts, settings.answers)
    questions = {one["id"]: Asked.from_json(one) for one in facts["questions"]}
    asked = asked.assign(text=[judged(questions[item], text)
                               for item, text in zip(asked["item"], asked["text"], strict=True)])
    pairs = list(dict.fromkeys(zip(asked["item"], asked["text"], strict=True)))
    scores, course = _rate(judge, prompt, questions, pairs, settings.limits, cache)
    own = asked[[*KEYS]].assign(question=asked["item"], metric=metric, value=[
        scores[pair] for pair in zip(asked["item"], asked["text"], strict=True)])
    every = pd.concat([(plain := _plain(rows))[plain["metric"] != metric], own])
    facts.setdefault("judges", {})[metric] = about | {"answers": settings.answers, **course}
    facts["agreement"] = [dataclasses.asdict(one) for one in every_pair(_by_answer(every, _plain(answers), questions))]
    write_rows(workdir / RESULTS_FILE, [rows_table(every)], facts)
  return metric


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
  return rows.astype({name: object for name in rows.columns if isinstance(rows[name].dtype, pd.CategoricalDtype)})


def _refuse_another(there: Mapping[str, Any] | None, about: Mapping[str, Any]) -> None:
  """`InputError` if another judge, or another prompt, has these scores' name."""
  if there and any(there[key] != about[key] for key in about):
    raise InputError(f"is {about['judge']!r}, under which scores of another judge or prompt stand", field="--name",
                     mend="give another name")


def _selected(answers: pd.DataFrame, rows: pd.DataFrame, facts: Mapping[str, Any], which: str) -> pd.DataFrame:
  """The answers that are judged."""
  asked = answers[(answers["kind"] == QUESTION) & (answers["point"] != "trajectory")]
  if which == "cells":
    return asked
  summary = summarize(rows, facts)
  step, keep = last_step(summary), np.zeros(len(asked), bool)
  for method in summary["methods"]:
    for variant in summary["verdicts"][method]:
      attack = zip(("relearn_set", "adapter", "learning_rate"), worst_attack(summary, method, variant), strict=True)
      here = (asked["variant"] == variant) & ((asked["method"] == method) | asked["method"].isna())
      top = here & ((asked["depth"] == 0) | asked["depth"].isna())
      after = top & (asked["relearn_step"] == step) & (asked["point"] == "relearned") & (asked["arm"] != "O")
      for column, value in attack:
        after &= asked[column] == value
      keep |= np.array(top & (asked["relearn_step"] == 0) & (asked["arm"] != "N") | after)
  return asked[keep]


def _rate(judge: Endpoint | LocalJudge, prompt: JudgePrompt, questions: Mapping[str, Asked], pairs: list[Pair],
          limits: Limits, cache: pathlib.Path) -> tuple[dict[Pair, float], dict[str, Any]]:
  """Scores of answers, NaN where they are missing, and what a report says of how it went.

  A reply without a rating is not cached: run again, it is asked for again.
  """
  asked = [messages(prompt, questions[item], text) for item, text in pairs]
  identity = judge.identity()
  keys = [cache_key(identity, one) for one in asked]
  scores: dict[Pair, float] = dict.fromkeys(pairs, math.nan)
  problems: collections.Counter[str] = collections.Counter()
  models, used = set(), [0, 0]
  with open_cache(cache) as kept:
    there = {place: kept[key] for place, key in enumerate(keys) if key in kept}
    left = [place for place in range(len(asked)) if place not in there]
    print(f"relearn judge: {statement([asked[place] for place in left], len(there), limits)}", file=sys.stderr)
    for place, values in there.items():
      scores[pairs[place]] = read_rating(prompt, values["text"])  # type: ignore[assignment]
      models.add(values["model"])
    for place, reply in all_replies(judge, asked, left, limits):
      used[0], used[1] = used[0] + reply.tokens_in, used[1] + reply.tokens_out
      value = None if reply.problem else read_rating(prompt, reply.text)
      if value is None:
        problems[reply.problem or NO_RATING] += 1
        continue
      scores[pairs[place]] = value
      models.add(reply.model)
      kept[keys[place]] = _stored(reply)
  missing = sum(map(math.isnan, scores.values()))
  return scores, {"distinct": len(pairs), "missing": missing, "problems": dict(sorted(problems.items())),
                  "cut": sum(is_cut(text) for _, text in pairs), "cached": len(there), "models": sorted(models),
                  "tokens": used, "cost": limits.cost(used[0], used[1]) if limits.prices else None}


def _stored(reply: Reply) -> dict[str, str]:
  return {"text": reply.text, "model": reply.model}


def _by_answer(rows: pd.DataFrame, answers: pd.DataFrame, questions: Mapping[str, Asked]
               ) -> dict[str, dict[Pair, float]]:
  """Of every judge, its scores by question and answer."""
  asked = answers[answers["kind"] == QUESTION]
  texts = dict(zip(_keys(asked, "item"), asked["text"], strict=True))
  found: dict[str, dict[Pair, float]] = {}
  for metric, group in rows[rows["metric"].map(is_rating)].groupby("metric", sort=True):
    mine = found.setdefault(str(metric), {})
    for key, item, value in zip(_keys(group, "question"), group["question"], group["value"], strict=True):
      mine[item, judged(questions[item], texts[key])] = value
  return found


def _keys(rows: pd.DataFrame, question: str) -> list[tuple]:
  """What rows are of, as something that is equal where it is the same."""
  columns = [rows[name].where(rows[name].notna(), None) if rows[name].dtype == object else rows[name].fillna(-1)
             for name in KEYS]
  return list(zip(*columns, rows[question], strict=True))
