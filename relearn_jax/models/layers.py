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
from jaxtyping import Array, Bool, Float, Int

from relearn_jax.models.config import ModelConfig


class LayerCache(NamedTuple):
  """Keys and values that new tokens attend to, of one layer or stacked `[layers, ...]`.

  The prompt's part is only read; the part of the generated tokens is written at slot `step`.
  Keeping them apart keeps the prompt's out of the decode loop's carry.
  """

  prompt_k: Float[Array, "*layers B P K H"]
  prompt_v: Float[Array, "*layers B P K H"]
  new_k: Float[Array, "*layers B G K H"]
  new_v: Float[Array, "*layers B G K H"]


class Context(NamedTuple):
  """What every layer needs besides its input, equal for all layers."""

  sin: Float[Array, "B T 1 half"]
  cos: Float[Array, "B T 1 half"]
  mask: Bool[Array, "B T S"] | None  # None: causal over the tokens given
  step: Int[Array, ""] | int  # slot of the first new token in the cache


class Linear(nn.Module):
  """`x @ weight.T`, without bias; `weight` is `[features, in]`."""

  features: int
  axes: tuple[str, str]

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
    weight = self.param("weight", init, (self.features, x.shape[-1]), jnp.float32)
    return jnp.einsum("...d,fd->...f", x, weight.astype(x.dtype))


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


def rope_frequencies(config: ModelConfig) -> np.ndarray:
  """Angles per position, `[head_dim / 2]` radians, with Llama 3's scaling where configured."""
  # Rounded to fp32 step by step as transformers does: an angle's error is the frequency's times the
  # position, so at long positions one last bit shows in the logits.
  half = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
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
  """Turns the pairs (i, i + H/2) of each head by the position's angles (Su et al., 2021)."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * context.cos - second * context.sin, second * context.cos + first * context.sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
           mask: Bool[Array, "B T S"]) -> Float[Array, "B T N H"]:
  """Softmax attention, in fp32 between the two products; N / K query heads share a key-value head.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: true where a query may look; a query that may look nowhere sees the mean of all values.
  """
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores * (1.0 / math.sqrt(q.shape[-1])), jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  # Times the reciprocal, not divided: XLA makes that change in some programs and not in others,
  # which would let a result's last bit depend on the number of devices.
  weights = weights * (1.0 / jnp.sum(weights, axis=-1, keepdims=True))
  out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
  return out.reshape(q.shape)


class Attention(nn.Module):
  """Multi-head or grouped-query attention with rotary positions; softmax in fp32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    c = self.config
    heads = lambda name, n: Linear(n * c.head_dim, ("heads", "embed"), name=name)(x).reshape(
        *x.shape[:2], n, c.head_dim)
    q = apply_rope(heads("q", c.num_heads), context)
    k = apply_rope(heads("k", c.num_kv_heads), context)
    v = heads("v", c.num_kv_heads)
    if cache is None:
      out = attend(q, k, v, jnp.tri(q.shape[1], dtype=bool)[None])
    else:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.step, 1)
      k, v = write(cache.new_k, k), write(cache.new_v, v)
      assert context.mask is not None
      out = attend(q, jnp.concatenate([cache.prompt_k, k], 1), jnp.concatenate([cache.prompt_v, v], 1), context.mask)
    out = Linear(c.hidden_size, ("embed", "heads"), name="o")(out.reshape(*x.shape[:2], -1))
    return out, (k, v)


class GatedMLP(nn.Module):
  """SiLU-gated feed-forward layer (Shazeer, 2020)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    wide = lambda name: Linear(self.config.intermediate_size, ("mlp", "embed"), name=name)(x)
    return Linear(self.config.hidden_size, ("embed", "mlp"), name="down")(nn.silu(wide("gate")) * wide("up"))
