"""Which rows a step sees: a pure function of the step, so that a resumed run sees what it would have seen."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from relearn_jax.objectives.core import TokenRows

Order = Callable[[int], np.ndarray]


def row_order(num_rows: int, batch_size: int, seed: int) -> Order:
  """Step, counted from 0 -> places `[batch]` of its rows.

  A batch as large as the data set is all of it in file order, at every step. A smaller one goes through
  one permutation of the rows after the other, each drawn from (seed, its number), without a gap between.

  Args:
    num_rows: rows of the data set.
    batch_size: rows of a step.
    seed: decides the permutations.

  >>> order = row_order(5, 2, seed=0)
  >>> sorted(int(place) for step in range(5) for place in order(step))
  [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  """
  if batch_size >= num_rows:
    return lambda step: np.arange(num_rows)

  def take(step: int) -> np.ndarray:
    first = step * batch_size
    places = np.arange(first, first + batch_size)
    epochs = {int(e): np.random.default_rng([seed, int(e)]).permutation(num_rows)
              for e in np.unique(places // num_rows)}
    return np.array([epochs[int(p) // num_rows][p % num_rows] for p in places])
  return take


def small_batches(data: Mapping[str, TokenRows], batch_size: int, seeds: Sequence[int]) -> dict[str, list[Order]]:
  """`Stage.order`: an order a run for the data sets of more rows than a batch; the others are seen whole.

  Args:
    data: name -> token rows `[runs, rows, T]`.
    batch_size: rows of each data set in a step; 0: all of them.
    seeds: of the runs.
  """
  return {name: [row_order(rows.tokens.shape[1], batch_size, seed) for seed in seeds] for name, rows in data.items()
          if 0 < batch_size < rows.tokens.shape[1]}
