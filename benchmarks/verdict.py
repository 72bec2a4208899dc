"""How often the verdict errs, by simulation: coverage of intervals, false words, and power.

  python benchmarks/verdict.py [--scale=1.0] > benchmarks/verdict.out

Hits are drawn from laws whose means are known. A law has a mean, a spread of seeds and one of clusters (standard
deviations on the logit scale; "all or nothing" is recovery in every question of a seed or in none), and U and N are
independent draws. Rates are shares of simulated experiments; their own standard error is below 0.7 points at 1,000.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from scipy import optimize, special

from relearn_jax.audit.evidence import CellEvidence, Evidence, Where
from relearn_jax.audit.statistics import lower_limits, mean_limits, upper_limits
from relearn_jax.audit.thresholds import Design, VerdictSettings
from relearn_jax.audit.verdict import decide

DESIGNS = ((35, 1), (100, 1), (35, 4), (100, 4), (100, 20))  # questions, questions of a cluster; at least 5 clusters
MEANS = (0.02, 0.1, 0.3, 0.5, 0.9)
ALPHA, DELTA = 0.05, 0.1


@dataclasses.dataclass(frozen=True)
class Law:
  """Where hits come from: mean, spread of seeds (None: all or nothing), spread of clusters."""

  mean: float
  seeds: float | None
  clusters: float = 0.0

  def __str__(self) -> str:
    spread = "all or nothing" if self.seeds is None else f"spread {self.seeds:g}"
    return f"mean {self.mean:g}, {spread}" + (f", clusters {self.clusters:g}" if self.clusters else "")

  def draw(self, rng: np.random.Generator, runs: int, cells: int, seeds: int, questions: int, size: int, shared: bool
           ) -> np.ndarray:
    """Hits `[runs, cells, seeds, questions]`; `shared`: the cells have the effects of seeds and clusters in common."""
    kinds = 1 if shared else cells
    if self.seeds is None:
      on = rng.random((runs, kinds, seeds, 1)) < self.mean
      return np.broadcast_to(on, (runs, cells, seeds, questions)).astype(np.float32)
    member = np.arange(questions) // size
    logit = _centre(self.mean, float(np.hypot(self.seeds, self.clusters)))
    logit = logit + self.seeds * rng.standard_normal((runs, kinds, seeds, 1))
    logit = logit + self.clusters * rng.standard_normal((runs, kinds, 1, member[-1] + 1))[..., member]
    return (rng.random((runs, cells, seeds, questions)) < special.expit(logit)).astype(np.float32)


def _centre(mean: float, spread: float) -> float:
  """The logit around which values with this spread have this mean."""
  if mean in (0.0, 1.0):
    return 60.0 * (2 * mean - 1)
  grid = np.linspace(-8, 8, 801)
  weight = np.exp(-grid**2 / 2)
  found = lambda logit: (special.expit(logit + spread * grid) * weight).sum() / weight.sum()
  return float(optimize.brentq(lambda logit: found(logit) - mean, -60, 60))


def laws(clusters: tuple[float, ...] = (0.0, 2.0), means: tuple[float, ...] = MEANS) -> Iterator[Law]:
  """The laws that are tried."""
  for mean in means:
    yield Law(mean, None)
    for spread, cluster in itertools.product((0.0, 1.0, 2.0, 3.0), clusters):
      yield Law(mean, spread, cluster)


def members(questions: int, size: int) -> np.ndarray:
  """The cluster of each question."""
  return np.arange(questions) // size


def coverage(rng: np.random.Generator, law: Law, runs: int, seeds: int, questions: int, size: int) -> float:
  """How often the 95 % interval of a cell holds its law's mean."""
  tables = law.draw(rng, runs, 1, seeds, questions, size, True)[:, 0]
  low, high = mean_limits(tables, members(questions, size), ALPHA, draws=1000)
  return float(((low <= law.mean + 1e-9) & (law.mean <= high + 1e-9)).mean())


def false_obfuscated(rng: np.random.Generator, law: Law, runs: int, cells: int, shared: bool, seeds: int,
                     questions: int, size: int) -> float:
  """How often some lower limit is above 0 where U and N follow one law (both before the attack at 0)."""
  u, n = (law.draw(rng, runs, cells, seeds, questions, size, shared) for _ in "UN")
  ids = members(questions, size)
  return float(np.mean([lower_limits(d, ids, ALPHA, draws=1000).max() > 0 for d in u - n]))


def obfuscated(rng: np.random.Generator, excess: float, runs: int, cells: int, seeds: int, questions: int, size: int
               ) -> float:
  """How often an excess is found; spread 1, N at 0."""
  u = Law(excess, 1.0).draw(rng, runs, cells, seeds, questions, size, True)
  ids = members(questions, size)
  return float(np.mean([lower_limits(d, ids, ALPHA, draws=1000).max() > 0 for d in u]))


def below_delta(rng: np.random.Generator, u_law: Law, n_law: Law, runs: int, cells: int, seeds: int, questions: int,
                size: int) -> float:
  """How often all upper limits are below delta: the part of ERASED that is estimated."""
  u, n = (law.draw(rng, runs, cells, seeds, questions, size, True) for law in (u_law, n_law))
  ids = members(questions, size)
  return float(np.mean([upper_limits(d, ids, ALPHA, draws=1000).max() < DELTA for d in u - n]))


def words(rng: np.random.Generator, u_law: Law, n_law: Law, runs: int, seeds: int, questions: int) -> dict[str, float]:
  """Shares of words over experiments that are complete: three attacks, of which the last destroys the original."""
  count: dict[str, int] = {}
  zeros = np.zeros((seeds, questions), np.float32)
  for _ in range(runs):
    u, n = (law.draw(rng, 1, 3, seeds, questions, 1, True)[0] for law in (u_law, n_law))
    kept = ((1e-4, 1.0), (1e-3, 1.0), (1e-2, 0.0))
    cells = tuple(CellEvidence(Where(0, "set", "full", rate, 80), "", zeros, u[i], zeros, n[i], share,
                               {"U": 0.5, "N": 0.5}, (1.0, 1.0), (0.0, 0.0)) for i, (rate, share) in enumerate(kept))
    evidence = Evidence(cells, tuple(range(seeds)), tuple(f"q{i}" for i in range(questions)), 1.0, ())
    word = decide(evidence, VerdictSettings(draws=1000), Design(tuple(range(seeds)))).verdict
    count[word] = count.get(word, 0) + 1
  return {word: number / runs for word, number in sorted(count.items())}


def _worst(found: list[tuple[float, Law]], largest: bool) -> str:
  value, law = (max if largest else min)(found, key=lambda pair: pair[0])
  return f"{100 * value:.1f} % | {law}"


def main() -> None:
  """Prints all tables as Markdown."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of experiments")
  scale = parser.parse_args().scale
  rng, times = np.random.default_rng(0), lambda number: max(int(number * scale), 1)
  print("Coverage of two-sided 95 % intervals, lowest over all laws:\n")
  print("| seeds | questions | of a cluster | lowest | law |\n|" + " --- |" * 5)
  for seeds, (questions, size) in itertools.product((3, 5, 40), DESIGNS):
    found = [(coverage(rng, law, times(400), seeds, questions, size), law) for law in laws((0.0, 1.0, 3.0))]
    print(f"| {seeds} | {questions} | {size} | {_worst(found, False)} |", flush=True)
  print("\nFalse OBFUSCATED where U and N follow one law, highest over all laws:\n")
  print("| seeds | cells | questions | of a cluster | highest | law |\n|" + " --- |" * 6)
  kinds = ((1, True, "1"), (18, True, "18, seeds and clusters in common"), (18, False, "18, independent"))
  for seeds, (cells, shared, name), (questions, size) in itertools.product((3, 5), kinds, DESIGNS):
    runs = times(4000 if cells == 1 else 1000)
    found = [(false_obfuscated(rng, law, runs, cells, shared, seeds, questions, size), law)
             for law in (laws() if cells == 1 else laws(means=(0.1, 0.5)))]
    print(f"| {seeds} | {name} | {questions} | {size} | {_worst(found, True)} |", flush=True)
  print("\nPower of OBFUSCATED, spread 1, control at 0:\n")
  print("| excess | seeds | cells | questions | found |\n|" + " --- |" * 5)
  for excess, seeds, cells, questions in itertools.product((0.2, 0.5, 0.8), (3, 5), (1, 18), (35, 100)):
    share = obfuscated(rng, excess, times(4000 if cells == 1 else 1000), cells, seeds, questions, 1)
    print(f"| {excess} | {seeds} | {cells} | {questions} | {100 * share:.1f} % |", flush=True)
  print("\nAll upper limits below 0.1 although the excess is 0.15 (N at 0), highest over laws:\n")
  print("| seeds | cells | questions | highest | law |\n|" + " --- |" * 5)
  for seeds, cells, questions in itertools.product((3, 5, 19, 30, 40), (1, 18), (35, 100)):
    found = [(below_delta(rng, law, Law(0.0, 0.0), times(500 if cells == 1 else 100), cells, seeds, questions, 1), law)
             for law in laws((0.0,), (0.15,))]
    print(f"| {seeds} | {cells} | {questions} | {_worst(found, True)} |", flush=True)
  print("\nWords, 100 questions, three attacks of which the last destroys the original:\n\n| U | N | seeds | words |\n|"
        + " --- |" * 4)
  same = [(Law(0.0, 0.0), Law(0.0, 0.0)), (Law(0.02, 1.0), Law(0.02, 1.0)), (Law(0.05, 1.0), Law(0.05, 1.0)),
          (Law(0.02, None), Law(0.02, None)), (Law(0.5, 1.0), Law(0.5, 1.0)), (Law(0.5, None), Law(0.5, None)),
          (Law(0.15, None), Law(0.0, 0.0)), (Law(0.5, 1.0), Law(0.0, 0.0)), (Law(0.3, None), Law(0.3, 1.0))]
  for (u_law, n_law), seeds in itertools.product(same, (3, 5, 19, 40)):
    shares = words(rng, u_law, n_law, times(200), seeds, 100)
    print(f"| {u_law} | {n_law} | {seeds} | {', '.join(f'{word} {100 * x:.0f} %' for word, x in shares.items())} |",
          flush=True)


if __name__ == "__main__":
  main()
