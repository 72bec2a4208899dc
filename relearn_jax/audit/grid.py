"""The grid of an audit: models at rest, and the attacks on them. Names do not depend on the grid's size.

U memorises the case and unlearns it; N, the never-trained control, does the same with a case that lacks the secret; O
is the original, attacked without unlearning. Loaded models are points without a trajectory.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.seed_tables import DRAWN
from relearn_jax.cases.base import Arm


@dataclasses.dataclass(frozen=True)
class Chain:
  """A model that memorises and unlearns: an entry of the stacked axis of those stages."""

  arm: Arm
  variant: str
  seed: int

  @property
  def name(self) -> str:
    """For example "U-7-0": arm, variant, seed."""
    return f"{self.arm}-{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Point:
  """A model that is attacked.

  Attributes:
    arm: U, N or O.
    variant, seed: of its case; of a loaded model the seed is the attack's.
    method: that it was unlearned by; None: it was not.
    depth: how deep; None: of the original.
    unlearn_step: of its trajectory; -1: not known yet.
  """

  arm: str
  variant: str
  seed: int
  method: str | None
  depth: int | None
  unlearn_step: int = -1

  @property
  def chain(self) -> Chain:
    """That it is a point of."""
    return Chain("N" if self.arm == "N" else "U", self.variant, self.seed)

  @property
  def name(self) -> str:
    """For example "U-7-0-depth1" or "O-7-0", of one method."""
    where = "" if self.depth is None else f"-depth{self.depth}"
    return f"{self.arm}-{self.variant}-{self.seed}{where}"


@dataclasses.dataclass(frozen=True)
class Attack:
  """How a model is attacked.

  Attributes:
    relearn_set: on what.
    adapter: what is trained; see `AttackSettings.adapter`. "api": what a provider trains.
    learning_rate: of AdamW.
    batch_size: rows of a step; None: the configuration's.
  """

  relearn_set: str
  adapter: str
  learning_rate: float
  batch_size: int | None = None

  @property
  def trained(self) -> str:
    """What is trained, and on how many rows at a time where the attack says so: the rows' column `adapter`."""
    return self.adapter if self.batch_size is None else f"{self.adapter}{DRAWN}{self.batch_size or 'of all rows'}"


@dataclasses.dataclass(frozen=True)
class Cell:
  """An attacked point: what the rows of the results are keyed by, with a step and a metric."""

  point: Point
  attack: Attack

  @property
  def name(self) -> str:
    """Among the runs of its stage, for example "U-7-0-depth1-lr0.001"."""
    return f"{self.point.name}-lr{self.attack.learning_rate:g}"


def chains(config: Audit) -> list[Chain]:
  """U of every variant and seed, then N of every variant and seed; none where models are loaded."""
  if config.arms.loaded:
    return []
  arms: tuple[Arm, ...] = ("U", "N")
  return [Chain(arm, variant, seed) for arm in arms for variant in config.case_config.versions()
          for seed in config.seeds]


def attacks(config: Audit, relearn_sets: Sequence[str]) -> list[Attack]:
  """Every attack of the grid, then those that are drawn; a drawn one is made on every relearn set."""
  attack, search = config.attack, config.attack.search
  found = [Attack(name, adapter, rate) for name in relearn_sets for adapter in attack.used_adapters()
           for rate in attack.rates(adapter)]
  rng = np.random.default_rng([search.seed, 17])
  for _ in range(search.trials):
    rate = float(np.exp(rng.uniform(np.log(search.lowest_rate), np.log(search.highest_rate))))
    adapter = search.adapters[int(rng.integers(len(search.adapters)))]
    size = search.batch_sizes[int(rng.integers(len(search.batch_sizes)))]
    found += [Attack(name, adapter, float(f"{rate:.3g}"), size) for name in relearn_sets]
  return list(dict.fromkeys(found))


def trained_points(config: Audit, method: str, seed: int, *, original: bool) -> list[Point]:
  """U and N of a method at every depth, and where asked for O, of all variants of a seed; their steps are not known."""
  found = []
  for variant in config.case_config.versions():
    for depth in range(config.unlearn.depths):
      found += [Point(arm, variant, seed, method, depth) for arm in "UN"]
    if original:
      found.append(Point("O", variant, seed, None, None, 0))
  return found


def loaded_points(config: Audit) -> list[Point]:
  """The models that were given, once for every seed; all of a seed stand next to each other."""
  variant, = config.case_config.versions()
  how = {"U": (config.arms.method, 0), "N": (None, 0), "O": (None, None)}
  return [Point(arm, variant, seed, *how[arm], 0) for seed in config.seeds for arm in config.arms.loaded]


def select_points(curves: Mapping[Chain, Mapping[int, float]], max_score: float, depths: int,
                  gone: Collection[Chain] = ()) -> dict[Chain, list[int]]:
  """The unlearn steps at which each U chain is attacked, shallowest first.

  Args:
    curves: mean score of every U chain at its kept steps, step 0 included.
    max_score: a chain is unlearned from its first kept step after 0 with at most this.
    depths: points wanted; a chain that stopped too early has fewer, one that never got there none.
    gone: chains that have ended: they have no points, whatever they had been before.
  """
  points = {}
  for chain, curve in curves.items():
    steps = sorted(step for step in curve if step > 0) if chain not in gone else []
    first = next((i for i, step in enumerate(steps) if curve[step] <= max_score), len(steps))
    points[chain] = steps[first:first + depths]
  return points


def content_key(*parts: Any) -> str:
  """SHA-256 of JSON-safe values, shortened: what a result depends on, so that it is found again in a larger grid."""
  text = json.dumps(parts, sort_keys=True, default=lambda value: dataclasses.asdict(value))
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
