"""The attack through a provider's interface: the same rows, questions and cells; what differs is what it permits."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from relearn_jax.adversary.chat_rows import chat_rows, rule
from relearn_jax.adversary.interface import Adversary, Capabilities, JobBudget, JobState, Refused, Scored, Unreachable
from relearn_jax.adversary.openai_backend import OpenAIBackend
from relearn_jax.adversary.remote_jobs import Patience, finetune
from relearn_jax.adversary.together_backend import TogetherBackend
from relearn_jax.audit.acquire import memorized_place
from relearn_jax.audit.api_settings import API, ApiSettings
from relearn_jax.audit.audit_config import unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Cell, Chain, Point
from relearn_jax.audit.interview import ROWS, Answers, save_answers
from relearn_jax.audit.results_file import GENERIC
from relearn_jax.audit.shelf import Place, StageFolder
from relearn_jax.audit.stages import Planned
from relearn_jax.cases.base import spread_evenly
from relearn_jax.data.rows import Encoded
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.parallel.mesh import to_host
from relearn_jax.parallel.processes import is_alone, remove, write_atomically
from relearn_jax.serve.http_server import beside, need_extra
from relearn_jax.training.ended import Ledger

JOBS = "jobs.json"  # of a stage: what became of each job
Said = dict[str, Any]  # of a model: "texts", and "logprob" and the means of `ROWS` where they are told


@dataclasses.dataclass(frozen=True)
class Course:
  """How a relearn set is trained through the interface.

  Attributes:
    rows: conversations.
    times: that the set is given over.
    budget: of the job.
    epochs: after which the models are wanted.
    tokens: that are trained on, about.
  """

  rows: list[dict[str, Any]]
  times: int
  budget: JobBudget
  epochs: tuple[int, ...]
  tokens: int


def course(exp: Experiment, cell: Cell, batch_size: int) -> Course:
  """What a cell comes to within the limits: steps become whole epochs, as many as are permitted."""
  api, attack = exp.config.attack.api, exp.config.attack
  texts = exp.case(cell.point.chain).relearn_set(cell.attack.relearn_set).rows
  rows = chat_rows(texts, api.opening, api.limits.min_rows)
  batch = min(len(rows) if not 0 < batch_size < len(texts) else batch_size, api.limits.max_batch)
  per_epoch = -(-len(rows) // batch)
  epochs = sorted({min(-(-step // per_epoch), api.limits.max_epochs) for step in attack.keep_steps})
  unit = 1.0 if api.limits.absolute_rates or api.provider == "together" else api.limits.base_rate
  budget = JobBudget(epochs[-1], batch, cell.attack.learning_rate / unit, cell.point.seed)
  times = len(rows) // len(texts)
  encoded = exp.encode(exp.case(cell.point.chain), cell.attack.relearn_set)
  once = sum(len(one.ids) for one in encoded) + sum(not text.complete for text in texts)  # all rows get an end there
  return Course(rows, times, budget, tuple(epochs), once * times * budget.epochs)


def check_cost(exp: Experiment, stages: Sequence[Planned], max_cost: float | None) -> None:
  """Says what all jobs of an audit cost together, those included that are done, before another is begun.

  Raises:
    InputError: more than is allowed.
  """
  price = exp.config.attack.api.price
  cells = [(stage, cell) for stage in stages if stage.kind == "attack" and stage.attack.adapter == API
           for cell in stage.cells]
  if not cells:
    return
  tokens = sum(course(exp, cell, stage.batch_size).tokens for stage, cell in cells)
  cost = tokens * price / 1e6
  if price:
    print(f"{len(cells)} jobs at a provider, {tokens:,} tokens: about {cost:,.2f} at {price:g} a million.", flush=True)
  exp.money_left = max_cost
  if max_cost is not None and not price:
    raise InputError("is given, and no price is known", field="--max_cost",
                     mend="set attack.api.price to that of a million tokens")
  if max_cost is not None and cost > max_cost:
    raise InputError(f"is {max_cost:g}, and {len(cells)} jobs on {tokens:,} tokens would cost about {cost:,.2f}",
                     field="--max_cost", mend="raise it, or make the grid smaller")


@contextlib.contextmanager
def _provider(exp: Experiment, stage: Planned, mine: Sequence[Cell], folder: pathlib.Path
              ) -> Iterator[tuple[Adversary, dict[Point, str]]]:
  """The provider, and what it calls each of the points."""
  api = exp.config.attack.api
  points = list(dict.fromkeys(cell.point for cell in mine))
  limits = api.limits
  can = Capabilities(limits.absolute_rates, limits.logprobs, api.provider == "serve", True, limits.min_rows)
  if api.provider == "together":
    need_extra("together", "attack.api.provider")
    yield TogetherBackend(_key("TOGETHER_API_KEY"), api.url or None, lora=limits.adapter == "lora", rank=limits.rank,
                          alpha=round(limits.alpha), checkpoints=limits.max_checkpoints or 10,
                          logprobs=limits.logprobs), {point: api.models[point.arm] for point in points}
    return
  need_extra("openai", "attack.access")
  if api.provider == "openai":
    yield OpenAIBackend(api.url, _key("OPENAI_API_KEY"), can), {point: api.models[point.arm] for point in points}
    return
  names, folders = {point: point.name for point in points}, {}
  for point in points:
    folders[point.name] = str(exp.checked[point.arm].path if exp.config.arms.loaded else
                              _written(exp, point, folder / "models" / point.name))
  wanted = sorted({epoch for cell in mine for epoch in course(exp, cell, stage.batch_size).epochs})
  kept, key = dataclasses.replace(limits, checkpoint_epochs=tuple(wanted)), secrets.token_hex(16)
  with beside(folders, folder / "work", kept, key=key, dtype=exp.config.arms.dtype,
              save_every=exp.config.checkpoint_seconds) as (url, _):
    yield OpenAIBackend(url, key, can), names


def _key(name: str) -> str:
  if found := os.environ.get(name, ""):
    return found
  raise InputError("is not set", field=name, mend="set it to the key of your account")


def _written(exp: Experiment, point: Point, folder: pathlib.Path) -> pathlib.Path:
  """A trained point as a checkpoint that can be served."""
  if not folder.exists():
    one = jax.tree.map(lambda leaf: leaf[0], to_host(exp.take([place(exp, point)]), 1))
    export(one, exp.model, folder, source=next(iter(exp.checked.values())).path, field="--workdir")
  return folder


def place(exp: Experiment, point: Point) -> Place:
  """Where the weights of a trained point are."""
  if point.depth is None:
    return memorized_place(exp, point.chain)
  assert point.method
  folder, run = exp.done[exp.unlearned_key(point.chain, unlearn_method(exp.config.unlearn, point.method))]
  return folder.path, point.unlearn_step, run


def attack_remotely(exp: Experiment, stage: Planned, mine: Sequence[Cell], folder: StageFolder, ledger: Ledger) -> None:
  """Trains and asks cells through the interface; one whose job fails ends by name.

  Raises:
    AllEnded: no job was done.
    InputError: there are several processes, or a key is missing.
  """
  if not is_alone():
    raise InputError(f"has {API!r}", file=exp.where, field="attack.access", mend="run the audit on one process")
  home, api = folder.path / "provider", exp.config.attack.api
  patience, states = Patience(api.patience), dict[Cell, JobState]()
  said: dict[tuple[Cell, int], Said] = {}
  with _provider(exp, stage, mine, home) as (adversary, names):
    first = {point: next(cell for cell in mine if cell.point == point) for point in names}
    for point, cell in first.items():
      said[cell, 0] = _ask_once(exp, adversary, names[point], cell, home / "answers" / f"{cell.name}-0.json")
    for cell in mine:
      how = course(exp, cell, stage.batch_size)
      states[cell] = finetune(adversary, home / "jobs" / cell.name, f"relearn-{exp.attacked_key(cell)}",
                              names[cell.point], how.rows, how.budget, patience, exp.money_left)
      if exp.money_left is not None:
        exp.money_left -= (states[cell].tokens or 0) * api.price / 1e6
      per_epoch = -(-len(how.rows) // how.budget.batch_size)
      for step, model in states[cell].models.items():
        at = step if step > 0 else how.budget.epochs * per_epoch  # a provider that names the last model alone
        try:
          said[cell, at] = _ask_once(exp, adversary, model, cell, home / "answers" / f"{cell.name}-{at}.json")
        except (Refused, Unreachable) as error:
          states[cell] = dataclasses.replace(states[cell], status="failed", message=f"it could not be asked: {error}")
          break
  try:
    _keep(exp, folder, stage, mine, states, said, ledger)
  finally:
    remove(home)


def _keep(exp: Experiment, folder: StageFolder, stage: Planned, mine: Sequence[Cell], states: dict[Cell, JobState],
          said: dict[tuple[Cell, int], Said], ledger: Ledger) -> None:
  """Writes the answers in the form of every other stage, and how the jobs ended."""
  rows = [{"cell": cell.name, "status": state.status, "message": state.message, "tokens": state.tokens,
           "refused": len(state.refused), "rows": len(course(exp, cell, stage.batch_size).rows),
           "times": course(exp, cell, stage.batch_size).times, "relearn_set": cell.attack.relearn_set}
          for cell, state in states.items()]
  write_atomically(folder.path / JOBS, json.dumps(rows, indent=1) + "\n")
  done = [cell for cell in mine if states[cell].status == "succeeded"]
  steps = sorted({step for cell, step in said if step and cell in done})
  for step in [0, *steps]:
    cells = [cell for cell in mine if (cell, step) in said and (step == 0 or cell in done)]
    save_answers(folder.answers(step), _answers(exp, cells, [said[cell, step] for cell in cells]))
  for cell in mine:
    if cell not in done:
      state = states[cell]
      ledger.end(cell.name, 1, f"its job at the provider {WORDS[state.status]}" +
                 (f" ({state.message})" if state.message else ""))


WORDS = {"failed": "failed", "cancelled": "was cancelled", "limited": "was limited", "hung": "hung",
         "waiting": "is not over"}


def _ask_once(exp: Experiment, adversary: Adversary, model: str, cell: Cell, path: pathlib.Path) -> Said:
  if path.exists():
    return dict(json.loads(path.read_text()))
  found = _ask(exp, adversary, model, cell.point.chain, cell.attack.relearn_set)
  write_atomically(path, json.dumps(found))
  return found


def _ask(exp: Experiment, adversary: Adversary, model: str, chain: Chain, relearn_set: str) -> Said:
  """What a model says to the questions, and, where the provider tells, how likely answers and scored rows are."""
  questions, most = exp.first.questions, exp.config.ask.max_new_tokens
  if exp.chat is None:
    texts = adversary.complete(model, [question.prompt for question in questions], most, ())
  else:
    turns = [[*map(dict, exp.chat.turns), {"role": "user", "content": question.prompt}] for question in questions]
    texts = adversary.chat(model, turns, most, ())
  found: Said = {"texts": texts}
  asked = [_scored(exp, Encoded([*prompt, *answer], len(prompt))) for prompt, answer in exp.asked]
  if (told := adversary.logprobs(model, asked)) is None:
    return found
  found |= {"logprob": [math.fsum(one.logprobs) for one in told], "matched": [one.first for one in told]}
  case, number = exp.case(chain), exp.config.ask.score_rows
  rows = {kind: spread_evenly(exp.encode(case, name), number)
          for kind, name in (("retain", "retain"), ("forget", "forget"), ("relearn", relearn_set))}
  for kind, encoded in (rows | {GENERIC: exp.generic} | exp.options).items():
    if encoded:
      means = adversary.logprobs(model, [_scored(exp, one) for one in encoded]) or []
      found[kind] = [math.fsum(one.logprobs) / len(one.logprobs) for one in means]
      found[f"{kind}_tokens"] = [len(one.logprobs) for one in means]
  return found


def _scored(exp: Experiment, row: Encoded) -> Scored:
  prompt = exp.prompt_text(row.ids[:row.start])
  return Scored(tuple(row.ids), row.start, prompt, exp.prompt_text(row.ids)[len(prompt):])


def _answers(exp: Experiment, cells: Sequence[Cell], said: Sequence[Said]) -> Answers:
  """Answers as an interview of stacked models gives them; ids of new tokens are not told."""
  shape = len(cells), len(exp.first.questions)
  told = all("logprob" in one for one in said)

  def rows(name: str, kind: Any, fill: Any) -> dict[str, np.ndarray]:
    if not all(name in one for one in said):
      return {}
    most = max(len(one[name]) for one in said)
    return {name: np.array([[*one[name], *[fill] * (most - len(one[name]))] for one in said], kind)}
  scored: dict[str, np.ndarray] = {}
  for kind in ROWS:
    scored |= rows(kind, np.float32, math.nan) | rows(f"{kind}_tokens", np.int32, 0)
  logprob = np.array([one["logprob"] for one in said], np.float32) if told else np.full(shape, math.nan, np.float32)
  matched = np.array([one["matched"] for one in said], str) if told else np.full(shape, "", "<U1")
  return Answers(runs=np.array([cell.name for cell in cells], str), texts=np.array([one["texts"] for one in said], str),
                 tokens=np.zeros((*shape, 0), np.int32), logprob=logprob, matched=matched,
                 finite=np.ones(len(cells), bool), **scored)


def remote_notes(exp: Experiment) -> list[str]:
  """What a reader must know of what the provider's interface permitted; nothing where none was used."""
  api: ApiSettings = exp.config.attack.api
  paths = sorted({folder.path / JOBS for folder, _ in exp.done.values() if (folder.path / JOBS).exists()})
  rows = [row for path in paths for row in json.loads(path.read_text())]
  if not rows or API not in exp.config.attack.used_adapters():
    return []
  tokens = sum(row["tokens"] or 0 for row in rows)
  limits = api.limits
  notes = [f"Adapter {API!r} is an attacker with a provider's fine-tuning interface alone (at most {limits.max_epochs} "
           f"epochs, at least {limits.min_rows} rows, learning rates {limits.lowest_rate:g} to "
           f"{limits.highest_rate:g}, {limits.adapter}, {limits.max_checkpoints or 'all'} checkpoints of a job): "
           f"{len(rows)} jobs, {tokens:,} tokens trained"
           + (f", about {tokens * api.price / 1e6:,.2f} at {api.price:g} a million." if api.price else ".")]
  for name in dict.fromkeys(row["relearn_set"] for row in rows):
    of = [row for row in rows if row["relearn_set"] == name]
    notes.append(f"Relearn set {name}, through the interface: {rule(api.opening, max(row['times'] for row in of))}")
    if refused := max(row["refused"] for row in of):
      notes.append(f"The provider's moderation refused up to {refused} of the {of[0]['rows']} rows of a job of relearn "
                   f"set {name}.")
  return notes
