"""Logical axes of parameters and activations, and the mesh axes that they lie on: one table."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

# Logical axis -> mesh axes. Weights: fully sharded over `fsdp` by their hidden dimension, over
# `tensor` by their other one. Rows of a batch lie over `data` and `fsdp` both.
RULES: Mapping[str, tuple[str, ...]] = {
    "runs": ("runs",),
    "batch": ("data", "fsdp"),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
}


def spec(*axes: str | None) -> PartitionSpec:
  """The partition of an array whose dimensions have these logical axes (None: whole)."""
  parts = [RULES[axis] if axis is not None else () for axis in axes]
  return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def constrain(x: Array, *axes: str | None) -> Array:
  """Lays an activation out by the rules over the mesh in use; without one, or on one device, as it is.

  A dimension that the mesh does not divide (the rows of a small batch) stays whole.
  """
  if num_shards() == 1:
    return x
  sizes = jax.sharding.get_abstract_mesh().shape
  fits = lambda axis, size: axis is not None and size % math.prod(sizes.get(name, 1) for name in RULES[axis]) == 0
  return jax.lax.with_sharding_constraint(
      x, spec(*(axis if fits(axis, size) else None for axis, size in zip(axes, x.shape, strict=True))))


def num_shards() -> int:
  """Devices that share a batch's activations, in the mesh in use."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("tensor", 1)
