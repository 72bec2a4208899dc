"""Layers that the architectures share: linear, norm, rotary embedding, attention.

Weights keep the orientation of Hugging Face, `[out, in]`, so that loading and export rename and
stack but never transpose. Shape letters: B rows, T query positions, S key positions, D hidden,
F features, N query heads, K key-value heads, H head size.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from relearn_jax.models.attention import attend_parts, self_attention
from relearn_jax.models.config import ModelConfig
from relearn_jax.parallel.rules import constrain


class LayerCache(NamedTuple):
  """Keys and values that new tokens attend to, of one layer or stacked `[layers, ...]`, heads before positions.

  The prompt's part is only read; the part of the generated tokens is written at slot `step`.
  Keeping them apart keeps the prompt's out of the decode loop's carry.
  """

  prompt_k: Float[Array, "*layers B K P H"]
  prompt_v: Float[Array, "*layers B K P H"]
  new_k: Float[Array, "*layers B K G H"]
  new_v: Float[Array, "*layers B K G H"]


class Context(NamedTuple):
  """What every layer needs besides its input, equal for all layers."""

  sin: Float[Array, "B T 1 half"]
  cos: Float[Array, "B T 1 half"]
  mask: Bool[Array, "#B T S"] | None  # None: causal over the tokens given
  step: Int[Array, "*#B"] | int  # slot of the first new token in the cache, of all rows or of each
  segments: Int[Array, "B T"] | None = None  # where rows share a sequence, the row that each token is of


def shard_activations(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """Rows over the mesh's data axes; nothing without such a mesh."""
  return constrain(x, "batch", None, None)


class Linear(nn.Module):
  """`x @ weight.T + bias`, plus a low-rank adapter where the `lora` collection has one for it.

  Rows and positions of x are one axis: with them apart, XLA transposes what flows back into a copy of its own for the
  gradient of the weights, element by element on CPU.

  `weight` is `[features, in]`; the adapter is `a [rank, in]` and `b [features, rank]` (Hu et al., 2021),
  with the scale in `b` already (see `Model.apply`).
  """

  features: int
  axes: tuple[str, str]
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "BT D"]) -> Float[Array, "BT F"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
    weight = self.param("weight", init, (self.features, x.shape[-1]), jnp.float32)
    product = lambda x, weight: jnp.einsum("td,fd->tf", x, weight.astype(x.dtype))
    y = product(x, weight)
    if self.use_bias:
      zeros: Any = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[:1])
      y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)
    if self.has_variable("lora", "a"):
      adapter: Any = {name: self.get_variable("lora", name) for name in "ab"}
      y = y + product(product(x, adapter["a"]), adapter["b"])
    return y


class RMSNorm(nn.Module):
  """Root-mean-square norm, in fp32 (Zhang and Sennrich, 2019)."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    weight = self.param("weight", init, (x.shape[-1],), jnp.float32)
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (weight.astype(jnp.float32) * x32.astype(x.dtype)).astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer norm with a bias, in fp32 (Ba et al., 2016)."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    ones: Any = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    zeros: Any = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    weight = self.param("weight", ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", zeros, (x.shape[-1],), jnp.float32)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Angles per position, `[rotary_dim / 2]` radians, with Llama 3's scaling where configured."""
  # Rounded to fp32 step by step as transformers does: an angle's error is the frequency's times the
  # position, so at long positions one last bit shows in the logits.
  turned = config.rotary_dim or config.head_dim
  half = np.arange(0, turned, 2).astype(np.float32) / np.float32(turned)
  freqs = np.float32(1) / np.float32(config.rope_theta) ** half
  scaling = config.rope_scaling
  if scaling is not None:
    turns = scaling.original_max_positions * freqs / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    freqs = (1 - smooth) * freqs / scaling.factor + smooth * freqs
  return freqs.astype(np.float32)


def rope_tables(config: ModelConfig, positions: Int[Array, "B T"]
                ) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Sine and cosine of each position's angles, in fp32 at any compute precision."""
  angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
  return jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]


def apply_rope(x: Float[Array, "B T heads H"], context: Context) -> Float[Array, "B T heads H"]:
  """Turns the pairs (i, i + R/2) of each head's first R dimensions by the position's angles (Su et al., 2021)."""
  half = context.sin.shape[-1]
  first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
  turned = (first * context.cos - second * context.sin, second * context.cos + first * context.sin)
  return jnp.concatenate((*turned, *((rest,) if rest.shape[-1] else ())), axis=-1).astype(x.dtype)


def write_cache(cache: Float[Array, "B K G H"], new: Float[Array, "B T K H"], step: Int[Array, "*#B"] | int
                ) -> Float[Array, "B K G H"]:
  """The cache with the keys or values of new tokens from slot `step` on, of all rows or of each."""
  new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
  if jnp.ndim(step):
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, 1))(cache, new, step)
  return jax.lax.dynamic_update_slice_in_dim(cache, new, step, 2)


class Attention(nn.Module):
  """Multi-head or grouped-query attention with rotary positions; softmax in fp32.

  Takes and returns rows and positions as one axis, as `Linear` does; `context` says how many there are of each.
  """

  config: ModelConfig
  qkv_bias: bool = False
  out_bias: bool = False
  attention: str = "auto"  # see attention.ATTENTION

  @nn.compact
  def __call__(self, x: Float[Array, "BT D"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "BT D"], tuple[Array, Array]]:
    c = self.config

    def heads(name: str, n: int, axis: str) -> Float[Array, "B T heads H"]:
      flat = Linear(n * c.head_dim, (axis, "embed"), use_bias=self.qkv_bias, name=name)(x)
      return constrain(flat.reshape(*context.sin.shape[:2], n, c.head_dim), "batch", None, axis, None)
    q = apply_rope(heads("q", c.num_heads, "heads"), context)
    k = apply_rope(heads("k", c.num_kv_heads, "kv_heads"), context)
    v = heads("v", c.num_kv_heads, "kv_heads")
    if cache is None:
      q, k, v = (checkpoint_name(part, "qkv") for part in (q, k, v))
      out = self_attention(q, k, v, c.sliding_window, context.segments, self.attention)
      k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    else:
      k, v = write_cache(cache.new_k, k, context.step), write_cache(cache.new_v, v, context.step)
      assert context.mask is not None
      out = attend_parts(q, (cache.prompt_k, k), (cache.prompt_v, v), context.mask)
    out = checkpoint_name(out.reshape(len(x), -1), "attn_out")
    return Linear(c.hidden_size, ("embed", "heads"), use_bias=self.out_bias, name="o")(out), (k, v)


@jax.checkpoint
def silu_gated(gate: Float[Array, "BT F"], up: Float[Array, "BT F"]) -> Float[Array, "BT F"]:
  """silu(gate) up; the two alone are kept for the backward pass, since the steps between are soon done again."""
  return nn.silu(gate) * up


@jax.checkpoint
def gelu(wide: Float[Array, "BT F"]) -> Float[Array, "BT F"]:
  """GELU in its tanh form (Hendrycks and Gimpel, 2016), of which its argument alone is kept, as in `silu_gated`."""
  return nn.gelu(wide, approximate=True)


class GatedMLP(nn.Module):
  """SiLU-gated feed-forward layer (Shazeer, 2020), of rows and positions as one axis."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "BT D"]) -> Float[Array, "BT D"]:
    wide = lambda name: Linear(self.config.intermediate_size, ("mlp", "embed"), name=name)(x)
    hidden = constrain(silu_gated(wide("gate"), wide("up")), "batch", "mlp")
    return Linear(self.config.hidden_size, ("embed", "mlp"), name="down")(hidden)
