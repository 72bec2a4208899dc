"""Phi-1 and Phi-1.5: attention and MLP side by side on one norm, biases everywhere, part of a head turned."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from relearn_jax.models.config import ModelConfig, Reader, read_decoder, write_decoder
from relearn_jax.models.layers import Attention, Context, LayerCache, LayerNorm, Linear, gelu, shard_activations
from relearn_jax.parallel.rules import constrain

Norm = LayerNorm


def _both(leaf: str, name: str) -> dict[str, str]:
  return {f"{leaf}/{part}": f"{name}.{part}" for part in ("weight", "bias")}


NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    **_both("layers/input_norm", "model.layers.{i}.input_layernorm"),
    **_both("layers/attn/q", "model.layers.{i}.self_attn.q_proj"),
    **_both("layers/attn/k", "model.layers.{i}.self_attn.k_proj"),
    **_both("layers/attn/v", "model.layers.{i}.self_attn.v_proj"),
    **_both("layers/attn/o", "model.layers.{i}.self_attn.dense"),
    **_both("layers/mlp/fc1", "model.layers.{i}.mlp.fc1"),
    **_both("layers/mlp/fc2", "model.layers.{i}.mlp.fc2"),
    **_both("final_norm", "model.final_layernorm"),
    **_both("head", "lm_head"),
}


class MLP(nn.Module):
  """Two linear layers with GELU in its tanh form between them, of rows and positions as one axis."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "BT D"]) -> Float[Array, "BT D"]:
    wide = Linear(self.config.intermediate_size, ("mlp", "embed"), use_bias=True, name="fc1")(x)
    wide = constrain(gelu(wide), "batch", "mlp")
    return Linear(self.config.hidden_size, ("embed", "mlp"), use_bias=True, name="fc2")(wide)


class Block(nn.Module):
  """One parallel layer, in the form `nn.scan` wants."""

  config: ModelConfig
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    normed = LayerNorm(self.config.norm_eps, name="input_norm")(x).reshape(-1, x.shape[-1])
    attention = Attention(self.config, qkv_bias=True, out_bias=True, attention=self.attention, name="attn")
    mixed, kv = attention(normed, cache, context)
    added = mixed + MLP(self.config, name="mlp")(normed)
    return shard_activations(added.reshape(x.shape)) + x, kv


def read(reader: Reader) -> ModelConfig:
  """From `config.json`."""
  fixed = {"hidden_act": "gelu_new", "qk_layernorm": False, "tie_word_embeddings": False}
  return read_decoder(reader, "phi", fixed=fixed, norm_eps=("layer_norm_eps", 1e-5), max_positions=2048,
                      partial_rotary=0.5)


def write(config: ModelConfig) -> dict[str, Any]:
  """To `config.json`."""
  values = write_decoder(config, "phi", "PhiForCausalLM", "layer_norm_eps")
  # Stated always: left out, it would mean a half.
  share = (config.rotary_dim or config.head_dim) / config.head_dim
  values["rope_parameters"] |= {"partial_rotary_factor": share}
  return values | {"partial_rotary_factor": share, "hidden_act": "gelu_new", "qk_layernorm": False}
