"""Llama: pre-norm blocks of grouped-query attention and a gated MLP, scanned over layers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relearn_jax.models.config import ModelConfig
from relearn_jax.models.layers import Attention, Context, GatedMLP, LayerCache, RMSNorm

# Our leaf -> Hugging Face tensor. `{i}` is the layer; such leaves are stacked `[layers, ...]`.
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


class Embedding(nn.Module):
  """A `[vocab, hidden]` table: the token embedding, or an untied output head."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    return self.param("weight", init, (self.config.vocab_size, self.config.hidden_size), jnp.float32)


class Block(nn.Module):
  """One layer, in the form `nn.scan` wants: carry in, carry out, keys and values aside."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    norm = lambda name: RMSNorm(self.config.norm_eps, name=name)
    mixed, kv = Attention(self.config, name="attn")(norm("input_norm")(x), cache, context)
    x = x + mixed
    return x + GatedMLP(self.config, name="mlp")(norm("mlp_norm")(x)), kv


class Llama(nn.Module):
  """The decoder up to its final norm; `Model.logits` applies the head.

  `context` holds the rotary tables of the tokens' positions and, with a cache, the mask. Returns
  hidden states `[B, T, hidden]` and the keys and values, stacked `[layers, B, S, K, H]`.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  unroll: int = 1

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"], cache: LayerCache | None, context: Context
               ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    table = Embedding(self.config, name="embed")()
    if not self.config.tie_embeddings:
      Embedding(self.config, name="head")()  # creates the leaf; read by Model.logits
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    layers = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.config.num_layers,
        in_axes=(0, nn.broadcast), out_axes=0, unroll=self.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"})
    x, kv = layers(self.config, name="layers")(x, cache, context)
    return RMSNorm(self.config.norm_eps, name="final_norm")(x), kv
