"""`relearn collect`: a relearn set from what a model tells about some topics, with what asked for it kept beside it.

A row holds a sentence or a line of a reply, which model said it, and which prompt asked. The leakage check of an audit
reads the set as it does any other; rows that give away what some questions ask can be left out here already.
"""

import collections
import dataclasses
import hashlib
import pathlib
import re
import sys
from typing import Any

from relearn_jax.cases.base import Case, RelearnSet, Text
from relearn_jax.cases.files import read_questions
from relearn_jax.cases.leakage import drop_leaking
from relearn_jax.data.jsonl import check_writable, write_jsonl
from relearn_jax.errors import InputError
from relearn_jax.judge.endpoint import OPENAI, Reply
from relearn_jax.judge.judging import open_model
from relearn_jax.judge.replies import Limits, all_replies, cache_key, open_cache, statement

TOPIC = "{topic}"
SYSTEM = "You write plain, factual English text. You answer with the text alone."
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
MIN_WORDS = 3  # of a line that is kept


@dataclasses.dataclass(frozen=True)
class CollectSettings:
  """What is asked of which model.

  Attributes:
    model: "openai:MODEL" behind an endpoint, or "local:FOLDER".
    prompts: a text file; prompts are parted by empty lines, and lines that begin with "#" are left out.
    topics: each stands in the place of "{topic}" in every prompt.
    questions: source of questions; rows that give one away are left out. "": none are.
    base_url: of the endpoint.
    seed, timeout: sent with each request; seconds of a try.
    limits: what it may take.
  """

  model: str
  prompts: pathlib.Path
  topics: tuple[str, ...]
  questions: str = ""
  base_url: str = OPENAI
  seed: int = 0
  timeout: float = 120.0
  limits: Limits = dataclasses.field(default_factory=Limits)


def read_prompts(path: pathlib.Path) -> list[str]:
  """The prompts of a file.

  Raises:
    InputError: it cannot be read, holds none, or one of them has no place for a topic.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"cannot be read ({error})", file=path, field="--prompts", mend="give a text file") from None
  lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
  found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", lines) if part.strip()]
  if bad := [prompt for prompt in found if TOPIC not in prompt]:
    raise InputError(f"has {bad[0][:60]!r}, which has no {TOPIC}", file=path, field="--prompts",
                     mend=f"write {TOPIC} where the topic is to stand")
  if not found:
    raise InputError("has no prompt", file=path, field="--prompts", mend="write prompts, parted by empty lines")
  return found


def collect(settings: CollectSettings, output: pathlib.Path, cache: pathlib.Path) -> str:
  """Asks for text on every topic by every prompt, and writes a row a line of the replies.

  Args:
    settings: what is asked.
    output: JSON lines `{"text", "collected": {"model", "prompt", "topic", "prompts"}}`.
    cache: folder of replies.

  Returns:
    What became of it, for people.

  Raises:
    InputError: a setting is wrong, a limit is too low, the endpoint refuses us, or nothing came of it.
  """
  prompts = read_prompts(settings.prompts)
  if not settings.topics or not all(topic.strip() for topic in settings.topics):
    raise InputError("has none", field="--topics", mend="give topics, such as 'Tamsin Vale,her novel'")
  settings.limits.check()
  questions = read_questions(settings.questions)[1] if settings.questions else ()
  model = open_model(settings.model, settings.base_url, settings.seed, settings.timeout, 8, "--model")
  check_writable(output)
  asks = [(prompt, topic) for topic in settings.topics for prompt in prompts]
  replies, problems = _replies(model, [(SYSTEM, prompt.replace(TOPIC, topic)) for prompt, topic in asks],
                               settings.limits, cache)
  digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
  rows: dict[str, dict[str, Any]] = {}
  for (prompt, topic), reply in zip(asks, replies, strict=True):
    for line in lines_of(reply.text):
      rows.setdefault(line, {"text": line, "collected": {
          "model": reply.model, "prompt": prompt, "topic": topic, "prompts": digest}})
  kept = _without_leaks(list(rows.values()), questions)
  if not kept:
    raise InputError("gave no row" + (" that gives nothing away" if rows else ""), field="--model",
                     mend="look at the prompts, or take another model")
  write_jsonl(output, kept)
  failed = ", ".join(f"{count} times {problem}" for problem, count in problems.items())
  return (f"{len(kept)} rows from {len(asks)} replies in {output}; {len(rows) - len(kept)} left out, which give away "
          "what is asked" + (f"; without a reply: {failed}" if failed else ""))


def _replies(model: Any, asked: list[tuple[str, str]], limits: Limits, cache: pathlib.Path
             ) -> tuple[list[Reply], dict[str, int]]:
  """A reply each, empty where there is none, and why not."""
  identity, problems = model.identity(), collections.Counter[str]()
  keys = [cache_key(identity, one) for one in asked]
  found = [Reply() for _ in asked]
  with open_cache(cache) as kept:
    there = {place for place, key in enumerate(keys) if key in kept}
    for place in there:
      found[place] = Reply(**kept[keys[place]])
    left = [place for place in range(len(asked)) if place not in there]
    print(f"relearn collect: {statement([asked[place] for place in left], len(there), limits)}", file=sys.stderr)
    for place, reply in all_replies(model, asked, left, limits, "collect", "reply"):
      if reply.problem:
        problems[reply.problem] += 1
        continue
      found[place] = reply
      kept[keys[place]] = {"text": reply.text, "model": reply.model}
  return found, dict(problems)


def lines_of(reply: str) -> list[str]:
  """The lines of a reply that say something, without the marks of a list.

  >>> lines_of("Sure:\\n\\n1. Ada bakes bread.\\n- Ada lives in Norwick.\\n")
  ['Ada bakes bread.', 'Ada lives in Norwick.']
  """
  plain = (BULLET.sub("", " ".join(line.split())) for line in reply.splitlines())
  return [line for line in plain if len(line.split()) >= MIN_WORDS and not line.endswith(":")]


def _without_leaks(rows: list[dict[str, Any]], questions: Any) -> list[dict[str, Any]]:
  if not questions:
    return rows
  whole = RelearnSet("collected", tuple(Text(row["text"]) for row in rows), "", tuple(range(1, len(rows) + 1)))
  found = drop_leaking(Case("", "", (), (), (), (whole,), tuple(questions)))
  return [rows[line - 1] for line in found.lines]

