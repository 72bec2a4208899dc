"""What a verdict looks at: for each attacked cell the scores of U and N, paired, and how U, N and O fared.

The cells of a variant and method are unlearn depths, attacks (relearn set, adapter, learning rate) and relearn steps.
u, n and o are the scores of the unlearned
model, the control and the original, 0 before and 1 after the attack; all of them of the same seeds and questions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from relearn_jax.audit.seed_tables import Key, Table
from relearn_jax.audit.statistics import lower_limits, upper_limits
from relearn_jax.audit.thresholds import Design, VerdictSettings

Tables = Mapping[Key, Table]
RELEARN_LOSS = "relearn_logprob"
RETAIN = "retain_logprob"
ANSWER = "logprob"
MIN_NATS = 1.0  # by which the original should find answers likelier than the control does, to tell a share of it


class Where(NamedTuple):
  """Which cell of a variant and method."""

  depth: int
  relearn_set: str
  adapter: str
  learning_rate: float
  relearn_step: int


@dataclasses.dataclass(frozen=True)
class CellEvidence:
  """One attacked cell.

  Attributes:
    where: which.
    attack: relearn set and adapter for people, where there are several.
    u0, u1, n0, n1: scores `[seeds, questions]`.
    o1: mean score of the original after the same attack; None where it was not attacked.
    fell: share by which the loss on the relearn set fell, by arm; None where it was not recorded.
    retained: a token's probability on retained text under U, relative to the original's, before and after the
      attack; None where it was not recorded.
    likelier: how much likelier the true answers are under U than under N, as a share of how much likelier the original
      finds them (log-probabilities, means over questions and seeds; at least one nat is divided by), before and after
      the attack; None where it was not recorded.
  """

  where: Where
  attack: str
  u0: np.ndarray
  u1: np.ndarray
  n0: np.ndarray
  n1: np.ndarray
  o1: float | None
  fell: Mapping[str, float | None]
  retained: tuple[float | None, float | None]
  likelier: tuple[float | None, float | None]

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
    return (f"depth {self.where.depth}, {self.attack}learning rate {self.where.learning_rate:g}, step "
            f"{self.where.relearn_step}")


@dataclasses.dataclass(frozen=True)
class Evidence:
  """All cells of a variant and method.

  Attributes:
    cells: those that U and N both have, in the order of `Where`.
    seeds: of which all of them have values.
    questions: ids, in the order of the columns.
    knew: mean score of the original before anything, over the same seeds; None without an original.
    missing: what no verdict can do without and is not there, as sentences' ends.
  """

  cells: tuple[CellEvidence, ...]
  seeds: tuple[int, ...]
  questions: tuple[str, ...]
  knew: float | None
  missing: tuple[str, ...]


class _Lookup:
  """The tables of one variant and method; the original, and a control that was not unlearned, have no method."""

  def __init__(self, tables: Tables, variant: str, method: str, metric: str):
    self.tables, self.variant, self.method, self.metric = tables, variant, method, metric

  def before(self, arm: str, depth: int | None, metric: str, relearn_set: str | None = None) -> Table | None:
    """Of a model before the attack; `relearn_set`: whose rows were scored."""
    point = "original" if arm == "O" else "unlearned"
    return self._get(arm, point, depth, relearn_set, None, None, 0, metric)

  def after(self, arm: str, where: Where, metric: str) -> Table | None:
    """Of the same behind it."""
    depth = None if arm == "O" else where.depth
    return self._get(arm, "relearned", depth, where.relearn_set, where.adapter, where.learning_rate, where.relearn_step,
                     metric)

  def _get(self, arm: str, *rest: Any) -> Table | None:
    keys = (Key(self.variant, arm, method, *rest) for method in (self.method, None))
    return next((self.tables[key] for key in keys if key in self.tables), None)

  def wheres(self) -> list[Where]:
    """The cells in which U was attacked and asked."""
    return sorted(Where(key.depth or 0, str(key.relearn_set), str(key.adapter), key.learning_rate or 0.0,
                        key.relearn_step)
                  for key in self.tables if (key.variant, key.arm, key.method, key.point, key.metric) == (
                      self.variant, "U", self.method, "relearned", self.metric))


def gather(tables: Tables, variant: str, method: str, metric: str) -> Evidence:
  """The evidence on a variant and method, from the tables of a whole audit; `metric` is what proves knowledge."""
  look = _Lookup(tables, variant, method, metric)
  found: dict[Where, list[Table]] = {}
  for where in look.wheres():
    parts = [look.before("U", where.depth, metric), look.after("U", where, metric),
             look.before("N", where.depth, metric), look.after("N", where, metric)]
    if all(part is not None for part in parts):
      found[where] = parts  # type: ignore[assignment]
  original = look.before("O", None, metric)
  missing = []
  if not any((key.variant, key.arm, key.method, key.point) == (variant, "U", method, "unlearned") for key in tables):
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
  several = [len({getattr(where, name) for where in found}) > 1 for name in ("relearn_set", "adapter")]
  cells = tuple(_cell(look, where, found[where], seeds, several) for where in sorted(found))
  return Evidence(cells, tuple(seeds), next(iter(found.values()))[0].questions, float(original.only(seeds).mean()), ())


def _cell(look: _Lookup, where: Where, parts: Sequence[Table], seeds: Sequence[int], several: Sequence[bool]
          ) -> CellEvidence:
  def mean(table: Table | None) -> float | None:
    return None if table is None or not set(seeds) <= set(table.seeds) else float(table.only(seeds).mean())
  kept = mean(look.before("O", None, RETAIN))
  before, after = mean(look.before("U", where.depth, RETAIN)), mean(look.after("U", where, RETAIN))
  ratio = lambda value: None if value is None or kept is None else math.exp(min(value - kept, 100.0))

  def fell(arm: str) -> float | None:
    first = mean(look.before(arm, where.depth, RELEARN_LOSS, where.relearn_set))
    last = mean(look.after(arm, where, RELEARN_LOSS))
    return None if first is None or last is None or first == 0 else 1.0 - last / first
  knew = mean(look.before("O", None, ANSWER))

  def likelier(u: float | None, n: float | None) -> float | None:
    return None if u is None or n is None or knew is None else (u - n) / max(knew - n, MIN_NATS)
  at_first = likelier(*(mean(look.before(arm, where.depth, ANSWER)) for arm in "UN"))
  at_last = likelier(*(mean(look.after(arm, where, ANSWER)) for arm in "UN"))
  u0, u1, n0, n1 = (part.only(seeds) for part in parts)
  names = [name for name, shown in zip((f"relearn set {where.relearn_set}", f"adapter {where.adapter}"), several,
                                       strict=True) if shown]
  return CellEvidence(where, "".join(f"{name}, " for name in names), u0, u1, n0, n1,
                      mean(look.after("O", where, look.metric)), {arm: fell(arm) for arm in "UN"},
                      (ratio(before), ratio(after)), (at_first, at_last))


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
