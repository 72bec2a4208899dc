"""Which rows a step sees: one endless, shuffled data set of places, read from a row position on.

How far a stage has come is that position alone. It counts the rows of all devices and processes together, so a stage
that was killed goes on with rows not yet seen, on however many of them it is started again.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from relearn_jax.objectives.core import TokenRows

SMALL = 4096  # rows of a data set whose epochs are kept


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of a data set's rows, in steps of `batch_size`: equal seeds see equal rows.

  A batch as large as the data set is all of it in file order, at every step. Smaller ones go through one permutation
  of the rows after the other, without a gap between.

  Attributes:
    num_rows: rows of the data set.
    batch_size: rows of a step, at most `num_rows`.
    seed: decides the permutations.

  >>> order = Order(num_rows=5, batch_size=2, seed=0)
  >>> sorted(int(place) for step in range(5) for place in order.places(step * order.batch_size))
  [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  """

  num_rows: int
  batch_size: int
  seed: int

  def places(self, position: int) -> np.ndarray:
    """Places `[batch_size]` of the step that begins at a row position, counted from 0 over all epochs."""
    if self.batch_size >= self.num_rows:
      return np.arange(self.num_rows)
    wanted = np.arange(position, position + self.batch_size)
    if self.num_rows > SMALL:
      rows = _shuffled(self.num_rows, self.seed)
      return np.array([rows[place] for place in wanted])
    return np.array([_epoch(self.num_rows, self.seed, epoch)[place]
                     for epoch, place in zip(*map(np.ndarray.tolist, divmod(wanted, self.num_rows)), strict=True)])


@functools.lru_cache(maxsize=1024)  # runs share seeds, and follow each other through the epochs
def _epoch(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  """The places of one epoch; grain takes milliseconds for each place of a small data set, tried with 0.2.18."""
  rows = _shuffled(num_rows, seed)
  return np.array([rows[place] for place in range(epoch * num_rows, (epoch + 1) * num_rows)])


@functools.lru_cache(maxsize=64)  # the runs of a stage share few seeds
def _shuffled(num_rows: int, seed: int) -> grain.MapDataset[int]:
  """Places, each epoch in another order."""
  return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()


def small_batches(data: Mapping[str, TokenRows], batch_size: int, seeds: Sequence[int]) -> dict[str, list[Order]]:
  """`Stage.order`: an order a run for the data sets of more rows than a batch; the others are seen whole.

  Args:
    data: name -> token rows `[runs, rows, T]`.
    batch_size: rows of each data set in a step; 0: all of them.
    seeds: of the runs.
  """
  return {name: [Order(rows.tokens.shape[1], batch_size, seed) for seed in seeds] for name, rows in data.items()
          if 0 < batch_size < rows.tokens.shape[1]}
