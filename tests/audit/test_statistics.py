"""Intervals and limits: values by hand, what they must never do, and how often they err."""

import importlib.util
import pathlib
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from relearn_jax.audit.statistics import (
  lower_limits,
  mean_limits,
  seeds_needed,
  spread,
  t_limits,
  upper_bound,
  upper_limits,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
  """The program behind the tables of error rates."""
  spec = importlib.util.spec_from_file_location("verdict_simulation", ROOT / "benchmarks" / "verdict.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  import sys
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(("hits", "number"), [(0, 3), (1, 3), (2, 3), (3, 3), (0, 19), (3, 20)])
def test_of_hits_the_bound_is_clopper_and_pearsons(hits: int, number: int) -> None:
  values = (np.arange(number) < hits).astype(float)
  exact = stats.beta.ppf(0.95, hits + 1, number - hits) if hits < number else 1.0
  assert float(upper_bound(values, 0.05, 1.0, draws=100_000)) == pytest.approx(exact, abs=4e-3)


def test_a_bound_lies_between_the_largest_mean_that_the_values_allow_and_the_end() -> None:
  values = np.array([0.2, 0.4, 0.9])
  assert 0.5 < float(upper_bound(values, 0.05, 1.0)) < 1.0
  assert float(upper_bound(np.full(4, 0.3), 0.05, 1.0)) == pytest.approx(0.3 + 0.7 * (1 - 0.05**0.25), abs=1e-4)


def test_fewer_hits_never_widen_the_limits() -> None:
  """At the edges, hit by hit: the upper limit of 0 in 300 is below that of 1 in 300, and so on."""
  ids = np.arange(100)
  rng = np.random.default_rng(0)
  for seeds in (3, 5):
    order = rng.permutation(seeds * 100)
    highs, lows = [], []
    for count in [*range(0, 12), *range(seeds * 100 - 11, seeds * 100 + 1)]:
      table = np.zeros(seeds * 100)
      table[order[:count]] = 1.0
      low, high = mean_limits(table.reshape(seeds, 100), ids, 0.05, draws=2000)
      lows.append(float(low))
      highs.append(float(high))
    assert highs == sorted(highs) and lows == sorted(lows)


def test_three_seeds_without_a_hit_allow_what_they_allow() -> None:
  """All or nothing by seed cannot be told from nothing: 1 - 0.025^(1/3), and a little for the questions."""
  low, high = mean_limits(np.zeros((3, 100)), np.arange(100), 0.05)
  assert low == 0 and 1 - 0.025 ** (1 / 3) <= high <= 1 - 0.025 ** (1 / 3) + 0.002
  one_model = mean_limits(np.zeros((3, 100)), np.arange(100), 0.05, seeds_vary=False)[1]
  assert one_model == pytest.approx(1 - 0.025 ** (1 / 100), abs=1e-4)


def test_variances_of_crossed_factors_are_unbiased() -> None:
  rng, found = np.random.default_rng(0), []
  for _ in range(400):
    seeds, clusters = rng.normal(size=(5, 1)), np.repeat(rng.normal(size=12), 3)
    found.append(spread(2.0 * seeds + clusters + rng.normal(size=(5, 36)), np.repeat(np.arange(12), 3)))
  # 4/5 of seeds, 1/12 of clusters, 1/180 of the rest in either, taken off once in the total.
  assert np.mean([s.seeds for s in found]) == pytest.approx(4 / 5 + 1 / 180, rel=0.1)
  assert np.mean([s.clusters for s in found]) == pytest.approx(1 / 12 + 1 / 180, rel=0.1)
  assert np.mean([s.total for s in found]) == pytest.approx(4 / 5 + 1 / 12 + 1 / 180, rel=0.1)


def test_unequal_clusters_weigh_by_their_questions() -> None:
  values = np.array([[1.0, 1.0, 1.0, 0.0, 0.0]] * 4)
  found = spread(values, np.array([0, 0, 0, 1, 2]))
  assert found.mean == pytest.approx(0.6) and found.seeds == pytest.approx(0)
  # d = (3 * 0.4, -0.6, -0.6) / 5 of each cluster; 3/2 of their squares
  assert found.clusters == pytest.approx(1.5 * (0.24**2 + 2 * 0.12**2))


def test_student_limits_by_hand() -> None:
  """Seeds alone vary: the textbook interval of their means."""
  seeds = np.array([-1.0, -2.0, -4.0])
  low, high = t_limits(np.repeat(seeds[:, None], 50, 1), np.arange(50), 0.05)
  half = stats.t.ppf(0.975, 2) * seeds.std(ddof=1) / 3**0.5
  assert (float(low), float(high)) == pytest.approx((seeds.mean() - half, seeds.mean() + half))


def test_lower_limits_by_hand() -> None:
  """Where seeds alone vary: Student's one-sided limit, at most Gaffke's with 0 as the lowest value."""
  seeds = np.array([0.3, 0.5, 0.7])
  table = np.repeat(seeds[:, None], 50, 1)[None]
  student = 0.5 - stats.t.ppf(0.95, 2) * 0.2 / 3**0.5
  assert lower_limits(table, np.arange(50), 0.05)[0] == pytest.approx(student)
  certain = lower_limits(np.ones((1, 3, 50)), np.arange(50), 0.05)[0]
  assert certain == pytest.approx(0.05 ** (1 / 3), abs=1e-3)  # and not certainty


def test_a_cell_without_spread_borrows_that_of_the_others() -> None:
  """Of many cells in which all or nothing comes back some agree by chance."""
  quiet, loud = np.ones((3, 40)), np.array([[1.0] * 40, [-1.0] * 40, [1.0] * 40])
  assert lower_limits(quiet[None], np.arange(40), 0.05)[0] > 0
  assert lower_limits(np.stack([quiet, loud]), np.arange(40), 0.05)[0] < 0


def test_upper_limits_are_within_what_is_possible() -> None:
  tables = np.stack([np.ones((3, 40)), -np.ones((3, 40)), np.zeros((3, 40))])
  high = upper_limits(tables, np.arange(40), 0.05)
  assert high.max() <= 1 and (high >= tables.mean((1, 2))).all()


def test_seeds_needed_are_those_after_which_no_hit_is_enough() -> None:
  for questions in (40, 100, 1000):
    number = seeds_needed(0.1, 0.05, questions)
    assert number is not None
    high = lambda seeds, q=questions: upper_limits(np.zeros((1, seeds, q)), np.arange(q), 0.05)[0]
    assert high(number) < 0.1 <= high(number - 1)
  assert seeds_needed(0.1, 0.05, 28) is None


# A small version of benchmarks/verdict.md; the shares' standard errors are allowed for twice.

@pytest.mark.parametrize("law", [(0.04, 2.0), (0.9, 3.0), (0.3, None)])
@pytest.mark.parametrize(("questions", "size"), [(35, 1), (100, 20)])
def test_intervals_cover(simulation: ModuleType, law: tuple[float, float | None], questions: int, size: int) -> None:
  found = simulation.coverage(np.random.default_rng(1), simulation.Law(*law, 0.0), 150, 3, questions, size)
  assert found >= 0.93


@pytest.mark.parametrize(("cells", "shared"), [(1, True), (18, True), (18, False)])
@pytest.mark.parametrize("law", [(0.5, 3.0, 2.0), (0.5, None, 0.0), (0.1, 0.0, 2.0)])
def test_what_follows_one_law_is_rarely_called_obfuscated(simulation: ModuleType, cells: int, shared: bool,
                                                          law: tuple) -> None:
  runs = 600
  found = simulation.false_obfuscated(np.random.default_rng(2), simulation.Law(*law), runs, cells, shared, 5, 100, 4)
  assert found <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_power(simulation: ModuleType) -> None:
  """An excess of 0.5 at three seeds is found, and nothing at forty is called erased, four times of five."""
  assert simulation.obfuscated(np.random.default_rng(3), 0.5, 1000, 1, 3, 100, 1) >= 0.8 - 2 * (0.16 / 1000) ** 0.5
  same = simulation.Law(0.02, 1.0)
  assert simulation.words(np.random.default_rng(4), same, same, 20, 40, 100).get("ERASED", 0) >= 0.8


@pytest.mark.parametrize("seeds", [5, 19, 30])
def test_recovery_by_seeds_that_is_all_or_nothing_is_rarely_called_erased(simulation: ModuleType, seeds: int) -> None:
  recovered, none = simulation.Law(0.15, None), simulation.Law(0.0, 0.0)
  found = simulation.words(np.random.default_rng(5), recovered, none, 100, seeds, 100)
  assert found.get("ERASED", 0) <= 0.05
