"""Intervals and limits of an audit: means over the population of seeds and of question clusters.

Every seed's model is asked the same questions, so values form a table `[seeds, questions]` that is random in both
directions. There are few seeds, and what they share can be all or nothing: recovery in every question of a seed, or in
none. Three tools, each used where it holds:

* `mean_limits`, distribution-free towards either end. In each direction the limit is Gaffke's (2005, "Three test
  statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable", Mathematical Methods of
  Statistics 14): a Bayesian bootstrap with one more observation at the end of the range. On values that are 0 or 1 it
  is Clopper and Pearson's, so that three seeds without a hit allow a mean of 0.71. Where questions come in clusters,
  the limit in their direction is at least Student's over clusters. The two directions are put together as Zou and
  Donner (2008, Statistics in Medicine 27) do it: the distances from the mean add up in squares.
* `lower_limits`, for several cells at once: Student's t with the degrees of freedom of the smaller direction. Its
  errors are held where two arms follow the same law, whatever that is (`benchmarks/verdict.py`); it is not a limit for
  every bounded law, of which three seeds allow none.
* `t_limits`, for log-probabilities, which have no range.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import stats

DRAWS = 10_000  # of the Bayesian bootstrap: the limits' own error is then about 0.002


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its confidence limits; both None where the table is too small to show any."""

  mean: float
  low: float | None
  high: float | None


@functools.lru_cache(maxsize=64)
def _weights(number: int, draws: int, seed: int) -> np.ndarray:
  """Shares of `number` observations and of one more at the end of the range, uniform on the simplex: `[draws, n + 1]`.

  The last one's are the quantiles of its law, Beta(1, n), evenly spaced: of equal values the bound is then exact.
  """
  rng = np.random.default_rng([seed, number])
  last = rng.permutation(1.0 - ((np.arange(draws) + 0.5) / draws) ** (1.0 / number))
  others = rng.exponential(size=(draws, number))
  return np.hstack([others / others.sum(1, keepdims=True) * (1.0 - last[:, None]), last[:, None]])


def upper_bound(values: np.ndarray, alpha: float, end: float, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Gaffke's upper confidence bound of a mean, `[..., n] -> [...]`.

  With w uniform on the simplex it is the (1 - alpha) quantile of sum_i w_i x_i + w_{n+1} end. It never falls when a
  value rises, and of equal values x it is x + (end - x)(1 - alpha^(1/n)).

  Args:
    values: independent observations, none above `end`.
    alpha: error of the bound.
    end: the largest value that there can be.
    draws, seed: of the quantile's simulation.

  >>> round(float(upper_bound(np.zeros(3), 0.05, 1.0)), 2)  # Clopper and Pearson's bound of 0 in 3
  0.63
  """
  weights = _weights(values.shape[-1], draws, seed)
  bounds = [np.quantile(weights[:, :-1] @ row + weights[:, -1] * end, 1.0 - alpha)
            for row in values.reshape(-1, values.shape[-1])]
  return np.reshape(bounds, values.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Spread:
  """Estimated variances of a table's mean, each `[...]`: that of seeds, of clusters, and of both together."""

  mean: np.ndarray
  seeds: np.ndarray
  clusters: np.ndarray
  total: np.ndarray


def spread(tables: np.ndarray, clusters: np.ndarray, seeds_vary: bool = True) -> Spread:
  """The variances of a mean over two crossed random factors.

  With d[s, c] the sum over cluster c of (x[s, q] - mean) / Q, a[s] and b[c] its sum over clusters and its mean over
  seeds: var_S = sum a^2 / S(S-1), var_C = C/(C-1) sum b^2, and what d has beyond both counts in each of them, so
  that it is taken off once: total = max(var_S, var_C, var_S + var_C - var_SC).

  Args:
    tables: values `[..., seeds, questions]`.
    clusters: cluster of each question, `[questions]`, as integers from 0.
    seeds_vary: False where all rows are answers of one model; only clusters vary then.
  """
  num_seeds, num_questions = tables.shape[-2:]
  member = np.eye(clusters.max() + 1)[clusters]  # [Q, C]
  number = member.shape[1]
  mean = tables.mean((-2, -1))
  d = (tables - mean[..., None, None]) @ member / num_questions
  b = d.mean(-2)
  more = number / (number - 1) if number > 1 else np.nan
  of_clusters = more * (b**2).sum(-1)
  if not seeds_vary:
    return Spread(mean, np.zeros_like(mean), of_clusters, of_clusters)
  a = d.sum(-1)
  pairs = num_seeds * (num_seeds - 1) if num_seeds > 1 else np.nan
  of_seeds = (a**2).sum(-1) / pairs
  e = d - b[..., None, :] - a[..., None] * member.sum(0) / num_questions
  both = more * (e**2).sum((-2, -1)) / pairs
  return Spread(mean, of_seeds, of_clusters, np.maximum(np.maximum(of_seeds, of_clusters),
                                                        of_seeds + of_clusters - both))


def _distance(tables: np.ndarray, clusters: np.ndarray, alpha: float, end: float, seeds_vary: bool, draws: int,
              seed: int) -> np.ndarray:
  """How far the upper limit lies above the mean, `[...]`."""
  found = spread(tables, clusters, seeds_vary)
  questions = upper_bound(tables.mean(-2), alpha, end, draws, seed) - found.mean
  number = int(clusters.max()) + 1
  questions = np.maximum(questions, stats.t.ppf(1.0 - alpha, number - 1) * np.sqrt(found.clusters))
  if not seeds_vary:
    return questions
  return np.hypot(upper_bound(tables.mean(-1), alpha, end, draws, seed) - found.mean, questions)


def upper_limits(tables: np.ndarray, clusters: np.ndarray, alpha: float, *, end: float = 1.0, seeds_vary: bool = True,
                 draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Upper limits of means, each with an error of alpha, `[..., S, Q] -> [...]`; see the module.

  The largest of several cells' limits is a limit of the largest mean with the same error: the cell that has it is
  covered by its own limit.

  Args:
    tables: values of at most `end`, at least two clusters and (where seeds vary) at least one seed.
    clusters: cluster of each question, as integers from 0.
    alpha: error of each limit.
    end: the largest value that a mean can have.
    seeds_vary: see `spread`.
    draws, seed: see `upper_bound`.
  """
  above = _distance(tables, clusters, alpha, end, seeds_vary, draws, seed)
  return np.minimum(tables.mean((-2, -1)) + above, end)


def mean_limits(tables: np.ndarray, clusters: np.ndarray, alpha: float, *, ends: tuple[float, float] = (0.0, 1.0),
                seeds_vary: bool = True, draws: int = DRAWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Two-sided limits of means of values within `ends`, alpha / 2 on each side; see `upper_limits`."""
  limit = lambda x, end: upper_limits(x, clusters, alpha / 2, end=end, seeds_vary=seeds_vary, draws=draws, seed=seed)
  return -limit(-tables, -ends[0]), limit(tables, ends[1])


def t_limits(tables: np.ndarray, clusters: np.ndarray, alpha: float, *, seeds_vary: bool = True
             ) -> tuple[np.ndarray, np.ndarray]:
  """Two-sided Student limits of means of values without a range."""
  found = spread(tables, clusters, seeds_vary)
  half = stats.t.ppf(1.0 - alpha / 2, _freedom(tables, clusters, seeds_vary)) * np.sqrt(found.total)
  return found.mean - half, found.mean + half


def _freedom(tables: np.ndarray, clusters: np.ndarray, seeds_vary: bool) -> int:
  number = int(clusters.max())
  return min(number, tables.shape[-2] - 1) if seeds_vary else number


def lower_limits(tables: np.ndarray, clusters: np.ndarray, alpha: float, *, seeds_vary: bool = True,
                 draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Lower limits of the mean differences of K cells, all at once, `[K, S, Q] -> [K]`.

  mean_k - c max(s_k, (max s + rms s) / 2), with s the standard errors of `spread` and c the larger of Student's
  quantile (its degrees of freedom those of the smaller direction) and the normal quantile at alpha / K. A cell with no
  spread to be seen thus borrows that of the others: of many cells in which all or nothing comes back, some agree by
  chance. No limit above 0 is above Gaffke's lower bound over seeds and over questions, with 0 as the lowest value that
  there can be: seeds in which nothing comes back may have been missed.

  Args:
    tables: differences between two arms, of the same seeds and questions, at least two seeds and two clusters.
    clusters: cluster of each question, as integers from 0.
    alpha: chance that any limit is above 0 where both arms follow one law.
    seeds_vary: see `spread`.
    draws, seed: see `upper_bound`.
  """
  found = spread(tables, clusters, seeds_vary)
  errors = np.sqrt(found.total)
  shared = (errors.max() + math.sqrt((errors**2).mean())) / 2
  c = max(stats.t.ppf(1.0 - alpha, _freedom(tables, clusters, seeds_vary)),
          stats.norm.ppf(1.0 - alpha / len(tables)))
  limits = found.mean - c * np.maximum(errors, shared)
  for i in np.flatnonzero(limits > 0):
    for axis in (-2, -1) if seeds_vary else (-2,):  # means of questions, and of seeds
      limits[i] = min(limits[i], _lower_bound(tables[i].mean(axis), alpha, draws, seed))
  return limits


def _lower_bound(values: np.ndarray, alpha: float, draws: int, seed: int) -> float:
  """Gaffke's lower bound of the mean of values that can be 0, or as low as the lowest that was seen."""
  return -float(upper_bound(-values, alpha, max(0.0, -float(values.min())), draws, seed))


def seeds_needed(delta: float, alpha: float, num_questions: int) -> int | None:
  """Seeds after which no hit in any of them shows a mean below delta; None where the questions are too few for that.

  >>> seeds_needed(0.1, 0.05, 100)
  30
  """
  of_questions = 1.0 - alpha ** (1.0 / num_questions)
  if of_questions >= delta:
    return None
  return math.floor(math.log(alpha) / math.log1p(-math.sqrt(delta**2 - of_questions**2))) + 1
