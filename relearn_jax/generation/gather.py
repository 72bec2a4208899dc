"""Weights gathered over `fsdp` once, before tokens are decoded: in the loop, every new token would gather them anew."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.memory import told_memory
from relearn_jax.parallel.processes import everyone
from relearn_jax.parallel.rules import RULES, spec

SHARE = 4  # gathered weights take at most a fourth of a device's memory: shards, moments and caches lie there too
UNTOLD = 2**30  # bytes for them on devices that do not tell their memory, as CPUs, which have theirs in common
SPREAD = "embed"  # the logical axis that lies over `fsdp`


@functools.cache
def most_bytes() -> float:
  """What gathered weights may take of a device; the least of all processes, whose programs must be one."""
  told = told_memory()
  return min(everyone(UNTOLD if told is None else told / SHARE))


def gather_weights(model: Model, params: Params, *, stacked: bool = False) -> Params:
  """Parameters as reading prompts and decoding are to have them on the mesh in use.

  Where `fsdp` divides weights and a device has room for them (`most_bytes`), those that products read are whole over
  it, in compute precision, and divided over `tensor` as before. Otherwise, and of adapters and norms, what was passed
  in. To be called once for all that reads them, outside of any loop, in a jitted function or before it.

  Args:
    model: architecture.
    params: its parameters, which may have been through `split_layers`, or adapters alone.
    stacked: leaves have a leading `runs` axis.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if sizes.get("fsdp", 1) == 1:
    return params
  axes, lead = model.axes(), ("runs",) if stacked else ()

  def lies(path: Any) -> tuple[str, ...] | None:
    first, *rest = (str(key.key) for key in path)
    found = axes.get("/".join((first, *rest))) or axes.get("/".join(("layers", *rest)), ())[1:]  # one layer's own
    return (*lead, *found) if SPREAD in found else None

  def num_bytes(path: Any, leaf: Any) -> float:
    found = lies(path)
    parts = [sizes.get(name, 1) for axis in found or () if axis != SPREAD for name in RULES[axis]]
    return 0.0 if found is None else leaf.size * jnp.dtype(model.dtype).itemsize / math.prod(parts)

  def gather(path: Any, leaf: Any) -> Any:
    found = lies(path)
    if found is None:
      return leaf
    # Cast where it lies: without the first constraint the partitioner gathers fp32 numbers, and casts them then.
    cast = jax.lax.with_sharding_constraint(leaf.astype(model.dtype), spec(*found))
    return jax.lax.with_sharding_constraint(cast, spec(*(None if axis == SPREAD else axis for axis in found)))
  if sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(num_bytes, params))) > most_bytes():
    return params
  return jax.tree_util.tree_map_with_path(gather, params)
