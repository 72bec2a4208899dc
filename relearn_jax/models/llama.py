"""Llama 2 and 3.x (also the shape of many others): grouped-query attention and a gated MLP."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from relearn_jax.models.config import ModelConfig, Reader, read_decoder, write_decoder
from relearn_jax.models.layers import Attention, Context, GatedMLP, LayerCache, RMSNorm, shard_activations

Norm = RMSNorm

NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    "layers/input_norm/weight": "model.layers.{i}.input_layernorm.weight",
    "layers/attn/q/weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers/attn/k/weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers/attn/v/weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers/attn/o/weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers/mlp_norm/weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp/gate/weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers/mlp/up/weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers/mlp/down/weight": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm/weight": "model.norm.weight",
    "head/weight": "lm_head.weight",  # absent where the embedding is tied
}


class Block(nn.Module):
  """One pre-norm layer, in the form `nn.scan` wants: carry in, carry out, keys and values aside."""

  config: ModelConfig
  qkv_bias: bool = False
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    norm = lambda name, x: RMSNorm(self.config.norm_eps, name=name)(x).reshape(-1, x.shape[-1])
    attention = Attention(self.config, qkv_bias=self.qkv_bias, attention=self.attention, name="attn")
    mixed, kv = attention(norm("input_norm", x), cache, context)
    x = x + shard_activations(mixed.reshape(x.shape))
    wide = GatedMLP(self.config, name="mlp")(norm("mlp_norm", x))
    return x + shard_activations(wide.reshape(x.shape)), kv


def read(reader: Reader) -> ModelConfig:
  """From `config.json`."""
  fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
  return read_decoder(reader, "llama", fixed=fixed, norm_eps=("rms_norm_eps", 1e-6), max_positions=2048,
                      scaled_rope=True)


def write(config: ModelConfig) -> dict[str, Any]:
  """To `config.json`."""
  return write_decoder(config, "llama", "LlamaForCausalLM", "rms_norm_eps") | {
      "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
