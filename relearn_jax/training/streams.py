"""Rows of prepared data sets on the mesh, step by step: each process reads what its own devices hold."""

from collections.abc import Iterable, Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from relearn_jax.data.order import Order
from relearn_jax.data.prepared import PreparedRows
from relearn_jax.data.rows import Encoded, pad_picked
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.mesh import padded_runs, replicated, rows_sharding

EMPTY = Encoded([])
AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # steps that are read before they are taken
Index = tuple[slice, ...]


class Held:
  """Which rows of a batch `[runs, B]` the devices of a process hold.

  Attributes:
    runs, rows: their places, ascending; every run with every row.
  """

  def __init__(self, parts: Iterable[Index], shape: tuple[int, int], num_runs: int):
    """
    Args:
      parts: of the batch, one a device.
      shape: of the batch, with the padding of runs and rows.
      num_runs: without padding, which repeats the first ones.
    """
    self._num_runs, self._shape = num_runs, shape
    runs, rows = set[int](), set[int]()
    for part in parts:
      runs |= {run % num_runs for run in range(*part[0].indices(shape[0]))}
      rows |= set(range(*part[1].indices(shape[1])))
    self.runs, self.rows = np.array(sorted(runs)), np.array(sorted(rows))

  def part(self, leaf: np.ndarray, index: Index) -> np.ndarray:
    """A device's part of the batch, from what is held, `[runs, rows, ...]`."""
    runs = np.arange(self._shape[0])[index[0]] % self._num_runs
    at = np.searchsorted(self.runs, runs), np.searchsorted(self.rows, np.arange(self._shape[1])[index[1]])
    return leaf[np.ix_(*at)][(slice(None), slice(None), *index[2:])]


class Stream:
  """The steps of a data set that is not held, in the order of its rows, read ahead.

  Which rows a step sees does not depend on processes and devices: each process finds the places of the whole batch,
  and reads those of its own rows.
  """

  def __init__(self, rows: PreparedRows, orders: Sequence[Order], mesh: Mesh, unit: int, num_steps: int):
    """
    Args:
      rows: of the data set.
      orders: of each run, with batches of one size.
      mesh: where they lie.
      unit: the rows of a step are filled up to a multiple of it, with empty ones.
      num_steps: of the stage; nothing is read beyond them.
    """
    self._rows, self._orders, self._num_steps = rows, orders, num_steps
    self.size = orders[0].batch_size
    self._shape = padded_runs(len(orders), mesh), -(-self.size // unit) * unit
    self._sharding = rows_sharding(mesh)
    parts = self._sharding.addressable_devices_indices_map(self._shape).values()
    self._held = Held([part for part in parts if part is not None], self._shape, len(orders))
    self._steps: Iterator[TokenRows] | None = None
    self._all: TokenRows | None = None

    def count(mask: Array) -> Int[Array, ""]:
      mask = mask[:len(orders)]  # what was padded repeats others
      return jnp.max(jnp.where(mask > 0, jnp.arange(1, mask.shape[-1] + 1), 0), -1).sum()
    self._count = jax.jit(count, out_shardings=replicated(mesh))

  def take(self, position: int) -> TokenRows:
    """The rows of the next step on the mesh, `[runs, B, T]`; `position`, in rows, is asked for at the first alone."""
    if self.size >= len(self._rows):  # every step sees them all, in the order of the file
      if self._all is None:
        self._all = self.lay(self.read(0))
      return self._all
    if self._steps is None:
      steps = grain.MapDataset.range(position // self.size, self._num_steps).map(self.read)
      self._steps = iter(steps.to_iter_dataset(AHEAD))
    return self.lay(next(self._steps))

  def read(self, step: int) -> TokenRows:
    """What this process holds of a step, counted from 0, on the host."""
    places = np.full((len(self._held.runs), self._shape[1]), -1)
    for run, filled in zip(self._held.runs, places, strict=True):
      filled[:self.size] = self._orders[run].places(step * self.size)
    own = places[:, self._held.rows]
    wanted = np.unique(own[own >= 0])
    found = {-1: EMPTY} | dict(zip(wanted.tolist(), self._rows.read(wanted), strict=True))
    counts = self._rows.about.counts
    padded = pad_picked([found[place] for place in own.ravel().tolist()], counts.longest, counts.most_counted)
    return jax.tree.map(lambda leaf: leaf.reshape(*own.shape, -1), padded)

  def lay(self, own: TokenRows) -> TokenRows:
    """The whole step on the mesh, to which each process gives what it holds."""
    def lay(leaf: np.ndarray) -> jax.Array:
      def part(index: Index | None) -> np.ndarray:
        assert index is not None
        return self._held.part(leaf, index)
      return jax.make_array_from_callback((*self._shape, leaf.shape[-1]), self._sharding, part)
    return jax.tree.map(lay, own)

  def count_tokens(self, rows: TokenRows) -> tuple[jax.Array, int]:
    """Real tokens of all runs in a step, on the mesh, since no process has all rows; and padded ones."""
    return self._count(rows.mask), len(self._orders) * int(np.prod(self._shape[1:])) * rows.tokens.shape[-1]

  def close(self) -> None:
    """Ends the reading ahead."""
    if self._steps is not None:
      self._steps.close()  # type: ignore[attr-defined]
