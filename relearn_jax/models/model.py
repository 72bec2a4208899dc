"""A decoder as pure functions over a plain dictionary of parameters."""

import dataclasses
import hashlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from relearn_jax.models.config import ModelConfig
from relearn_jax.models.layers import Context, LayerCache, rope_tables
from relearn_jax.models.llama import NAMES as LLAMA_NAMES
from relearn_jax.models.llama import Llama

Params = dict[str, Any]

# One row an architecture: its module and its table of Hugging Face names.
ARCHITECTURES = {"llama": (Llama, LLAMA_NAMES)}


@dataclasses.dataclass(frozen=True)
class Model:
  """Pure functions of one architecture; hashable, so a jitted function may close over it.

  Attributes:
    config: sizes and constants.
    dtype: compute precision; parameters keep their own.
    unroll: layers per iteration of the scan over layers (more: faster on CPU, longer to compile).
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  unroll: int = 1

  @property
  def module(self) -> nn.Module:
    """The Linen module."""
    return ARCHITECTURES[self.config.architecture][0](self.config, self.dtype, self.unroll)

  @property
  def names(self) -> dict[str, str]:
    """Leaf path -> Hugging Face tensor name, for the leaves that this configuration has."""
    table = ARCHITECTURES[self.config.architecture][1]
    return {leaf: name for leaf, name in table.items() if leaf != "head/weight" or not self.config.tie_embeddings}

  def init(self, key: Array) -> Params:
    """Random fp32 parameters: normal(0, 0.02) matrices, unit norms."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    context = Context(*rope_tables(self.config, jnp.arange(2)[None]), None, 0)
    return nn.meta.unbox(self.module.init(key, tokens, None, context)["params"])

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters, without computing them and without touching a device."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))  # a key made outside would start the backend

  def hidden(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Final hidden states of right-padded rows; padding never reaches a real position."""
    return self.prefill(params, tokens)[0]

  def prefill(self, params: Params, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    """As `hidden`, with the keys and values `[layers, B, T, K, H]` to start a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    context = Context(*rope_tables(self.config, positions), None, 0)
    out: Any = self.module.apply({"params": params}, tokens, None, context)
    return out

  def extend(self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: LayerCache,
             mask: Bool[Array, "B T S"], step: Int[Array, ""] | int) -> tuple[Float[Array, "B T D"], LayerCache]:
    """Hidden states of tokens that follow a cached prompt, and the cache with them written.

    Args:
      params: parameters.
      tokens: new tokens.
      positions: their positions in the whole sequence.
      cache: prompt and new keys and values, stacked over layers.
      mask: what each new token may see of [prompt slots | new slots].
      step: slot of the first of the new tokens.
    """
    context = Context(*rope_tables(self.config, positions), mask, step)
    out: Any = self.module.apply({"params": params}, tokens, cache, context)
    hidden, (k, v) = out
    return hidden, cache._replace(new_k=k, new_v=v)

  def head(self, params: Params) -> Float[Array, "V D"]:
    """The output head: its own matrix or the tied embedding."""
    return params["embed" if self.config.tie_embeddings else "head"]["weight"]

  def logits(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Logits in fp32, accumulated in fp32 at any compute precision."""
    head = self.head(params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def flatten(params: Params) -> dict[str, Any]:
  """Leaves by path, for example "layers/attn/q/weight"."""
  return flatten_dict(params, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
  """The inverse of `flatten`."""
  return unflatten_dict(leaves, sep="/")


def fingerprint(params: Params) -> str:
  """SHA-256 over the leaves' paths, shapes, dtypes and bytes, on any device, in hexadecimal."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{path} {array.shape} {array.dtype}".encode())
    digest.update(array.data if array.dtype.kind == "f" else array.tobytes())
  return digest.hexdigest()
