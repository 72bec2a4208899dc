"""The mesh, and how stacked runs lie on it.

Every array of a stacked state has a leading `runs` axis, which is the only one sharded here: one
run never crosses a device, so its numbers do not depend on how many devices there are. Runs are
padded to a multiple of the devices by repeating the first ones; the copies are dropped on return.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")
RUNS = "runs"


def runs_mesh(devices: int | None = None) -> Mesh:
  """A one-axis mesh over all devices, or over the first so many."""
  use = jax.devices() if devices is None else jax.devices()[:devices]
  return jax.make_mesh((len(use),), (RUNS,), axis_types=(AxisType.Auto,), devices=use)


def runs_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over the devices, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(RUNS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def padded_runs(num_runs: int, mesh: Mesh) -> int:
  """`num_runs` rounded up to a multiple of the devices."""
  return -(-num_runs // mesh.size) * mesh.size


def pad_runs(tree: Tree, size: int) -> Tree:
  """Lengthens every leaf `[runs, ...]` to `size` runs by repeating the leading ones."""
  def pad(leaf: Any) -> Any:
    index = np.arange(size) % leaf.shape[0]
    return leaf if leaf.shape[0] == size else leaf[index]
  return jax.tree.map(pad, tree)


def shard_runs(tree: Tree, mesh: Mesh) -> Tree:
  """Pads the runs and lays them out over the devices; every process passes the whole arrays."""
  return jax.device_put(pad_runs(tree, padded_runs(jax.tree.leaves(tree)[0].shape[0], mesh)), runs_sharding(mesh))


def map_runs(function: Callable[[Any, Any], Any], mesh: Mesh, stacked: Callable[[Any, Any], Any] | None = None
             ) -> Callable[[Any, Any], Any]:
  """Applies a function of one run to every run; to be called under `jax.jit`.

  Each device works through its own runs: all at once on accelerators, one after the other on CPU,
  where that is faster, needs the memory of one run, and compiles to the same arithmetic for a run
  however many there are, so that results are equal to the bit on any number of devices.

  Args:
    function: (one run's tree, what all runs share) -> tree.
    mesh: where the runs lie.
    stacked: what accelerators call instead of `jax.vmap(function)`, on `[runs, ...]` of a device.

  Returns:
    (tree of `[runs, ...]`, padded and sharded; shared tree) -> tree of `[runs, ...]`.
  """
  def device(trees: Any, shared: Any) -> Any:
    if mesh.devices.flat[0].platform == "cpu":
      return jax.lax.map(lambda tree: function(tree, shared), trees)
    return (stacked or jax.vmap(function, in_axes=(0, None)))(trees, shared)
  return jax.shard_map(device, mesh=mesh, in_specs=(PartitionSpec(RUNS), PartitionSpec()),
                       out_specs=PartitionSpec(RUNS), check_vma=False)


def to_host(tree: Tree, num_runs: int | None = None) -> Tree:
  """Numpy copies on every process, with the padding of the runs axis dropped."""
  def fetch(leaf: jax.Array) -> np.ndarray:
    if not leaf.is_fully_addressable:
      from jax.experimental import multihost_utils
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)[:num_runs]
  return jax.tree.map(fetch, tree)


def repeat_runs(tree: Tree, num_runs: int, mesh: Mesh) -> Tree:
  """The same parameters `num_runs` times (padded), laid out over the devices."""
  size = padded_runs(num_runs, mesh)
  spread = jax.jit(lambda t: jax.tree.map(lambda leaf: jnp.repeat(leaf[None], size, 0), t),
                   out_shardings=runs_sharding(mesh))
  return spread(jax.device_put(tree, replicated(mesh)))
