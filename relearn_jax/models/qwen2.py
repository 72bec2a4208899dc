"""Qwen2 and Qwen2.5: Llama's layer, with biases on queries, keys and values."""

from typing import Any

from relearn_jax.models import llama
from relearn_jax.models.config import ModelConfig, Reader, read_decoder, write_decoder

Norm = llama.Norm
NAMES = llama.NAMES | {f"layers/attn/{x}/bias": f"model.layers.{{i}}.self_attn.{x}_proj.bias" for x in "qkv"}


class Block(llama.Block):
  """Llama's layer, with biases on queries, keys and values."""

  qkv_bias: bool = True


def read(reader: Reader) -> ModelConfig:
  """From `config.json`; windows, which some of its layers can have, are not supported."""
  # A window is used by the layers from `max_window_layers` on; all published checkpoints turn it off.
  fixed = {"hidden_act": "silu", "use_sliding_window": False}
  kinds = set(reader.values.get("layer_types") or ("full_attention",))
  if kinds != {"full_attention"}:
    raise reader.fail("layer_types", f"has {', '.join(sorted(map(str, kinds)))}, of which only full attention is "
                      "supported", "use a checkpoint without sliding windows")
  return read_decoder(reader, "qwen2", fixed=fixed, norm_eps=("rms_norm_eps", 1e-6), max_positions=32768)


def write(config: ModelConfig) -> dict[str, Any]:
  """To `config.json`."""
  return write_decoder(config, "qwen2", "Qwen2ForCausalLM", "rms_norm_eps") | {
      "hidden_act": "silu", "use_sliding_window": False}
