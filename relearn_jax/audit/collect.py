"""From the folders of stages to rows of answers: a pure function of an audit's files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from relearn_jax.adversary.interface import UNTOLD
from relearn_jax.audit.acquire import gone
from relearn_jax.audit.attack import Attacked, attacked
from relearn_jax.audit.audit_config import UnlearnMethod, unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Cell, Chain
from relearn_jax.audit.interview import ROWS, Answers
from relearn_jax.audit.results_file import GENERIC, QUESTION, answer_rows
from relearn_jax.audit.stages import Planned
from relearn_jax.audit.unlearning import curves_of, resolved, unlearned_points
from relearn_jax.metrics.choices import LETTER, OPTION


@dataclasses.dataclass
class Found:
  """What became of a grid.

  Attributes:
    methods: of the grid; none where models are loaded.
    steps: method -> unlearn steps of each U chain, by depth.
    lost: method, and None for memorising -> chains that ended, and when.
    cells: every cell whose point there is, and its answers.
  """

  methods: list[UnlearnMethod] = dataclasses.field(default_factory=list)
  steps: dict[str, dict[Chain, list[int]]] = dataclasses.field(default_factory=dict)
  lost: dict[str | None, dict[Chain, int]] = dataclasses.field(default_factory=dict)
  cells: dict[Cell, Attacked] = dataclasses.field(default_factory=dict)


def find(exp: Experiment, stages: Sequence[Planned]) -> Found:
  """Reads what all stages have left behind."""
  loaded, config = bool(exp.config.arms.loaded), exp.config
  found = Found([] if loaded else [unlearn_method(config.unlearn, name) for name in config.unlearn.methods])
  found.lost[None] = gone(exp)
  for method in found.methods:
    found.steps[method.name], found.lost[method.name] = unlearned_points(exp, method), gone(exp, method)
  cache: dict[Any, Answers] = {}
  for cell in (cell for stage in stages for cell in stage.cells):
    if point := resolved(exp, cell.point, found.steps, found.lost):
      there = Cell(point, cell.attack)
      if answers := attacked(exp, there, cache):
        found.cells[there] = answers
  return found


def answer_tables(exp: Experiment, found: Found) -> list[pa.Table]:
  """Every answer of an audit; none of a run from the step on at which it ended."""
  tables = [table for method in found.methods for table in _trajectory(exp, method, found)]
  before: set[tuple] = set()  # points, and points with a relearn set, whose answers before the attack are in
  for cell, there in found.cells.items():
    labels = _labels(exp, cell)
    for step, answers in there.answers.items():
      index = there.index[step]
      if step:
        tables += _tables(exp, answers, index, (QUESTION, *ROWS), **labels | {
            "point": "relearned", "relearn_step": step, "relearn_set": cell.attack.relearn_set,
            "adapter": cell.attack.trained, "learning_rate": cell.attack.learning_rate})
        continue
      for key, kinds, name in (((cell.point,), (QUESTION, "retain", "forget", GENERIC, LETTER, OPTION), None),
                               ((cell.point, cell.attack.relearn_set), ("relearn",), cell.attack.relearn_set)):
        if key not in before:
          before.add(key)
          tables += _tables(exp, answers, index, kinds, **labels | {"relearn_set": name})
  return tables


def _labels(exp: Experiment, cell: Cell) -> dict[str, Any]:
  """The key of a point before the attack."""
  point, config = cell.point, exp.config
  if config.arms.loaded or (config.arms.memorized and point.method is None):
    rate = 0.0
  elif point.method is None:
    rate = config.memorize.learning_rate
  else:
    rate = unlearn_method(config.unlearn, point.method).learning_rate
  return {"case": config.case_config.name, "variant": point.variant, "method": point.method, "arm": point.arm,
          "point": "original" if point.arm == "O" else "unlearned", "depth": point.depth,
          "unlearn_step": point.unlearn_step, "relearn_set": None, "adapter": None, "learning_rate": rate,
          "seed": point.seed, "relearn_step": 0}


def _tables(exp: Experiment, answers: Answers, index: int, kinds: Sequence[str], **labels: Any) -> Iterator[pa.Table]:
  """The rows of one run."""
  for kind in kinds:
    if kind == QUESTION:
      ids = [question.id for question in exp.first.questions]
      matched, told = answers.matched[index].tolist(), answers.logprob[index]
      untold = np.isnan(told).all() and bool(answers.finite[index])  # a provider that tells no log-probabilities
      yield answer_rows(kind, ids, None if untold else told, list(map(len, matched)), answers.texts[index].tolist(),
                        [one if one.strip(UNTOLD) else None for one in matched], **labels)
    elif (means := getattr(answers, kind)) is not None:  # NaN says that there is no such row; see `Answers`
      ids = [f"{kind}{i:02d}" for i in range(means.shape[1])]
      yield answer_rows(kind, ids, means[index], getattr(answers, f"{kind}_tokens")[index].tolist(),
                        there=~np.isnan(means[index]), **labels)


def _trajectory(exp: Experiment, method: UnlearnMethod, found: Found) -> Iterator[pa.Table]:
  """What U chains answered along their unlearning, as long as their numbers are finite."""
  for chain, by_step in curves_of(exp, method).items():
    for step, answers in by_step.items():
      index = answers.runs.tolist().index(chain.name)
      # A chain that is beyond its last depth is no longer watched, but shown.
      if step >= found.lost[method.name].get(chain, step + 1) or not answers.finite[index]:
        continue
      yield from _tables(
          exp, answers, index, (QUESTION, "retain", "forget", GENERIC), case=exp.config.case_config.name,
          variant=chain.variant, method=method.name, arm="U", point="trajectory", depth=None, unlearn_step=step,
          relearn_set=None, adapter=None, learning_rate=method.learning_rate, seed=chain.seed, relearn_step=0)


def ended_facts(exp: Experiment, found: Found) -> list[dict[str, Any]]:
  """Every run that ended: its name, its arm, variant, method and seed as in the rows, stage, step and what."""
  rows: list[dict[str, Any]] = []
  methods: list[tuple[UnlearnMethod | None, Sequence[str]]] = [(None, ("memorize",))]
  methods += [(method, ("reinforce", "unlearn")) for method in found.methods]
  for method, kinds in methods:
    for chain in exp.chains:
      for kind in kinds:
        key = exp.unlearned_key(chain, method, kind) if method else exp.memorized_keys[chain]
        rows += _ended(exp, key, chain.arm, chain.variant, method.name if method else None, chain.seed)
  for cell in found.cells:
    point = cell.point
    rows += _ended(exp, exp.attacked_key(cell), point.arm, point.variant, point.method, point.seed)
  return rows


def _ended(exp: Experiment, key: str, arm: str, variant: str, method: str | None, seed: int) -> list[dict[str, Any]]:
  one = exp.ended(key)
  return [] if one is None else [{"run": one.run, "arm": arm, "variant": variant, "method": method, "seed": seed,
                                  "stage": one.stage, "step": one.step, "what": one.what,
                                  **({"why": one.why} if one.why else {})}]


def by_arm(found: Mapping[Cell, Attacked], variant: str, seed: int, method: str | None) -> dict[str, Attacked]:
  """Of a variant and seed, the first attack on each arm at depth 0; the original is of every method."""
  first: dict[str, Attacked] = {}
  for cell, there in found.items():
    point = cell.point
    if (point.variant, point.seed) == (variant, seed) and point.depth in (0, None) and point.method in (method, None):
      first.setdefault(point.arm, there)
  return first
