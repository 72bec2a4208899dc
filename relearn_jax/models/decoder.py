"""What all architectures share: token embedding, layers scanned, final norm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from relearn_jax.models.architectures import ARCHITECTURES
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.layers import Context, LayerCache, shard_activations
from relearn_jax.parallel.rules import constrain

LAYER = "layer_{}"  # name of one whose parameters are its own
Caches = LayerCache | list[LayerCache]  # stacked `[layers, ...]`, or one a layer
_SAVED = ("qkv", "attn_out")  # names that layers.Attention gives
# What is kept of a layer for its backward pass; everything else is computed again.
REMAT: dict[str, Any] = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of products with weights
    "attn": jax.checkpoint_policies.save_only_these_names(*_SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,  # only each layer's input
}


class Embedding(nn.Module):
  """A `[vocab, hidden]` table: the token embedding, or an untied output head."""

  config: ModelConfig
  use_bias: bool = False

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    if self.use_bias:
      zeros: Any = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
      self.param("bias", zeros, (self.config.vocab_size,), jnp.float32)
    return self.param("weight", init, (self.config.vocab_size, self.config.hidden_size), jnp.float32)


class Decoder(nn.Module):
  """The decoder up to its final norm; `Model.logits` applies the head.

  `context` holds the rotary tables of the tokens' positions and, with a cache, the mask. Returns
  hidden states `[B, T, hidden]` and the keys and values, stacked `[layers, B, K, S, H]`. With `stop`, only that many
  layers are run, of which parameters must hold just these, and no norm follows. With `split`, every layer has
  parameters and a cache of its own, and keys and values are a list.
  """

  config: ModelConfig
  dtype: DTypeLike = jnp.float32
  unroll: int = 1
  remat: str = "none"
  attention: str = "auto"
  stop: int | None = None
  split: bool = False

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"], cache: Caches | None, context: Context
               ) -> tuple[Float[Array, "B T D"], Any]:
    architecture = ARCHITECTURES[self.config.architecture]
    table = Embedding(self.config, name="embed")()
    if not self.config.tie_embeddings:  # creates the leaves; read by Model.head
      Embedding(self.config, use_bias="head/bias" in architecture.names, name="head")()
    table = constrain(table, "vocab", None)  # gathered over fsdp once, before rows are picked from it
    x = shard_activations(jnp.take(table, tokens, axis=0).astype(self.dtype))
    block: Any = architecture.block
    if REMAT[self.remat] is not None:
      block = nn.remat(block, policy=REMAT[self.remat], prevent_cse=False)
    if self.split:
      kv = []
      for number, each in enumerate(cache or [None] * self.config.num_layers):
        layer = block(self.config, attention=self.attention, name=LAYER.format(number))
        x, one = layer(x, each, context)
        kv.append(one)
    else:
      layers = nn.scan(
          block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True},
          length=self.stop or self.config.num_layers, in_axes=(0, nn.broadcast), out_axes=0, unroll=self.unroll,
          metadata_params={nn.PARTITION_NAME: "layers"})
      x, kv = layers(self.config, attention=self.attention, name="layers")(x, cache, context)
    if self.stop is not None:
      return x, kv
    return architecture.norm(self.config.norm_eps, name="final_norm")(x), kv  # type: ignore[call-arg]
