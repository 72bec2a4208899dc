"""Mistral and what was trained from it (Zephyr-7b-beta): Llama's layer, with a sliding window."""

import dataclasses
from typing import Any

from relearn_jax.models import llama
from relearn_jax.models.config import ModelConfig, Reader, read_decoder, write_decoder

Norm = llama.Norm
Block = llama.Block
NAMES = llama.NAMES


def read(reader: Reader) -> ModelConfig:
  """From `config.json`; a file without `sliding_window` means 4096, one where it is null means none."""
  config = read_decoder(reader, "mistral", fixed={"hidden_act": "silu"}, norm_eps=("rms_norm_eps", 1e-6),
                        max_positions=131072)
  stated = "sliding_window" in reader.values
  return dataclasses.replace(config, sliding_window=reader.get("sliding_window", int, None if stated else 4096))


def write(config: ModelConfig) -> dict[str, Any]:
  """To `config.json`."""
  return write_decoder(config, "mistral", "MistralForCausalLM", "rms_norm_eps") | {
      "hidden_act": "silu", "sliding_window": config.sliding_window}
