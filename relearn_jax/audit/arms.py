"""Arms: which runs there are, what each is trained on, and which models are attacked.

U memorises the case and unlearns it; N, the never-trained control, does the same with a case that
lacks the secret; O is the original, attacked without unlearning.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from relearn_jax.audit.config import AuditConfig
from relearn_jax.cases.base import Case
from relearn_jax.cases.names import Arm, make_case


@dataclasses.dataclass(frozen=True)
class Run:
  """A model that memorises and unlearns: entry of the stacked axis of those two stages."""

  variant: int
  seed: int
  arm: Arm

  @property
  def name(self) -> str:
    """For example "U-7-0": arm, variant, seed."""
    return f"{self.arm}-{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A model that is attacked: a run at one of its unlearned points, or the original (depth None)."""

  run: Run
  depth: int | None
  unlearn_step: int
  rate: float | None = None  # of the attack, where there are several
  missing: bool = False  # the run has no such depth, or has ended: the cell keeps its place, its answers do not count

  @property
  def arm(self) -> str:
    """U, N or O."""
    return "O" if self.depth is None else self.run.arm

  @property
  def name(self) -> str:
    """For example "N-7-0-depth1", "O-7-0" or, of several attacks, "O-7-0-lr0.001"."""
    where = "" if self.depth is None else f"-depth{self.depth}"
    return f"{self.arm}-{self.run.variant}-{self.run.seed}{where}" + ("" if self.rate is None else f"-lr{self.rate:g}")


def all_runs(config: AuditConfig) -> list[Run]:
  """U of every variant and seed, then N of every variant and seed."""
  arms: tuple[Arm, ...] = ("U", "N")
  return [Run(variant, seed, arm) for arm in arms for variant in config.case.variants for seed in config.case.seeds]


def all_cases(config: AuditConfig) -> dict[Run, Case]:
  """The case of every run."""
  return {run: make_case(config.case, run.variant, run.seed, run.arm) for run in all_runs(config)}


def select_points(asr: Mapping[Run, Mapping[int, float]], max_asr: float, depths: int, gone: Mapping[Run, int] = {}
                  ) -> dict[tuple[int, int], list[int]]:
  """The unlearn steps at which each variant and seed is attacked, shallowest first.

  Args:
    asr: attack success of every U run at its kept steps, step 0 included.
    max_asr: a run is unlearned from its first kept step after 0 with at most this.
    depths: points wanted; a run that stopped too early has fewer, one that never got there none.
    gone: run -> unlearn step from which there is no model, since it has ended (0: there never was one). Such a run
      has no points, whatever it had been before.
  """
  points = {}
  for run, curve in asr.items():
    steps = sorted(step for step in curve if step > 0) if run not in gone else []
    first = next((i for i, step in enumerate(steps) if curve[step] <= max_asr), len(steps))
    points[run.variant, run.seed] = steps[first:first + depths]
  return points


def cells_of_seed(config: AuditConfig, seed: int, points: Mapping[tuple[int, int], Sequence[int]], last_step: int,
                  gone: Mapping[Run, int] = {}) -> list[Cell]:
  """Everything that is attacked together: U and N at every depth, and O, of all variants of a seed.

  Args:
    config: of the audit.
    seed: which.
    points: see `select_points`.
    last_step: of unlearning, where cells that are missing keep their place.
    gone: see `select_points`.
  """
  cells = []
  for variant in config.case.variants:
    u, n = Run(variant, seed, "U"), Run(variant, seed, "N")
    steps = points[variant, seed]
    for depth in range(config.unlearn.depths):
      missing = depth >= len(steps)
      step = last_step if missing else steps[depth]
      cells += [Cell(u, depth, step, missing=missing),
                Cell(n, depth, step, missing=missing or gone.get(n, math.inf) <= step)]
    cells.append(Cell(u, None, 0, missing=gone.get(u, math.inf) <= 0))
  return cells


def attacked_cells(config: AuditConfig, cells: Sequence[Cell]) -> list[Cell]:
  """The cells under every learning rate of the attack, one rate after the other."""
  rates = config.relearn.learning_rates
  return [dataclasses.replace(cell, rate=rate if len(rates) > 1 else None) for rate in rates for cell in cells]


def mean_asr(asr: np.ndarray) -> np.ndarray:
  """Attack success of each run, `[R, Q] -> [R]`, in double precision: 1 of 100 is exactly 0.01."""
  return asr.astype(np.float64).mean(axis=1)
