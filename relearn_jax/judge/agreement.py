"""How far two judges say the same of the same answers."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

Pair = tuple[str, str]  # question's id, and what is judged of an answer


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Of two judges, on the distinct answers that both rated; scores are from 0 to 1.

  Attributes:
    first, second: their scores' names.
    answers: number of these answers.
    same: share with equal scores.
    difference: mean of the second's score less the first's.
    distance: mean of the absolute difference.
    correlation: of ranks (Spearman); None where a judge says the same of all.
  """

  first: str
  second: str
  answers: int
  same: float | None = None
  difference: float | None = None
  distance: float | None = None
  correlation: float | None = None


def agreement(first: str, second: str, one: Mapping[Pair, float], other: Mapping[Pair, float]) -> Agreement:
  """The agreement of two judges.

  Args:
    first, second: their scores' names.
    one, other: their scores; NaN where one is missing.
  """
  both = [(one[pair], other[pair]) for pair in one.keys() & other.keys()
          if np.isfinite(one[pair]) and np.isfinite(other[pair])]
  if not both:
    return Agreement(first, second, 0)
  a, b = np.array(sorted(both)).T
  varied = np.ptp(a) > 0 and np.ptp(b) > 0
  return Agreement(first, second, len(both), float(np.mean(np.abs(a - b) < 1e-9)), float(np.mean(b - a)),
                   float(np.mean(np.abs(b - a))), float(scipy.stats.spearmanr(a, b).statistic) if varied else None)


def every_pair(scores: Mapping[str, Mapping[Pair, float]]) -> Sequence[Agreement]:
  """The agreement of each two of some judges."""
  return [agreement(first, second, scores[first], scores[second])
          for first, second in itertools.combinations(scores, 2)]
