"""What a verdict looks at: for each attacked cell of a variant the scores of U and N, paired, and how U, N and O fared.

A cell is an unlearn depth, a learning rate of the attack and a relearn step. u, n and o are the scores of the unlearned
model, the control and the original, 0 before and 1 after the attack; all of them of the same seeds and questions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit.statistics import lower_limits, upper_limits
from relearn_jax.audit.tables import Table
from relearn_jax.audit.thresholds import Design, VerdictSettings

Tables = Mapping[tuple, Table]
Where = tuple[int, float, int]  # depth, learning rate of the attack, relearn step
RELEARN_LOSS = "relearn_logprob"
RETAIN = "retain_logprob"


@dataclasses.dataclass(frozen=True)
class Cell:
  """One attacked cell.

  Attributes:
    depth, learning_rate, relearn_step: which.
    u0, u1, n0, n1: scores `[seeds, questions]`.
    o1: mean score of the original after the same attack; None where it was not attacked.
    fell: share by which the loss on the relearn set fell, by arm; None where it was not recorded.
    retained: a token's probability on retained text under U, relative to the original's, before and after the
      attack; None where it was not recorded.
  """

  depth: int
  learning_rate: float
  relearn_step: int
  u0: np.ndarray
  u1: np.ndarray
  n0: np.ndarray
  n1: np.ndarray
  o1: float | None
  fell: Mapping[str, float | None]
  retained: tuple[float | None, float | None]

  @property
  def excess(self) -> np.ndarray:
    """What the attack gained on U, less what it gained on N, `[seeds, questions]`."""
    return (self.u1 - self.u0) - (self.n1 - self.n0)

  @property
  def level(self) -> np.ndarray:
    """How far U is above N after the attack, `[seeds, questions]`."""
    return self.u1 - self.n1

  @property
  def name(self) -> str:
    """For people."""
    return f"depth {self.depth}, learning rate {self.learning_rate:g}, step {self.relearn_step}"


@dataclasses.dataclass(frozen=True)
class Evidence:
  """All cells of a variant.

  Attributes:
    cells: those that U and N both have, by depth, learning rate and step.
    seeds: of which all of them have values.
    questions: ids, in the order of the columns.
    knew: mean score of the original before anything, over the same seeds; None without an original.
    missing: what no verdict can do without and is not there, as sentences' ends.
  """

  cells: tuple[Cell, ...]
  seeds: tuple[int, ...]
  questions: tuple[str, ...]
  knew: float | None
  missing: tuple[str, ...]


def gather(tables: Tables, variant: str, metric: str) -> Evidence:
  """The evidence on a variant, from the tables of a whole audit; `metric` is what proves knowledge."""
  get = lambda arm, point, depth, step, rate, what=metric: tables.get((variant, arm, point, depth, step, rate, what))
  found: dict[Where, list[Table]] = {}
  for key in tables:
    if key[:3] == (variant, "U", "relearned") and key[6] == metric:
      depth, step, rate = key[3:6]
      parts = [get("U", "unlearned", depth, 0, None), tables[key], get("N", "unlearned", depth, 0, None),
               get("N", "relearned", depth, step, rate)]
      if all(part is not None for part in parts):
        found[depth, rate, step] = parts  # type: ignore[assignment]
  original = get("O", "original", None, 0, None)
  missing = []
  if not any(key[:3] == (variant, "U", "unlearned") for key in tables):
    missing.append("no run reached an unlearned point")
  elif not found:
    missing.append("there is no control to compare with")
  if original is None:
    missing.append("there is no original to show that it was ever known")
  dropped = sum(table.incomplete for parts in found.values() for table in parts)
  if dropped:
    missing.append(f"answers of some seeds are missing to {dropped} questions")
  every = [set(part.seeds) for parts in found.values() for part in parts]
  seeds = sorted(set.intersection(*every)) if every else []
  if found and not seeds:
    missing.append("no seed has all cells of the unlearned model and of the control")
  if original is not None and (without := sorted(set(seeds) - set(original.seeds))):
    missing.append(f"the original of seed {', '.join(map(str, without))} is not there")
  if not seeds or missing:
    return Evidence((), tuple(seeds), (), None if original is None else float(original.values.mean()), tuple(missing))
  assert original is not None
  cells = tuple(_cell(tables, variant, metric, where, found[where], seeds) for where in sorted(found))
  return Evidence(cells, tuple(seeds), next(iter(found.values()))[0].questions, float(original.only(seeds).mean()), ())


def _cell(tables: Tables, variant: str, metric: str, where: Where, parts: Sequence[Table], seeds: Sequence[int]
          ) -> Cell:
  depth, rate, step = where

  def mean(arm: str, point: str, at: int | None, when: int, attack: float | None, what: str) -> float | None:
    table = tables.get((variant, arm, point, at, when, attack, what))
    return None if table is None or not set(seeds) <= set(table.seeds) else float(table.only(seeds).mean())
  kept = mean("O", "original", None, 0, None, RETAIN)
  before, after = (mean("U", "unlearned", depth, 0, None, RETAIN), mean("U", "relearned", depth, step, rate, RETAIN))
  ratio = lambda value: None if value is None or kept is None else math.exp(min(value - kept, 100.0))

  def fell(arm: str) -> float | None:
    first = mean(arm, "unlearned", depth, 0, None, RELEARN_LOSS)
    last = mean(arm, "relearned", depth, step, rate, RELEARN_LOSS)
    return None if first is None or last is None or first == 0 else 1.0 - last / first
  u0, u1, n0, n1 = (part.only(seeds) for part in parts)
  return Cell(depth, rate, step, u0, u1, n0, n1, mean("O", "relearned", None, step, rate, metric),
              {arm: fell(arm) for arm in "UN"}, (ratio(before), ratio(after)))


def cluster_numbers(questions: Sequence[str], clusters: Mapping[str, str]) -> np.ndarray:
  """The cluster of each question as integers from 0."""
  return np.unique([clusters.get(question, question) for question in questions], return_inverse=True)[1]


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of every cell, `[cells]`, and of u0 - n0 of its depth; None where there are too few seeds or clusters."""

  low: np.ndarray | None
  high: np.ndarray | None
  level_low: np.ndarray | None
  level_high: np.ndarray | None
  before_low: np.ndarray | None
  before_high: np.ndarray | None


def find_limits(evidence: Evidence, settings: VerdictSettings, design: Design) -> Limits:
  """One-sided limits, with an error of alpha each, of the excess and the level of every cell and of u0 - n0."""
  ids = cluster_numbers(evidence.questions, design.clusters)
  if ids.max() + 1 < settings.min_clusters:
    return Limits(None, None, None, None, None, None)
  how: dict[str, Any] = {"draws": settings.draws, "seed": settings.seed}
  excess, level = (np.stack([getattr(cell, name) for cell in evidence.cells]) for name in ("excess", "level"))
  before = np.stack([cell.u0 - cell.n0 for cell in evidence.cells])
  # The seeds of checkpoints that were given begin with one model: before the attack only questions vary.
  vary = not design.loaded
  before_low = before_high = low = level_low = high = level_high = None
  if len(evidence.seeds) > 1:
    low, level_low = (lower_limits(tables, ids, settings.alpha, **how) for tables in (excess, level))
    # What a model can gain at most, and be above another.
    most = 1.0 + max(float(cell.n0.max()) for cell in evidence.cells)
    high, level_high = (upper_limits(tables, ids, settings.alpha, end=end, **how)
                        for tables, end in ((excess, most), (level, 1.0)))
  if not vary or len(evidence.seeds) > 1:
    before_low = np.array([lower_limits(one[None], ids, settings.alpha, seeds_vary=vary, **how)[0] for one in before])
    before_high = upper_limits(before, ids, settings.alpha, seeds_vary=vary, **how)
  return Limits(low, high, level_low, level_high, before_low, before_high)
