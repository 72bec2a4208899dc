"""The strongest attack: chosen on one half of seeds and clusters of questions, and reported on the other.

An attacker takes what works best, and a defender has to fear it; but the best of many on the same data looks better
than it is. So attacks compete on the first half, and the winner's excess over the control is measured where it was not
chosen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from relearn_jax.audit.evidence import CellEvidence, Tables, cluster_numbers, gather
from relearn_jax.audit.statistics import mean_limits
from relearn_jax.audit.thresholds import Design, VerdictSettings

MIN_SEEDS = 6  # three in each half, with which an excess can be told from nothing


@dataclasses.dataclass(frozen=True)
class Strongest:
  """The attack that was chosen.

  Attributes:
    depth, relearn_set, adapter, learning_rate, relearn_step: which.
    tried: attacks and steps among which it was chosen, and of them those within the bound on utility.
    allowed: those.
    chosen_excess: its mean excess on the half on which it was chosen, which flatters it.
    excess: on the other half.
    unlearned, control: scores of U and N after it, on the other half.
    seeds: of the other half.
    note: why there is none, or what a reader should know; "".
  """

  depth: int | None = None
  relearn_set: str | None = None
  adapter: str | None = None
  learning_rate: float | None = None
  relearn_step: int | None = None
  tried: int = 0
  allowed: int = 0
  chosen_excess: float | None = None
  excess: float | None = None
  unlearned: Mapping[str, float | None] | None = None
  control: Mapping[str, float | None] | None = None
  seeds: tuple[int, ...] = ()
  note: str = ""


def halves(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Two halves of the numbers below `number`, drawn from `seed`, each ascending; the first is no smaller."""
  order = np.random.default_rng([seed, 23]).permutation(number)
  cut = -(-number // 2)
  return np.sort(order[:cut]), np.sort(order[cut:])


def find_strongest(tables: Tables, variant: str, method: str, search: Mapping[str, Any], settings: VerdictSettings,
                   design: Design) -> dict[str, Any]:
  """The strongest attack on a variant and method, JSON-safe; see `Strongest`.

  Args:
    tables: of the whole audit.
    variant, method: which.
    search: an `audit_config.SearchSettings` as a dictionary: `seed` draws the halves, `min_retain_ratio` bounds the
      utility that an attack may cost.
    settings, design: of the verdict.
  """
  evidence = gather(tables, variant, method, design.metric)
  if evidence.missing:
    return dataclasses.asdict(Strongest(note="; ".join(evidence.missing)))
  if len(evidence.seeds) < MIN_SEEDS:
    return dataclasses.asdict(Strongest(note=f"{len(evidence.seeds)} seeds are too few to choose on one half and to "
                                             f"report on the other (at least {MIN_SEEDS})"))
  clusters = cluster_numbers(evidence.questions, design.clusters)
  first_seeds, other_seeds = halves(len(evidence.seeds), search["seed"])
  first_clusters, other_clusters = halves(int(clusters.max()) + 1, search["seed"] + 1)
  allowed = [cell for cell in evidence.cells if _spares(cell, search["min_retain_ratio"])]
  if not allowed or not len(other_clusters):
    return dataclasses.asdict(Strongest(tried=len(evidence.cells), note="no attack keeps enough of the utility"))
  part = lambda table, seeds, some: table[np.ix_(seeds, np.isin(clusters, some))]
  score = lambda cell: float(part(cell.excess, first_seeds, first_clusters).mean())
  best = max(allowed, key=score)
  ids = np.unique(clusters[np.isin(clusters, other_clusters)], return_inverse=True)[1]

  def interval(table: np.ndarray) -> dict[str, float | None]:
    values = part(table, other_seeds, other_clusters)
    if ids.max() + 1 < settings.min_clusters:
      return {"mean": float(values.mean()), "low": None, "high": None}
    limits = mean_limits(values, ids, settings.alpha, draws=settings.draws, seed=settings.seed)
    return {"mean": float(values.mean()), "low": float(limits[0]), "high": float(limits[1])}
  return dataclasses.asdict(Strongest(
      *best.where, tried=len(evidence.cells), allowed=len(allowed), chosen_excess=score(best),
      excess=float(part(best.excess, other_seeds, other_clusters).mean()), unlearned=interval(best.u1),
      control=interval(best.n1), seeds=tuple(np.array(evidence.seeds)[other_seeds].tolist())))


def _spares(cell: CellEvidence, least: float) -> bool:
  """Whether an attack leaves at least a share of a token's probability on retained text."""
  before, after = cell.retained
  return before is not None and after is not None and after >= least * before
