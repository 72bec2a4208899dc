"""Copies of weights that are made once, before tokens are decoded: what the loop would do for every token otherwise.

Gathered: shards over `fsdp`, which each new token would gather anew. Split: each layer's weights and cache by
themselves, which a loop over stacked layers copies out of the stack at each new token.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax.models.decoder import Caches
from relearn_jax.models.layers import LayerCache
from relearn_jax.models.model import Model, Params, split_layers
from relearn_jax.parallel.memory import told_memory
from relearn_jax.parallel.processes import everyone
from relearn_jax.parallel.rules import RULES, spec

SHARE = 4  # copies take at most a fourth of a device's memory: shards, moments and caches lie there too
UNTOLD = 2**30  # bytes for them on devices that do not tell their memory, as CPUs, which have theirs in common
SPREAD = "embed"  # the logical axis that lies over `fsdp`, of all weights that products read


@functools.cache
def most_bytes() -> float:
  """What copies may take of a device; the least of all processes, whose programs must be one."""
  told = told_memory()
  return min(everyone(UNTOLD if told is None else told / SHARE))


def _sizes() -> dict[str, int]:
  """Axes of the mesh in use over which arrays lie that a program sees whole."""
  mesh = jax.sharding.get_abstract_mesh()
  return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def _lies(axes: Mapping[str, tuple[str, ...]], path: Any) -> tuple[str, ...] | None:
  """The logical axes of a leaf that products read, of one run; None of an adapter's or a norm's."""
  first, *rest = (str(key.key) for key in path)
  found = axes.get("/".join((first, *rest))) or axes.get("/".join(("layers", *rest)), ())[1:]  # one layer's own
  return found if SPREAD in found else None


def _copy_bytes(model: Model, params: Params, *, stacked: bool) -> float:
  """Bytes on a device of weights that products read, in compute precision and whole over `fsdp`."""
  sizes, axes, lead = _sizes(), model.axes(), ("runs",) if stacked else ()

  def num_bytes(path: Any, leaf: Any) -> float:
    found = _lies(axes, path)
    parts = [sizes.get(name, 1) for axis in (*lead, *(found or ())) if axis != SPREAD for name in RULES[axis]]
    return 0.0 if found is None else leaf.size * jnp.dtype(model.dtype).itemsize / math.prod(parts)
  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(num_bytes, params)))


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
  if _sizes().get("fsdp", 1) == 1 or _copy_bytes(model, params, stacked=stacked) > most_bytes():
    return params
  axes, lead = model.axes(), ("runs",) if stacked else ()

  def gather(path: Any, leaf: Any) -> Any:
    found = _lies(axes, path)
    if found is None:
      return leaf
    # Cast where it lies: without the first constraint the partitioner gathers fp32 numbers, and casts them then.
    cast = jax.lax.with_sharding_constraint(leaf.astype(model.dtype), spec(*lead, *found))
    return jax.lax.with_sharding_constraint(cast, spec(*lead, *(None if axis == SPREAD else axis for axis in found)))
  return jax.tree_util.tree_map_with_path(gather, params)


def split_weights(model: Model, params: Params, shared: Params | None, cache: Caches, *, stacked: bool = False
                  ) -> tuple[Params, Params | None, Caches]:
  """Parameters that have been through `gather_weights`, and a cache, as the loop over new tokens is to have them.

  Each layer's lie by themselves (`split_layers`), products' weights in compute precision, where a device has room for
  this copy, of the cache too: beside what was gathered, both take at most `most_bytes`. Otherwise what was passed in,
  as are weights that stay divided over `fsdp`, and such as have been split before.

  Args:
    model: architecture.
    params: its parameters, or adapters on `shared`.
    shared: a base that all runs share, or None.
    cache: keys and values of prompts.
    stacked: leaves of `params` and `cache` have a leading `runs` axis.
  """
  if "layers" not in params or isinstance(cache, list):
    return params, shared, cache
  sizes, base = _sizes(), (params, stacked) if shared is None else (shared, False)
  size = lambda axis: sizes.get(axis, 1)
  gathered = _copy_bytes(model, base[0], stacked=base[1]) if size("fsdp") > 1 else 0.0
  layers = _copy_bytes(model, {"layers": base[0]["layers"]}, stacked=base[1])
  adapters = _num_bytes(params.get("lora", {}) if shared is None else params)
  own = adapters + _num_bytes(cache) / (size("data") * size("fsdp") * size("tensor"))
  if gathered + layers + own / (size("runs") if stacked else 1) > most_bytes():
    return params, shared, cache
  axes = model.axes()

  def cast(path: Any, leaf: Any) -> Any:
    return leaf.astype(model.dtype) if path[0].key == "layers" and _lies(axes, path) else leaf

  def apart(tree: Params) -> Params:
    return split_layers(jax.tree_util.tree_map_with_path(cast, tree))
  over_runs = jax.vmap if stacked else lambda function: function
  return over_runs(apart)(params), None if shared is None else apart(shared), over_runs(_unstack)(cache)


def _unstack(cache: LayerCache) -> list[LayerCache]:
  """A stacked cache as one for each layer."""
  return [jax.tree.map(lambda leaf, i=i: leaf[i], cache) for i in range(cache.prompt_k.shape[0])]


def _num_bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
