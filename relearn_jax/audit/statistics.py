"""Intervals of an audit: a crossed bootstrap over seeds and questions.

Every seed's model is asked the same questions, so values form a table [seeds, questions] and two of
them in a row or a column are dependent. Both factors are therefore resampled, independently, and a
value's weight is the product (the pigeonhole bootstrap, Owen 2007, which is conservative for crossed
random effects). Of n seeds or question clusters, n - 1 are drawn with replacement: with n draws the
variance of a mean would come out (n - 1) / n too small, which for three seeds is a third (Rao and Wu
1988). One set of weights serves all cells, so differences between cells stay paired.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its confidence limits."""

  mean: float
  low: float
  high: float


def _counts(rng: np.random.Generator, draws: int, number: int) -> np.ndarray:
  """How often each of `number` clusters is drawn, as a share of the draw: `[draws, number]`."""
  if number == 1:
    return np.ones((draws, 1))  # nothing to resample
  return rng.multinomial(number - 1, np.full(number, 1 / number), size=draws) / (number - 1)


def bootstrap_weights(num_seeds: int, clusters: np.ndarray, draws: int, seed: int) -> np.ndarray:
  """Resampling weights `[draws, num_seeds * num_questions]`; each row sums to 1.

  Args:
    num_seeds: with a single one only questions are resampled, and the interval says nothing of seeds.
    clusters: cluster id of each question; questions of a cluster are drawn together.
    draws: bootstrap draws.
    seed: decides them.
  """
  rng = np.random.default_rng(seed)
  _, member, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
  by_seed = _counts(rng, draws, num_seeds)
  by_question = _counts(rng, draws, len(sizes))[:, member]
  by_question /= by_question.sum(1, keepdims=True)  # clusters may differ in size
  return np.einsum("ds,dq->dsq", by_seed, by_question).reshape(draws, -1)


def exact_bounds(num_questions: int, alpha: float) -> float:
  """Half-width limit for an all-0 or all-1 table: Clopper-Pearson's 1 - (alpha / 2)^(1 / n).

  A bootstrap of identical values has no spread and would claim certainty. n is the number of question
  clusters, not of answers: several seeds' answers to one question are no independent evidence.
  """
  return 1.0 - (alpha / 2) ** (1.0 / num_questions)


def intervals(tables: np.ndarray, weights: np.ndarray, alpha: float, proportion: bool, num_clusters: int
              ) -> list[Interval]:
  """Percentile intervals of several cells.

  Args:
    tables: values `[cells, seeds, questions]`.
    weights: from `bootstrap_weights`.
    alpha: 0.05 for 95 % intervals.
    proportion: values are 0 or 1; limits are clipped, and identical values get `exact_bounds`.
    num_clusters: clusters of questions.
  """
  flat = tables.reshape(len(tables), -1)
  limits = np.quantile(weights @ flat.T, [alpha / 2, 1 - alpha / 2], axis=0)
  result = []
  for values, low, high in zip(flat, *limits, strict=True):
    mean = float(values.mean())
    if proportion and values.min() == values.max():
      bound = exact_bounds(num_clusters, alpha)
      low, high = (0.0, bound) if mean == 0 else (1.0 - bound, 1.0)
    result.append(Interval(mean, float(min(low, mean)), float(max(high, mean))))
  return result


@dataclasses.dataclass(frozen=True)
class Worst:
  """Simultaneous limits over cells, and the cell with the largest estimate.

  `low` bounds the largest true value from below and `high` bounds all of them from above, each with
  confidence 1 - alpha, however the cell was picked.
  """

  index: int
  estimate: float
  low: float
  high: float


def worst_cell(tables: np.ndarray, weights: np.ndarray, alpha: float, num_clusters: int) -> Worst:
  """Max-statistic bootstrap over cells.

  With e the estimates and e* a draw, c is the (1 - alpha) quantile of max over cells of (e* - e): no
  cell's truth lies below e - c, all cells at once, so max(e) - c is a lower bound that stands although
  the largest of many noisy cells was looked for. The upper bound mirrors it.

  Args:
    tables: values `[cells, seeds, questions]`.
    weights: from `bootstrap_weights`.
    alpha: error of each bound.
    num_clusters: clusters of questions. The upper bound stays at least 1 - alpha^(1 / num_clusters)
      above the estimate, the exact bound for no hit at all, where a bootstrap would claim certainty.
  """
  flat = tables.reshape(len(tables), -1)
  estimate = flat.mean(1)
  deviation = weights @ flat.T - estimate
  above = float(np.quantile(deviation.max(1), 1 - alpha))
  below = max(float(np.quantile((-deviation).max(1), 1 - alpha)), 1.0 - alpha ** (1.0 / num_clusters))
  index = int(estimate.argmax())
  return Worst(index, float(estimate[index]), float(estimate[index]) - above, float(estimate.max()) + below)
