"""Intervals: values by hand, and how often they cover a truth that is known."""

import numpy as np
import pytest

from relearn_jax.audit.statistics import bootstrap_weights, exact_bounds, intervals, worst_cell


def weights(seeds: int, questions: int, draws: int = 4000) -> np.ndarray:
  return bootstrap_weights(seeds, np.arange(questions), draws, 0)


def test_weights_sum_to_one_and_depend_on_the_seed_alone() -> None:
  clusters = np.array(["a", "a", "b", "c", "c", "c"])
  drawn = bootstrap_weights(3, clusters, 50, 1)
  assert drawn.shape == (50, 18)
  np.testing.assert_allclose(drawn.sum(1), 1)
  np.testing.assert_array_equal(drawn, bootstrap_weights(3, clusters, 50, 1))
  assert np.any(drawn != bootstrap_weights(3, clusters, 50, 2))
  table = drawn.reshape(50, 3, 6)
  np.testing.assert_allclose(table[:, :, 0], table[:, :, 1])  # of one cluster


def test_the_variance_of_a_mean_is_the_unbiased_one() -> None:
  """One factor alone: var(x) / n with the n - 1 denominator, which plain resampling misses by (n - 1) / n."""
  values = np.array([0.0, 1.0, 5.0])
  seeds = (weights(3, 1, 40_000) @ values).var()
  questions = (weights(1, 3, 40_000) @ values).var()
  assert seeds == pytest.approx(values.var(ddof=1) / 3, rel=0.05)
  assert questions == pytest.approx(values.var(ddof=1) / 3, rel=0.05)


def test_identical_answers_get_exact_limits() -> None:
  assert exact_bounds(100, 0.05) == pytest.approx(0.0362, abs=1e-4)  # Clopper-Pearson for 0 of 100
  zeros, ones = np.zeros((3, 100)), np.ones((3, 100))
  none, every = intervals(np.stack([zeros, ones]), weights(3, 100), 0.05, True, 100)
  assert (none.mean, none.low) == (0, 0) and none.high == pytest.approx(0.0362, abs=1e-4)
  assert (every.mean, every.high) == (1, 1) and every.low == pytest.approx(1 - 0.0362, abs=1e-4)
  plain, = intervals(zeros[None], weights(3, 100), 0.05, False, 100)
  assert (plain.low, plain.high) == (0, 0)


def test_intervals_cover_seeds_and_questions() -> None:
  """Random effects of both: near the nominal 95 %, on the conservative side (Owen 2007)."""
  rng, covered, trials = np.random.default_rng(0), 0, 300
  drawn = weights(8, 40, 1000)
  for _ in range(trials):
    table = rng.normal(size=(8, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(8, 40))
    found, = intervals(table[None], drawn, 0.05, False, 40)
    covered += found.low <= 0 <= found.high
  assert 0.90 <= covered / trials <= 0.99


def test_a_bootstrap_over_questions_alone_would_not() -> None:
  rng, covered, trials = np.random.default_rng(0), 0, 100
  drawn = weights(1, 320, 500)
  for _ in range(trials):
    table = rng.normal(size=(8, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(8, 40))
    found, = intervals(table.reshape(1, 1, -1), drawn, 0.05, False, 320)
    covered += found.low <= 0 <= found.high
  assert covered / trials < 0.8


def test_worst_cell_limits_hold_for_all_cells_at_once() -> None:
  rng, trials, cells = np.random.default_rng(1), 200, 12
  drawn = weights(1, 60, 1000)
  below = above = naive = 0
  for _ in range(trials):
    tables = rng.normal(size=(cells, 1, 60))  # the truth is 0 in every cell
    worst = worst_cell(tables, drawn, 0.05, 10**9)
    below += worst.low > 0
    above += worst.high < 0
    naive += tables[worst.index].mean() - 1.645 * tables[worst.index].std() / 60**0.5 > 0
  assert below / trials <= 0.1 and above / trials <= 0.1
  assert naive / trials > 0.3  # a one-sided limit of the cell that looks largest errs far more often


def test_worst_cell_without_spread_claims_no_certainty() -> None:
  worst = worst_cell(np.zeros((4, 3, 30)), weights(3, 30), 0.05, 30)
  assert (worst.estimate, worst.low) == (0, 0)
  assert worst.high == pytest.approx(1 - 0.05 ** (1 / 30))  # about 0.095: 30 questions without a hit


def test_worst_cell_picks_the_largest() -> None:
  tables = np.zeros((3, 2, 50))
  tables[1] = 0.5
  worst = worst_cell(tables, weights(2, 50), 0.05, 50)
  assert worst.index == 1 and worst.estimate == 0.5 and worst.low == pytest.approx(0.5)
