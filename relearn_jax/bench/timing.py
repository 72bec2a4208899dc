"""Seconds of calls that are repeated: median and range; of several calls in turns, where they are compared."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

LEAST = 3  # repeats that are made however long they take
BUDGET = 30.0  # seconds after which no repeat beyond them begins


class Spread(NamedTuple):
  """A quantity that was measured several times."""

  median: float
  low: float
  high: float
  repeats: int

  def map(self, function: Callable[[float], float]) -> "Spread":
    """Of a monotonic function of the quantity, such as a rate of seconds."""
    low, high = sorted((function(self.low), function(self.high)))
    return Spread(function(self.median), low, high, self.repeats)


def spread(values: Sequence[float]) -> Spread:
  """Median and range.

  >>> spread([3.0, 1.0, 2.0])
  Spread(median=2.0, low=1.0, high=3.0, repeats=3)
  """
  return Spread(statistics.median(values), min(values), max(values), len(values))


def seconds(call: Callable[[], Any]) -> float:
  """Of one call, up to the moment at which all arrays that it returns are there."""
  begin = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - begin


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
  """Seconds of several calls, a, b, a, b, ..., so that what else the machine does hits all of them.

  Args:
    calls: by name.
    repeats: of each, fewer once `BUDGET` seconds are over, but at least `LEAST` (or `repeats`, if they are fewer).
    warm: each is called once before, untimed.
  """
  if warm:
    for call in calls.values():
      jax.block_until_ready(call())
  found: dict[str, list[float]] = {name: [] for name in calls}
  begin = time.perf_counter()
  for number in range(repeats):
    if number >= LEAST and time.perf_counter() - begin > BUDGET:
      break
    for name, call in calls.items():
      found[name].append(seconds(call))
  return found


def repeat(call: Callable[[], Any], repeats: int, *, warm: bool = True) -> Spread:
  """Seconds of one call; see `in_turns`."""
  return spread(in_turns({"": call}, repeats, warm=warm)[""])


def ratio(left: Sequence[float], right: Sequence[float]) -> Spread:
  """left / right, pair by pair of calls that followed each other.

  >>> ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).median
  1.0
  """
  return spread([a / b for a, b in zip(left, right, strict=True)])
