"""The table of architectures: one row each, used for reading, computing, loading and export."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from relearn_jax.models import llama, mistral, phi, qwen2
from relearn_jax.models.config import ModelConfig, Reader


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One family of decoders.

  Attributes:
    block: its layer, as `decoder.Decoder` scans it.
    norm: its norm, a module made from (epsilon, name=...).
    names: our leaf -> Hugging Face tensor; `{i}` is the layer, such leaves are stacked `[layers, ...]`.
    read: a parsed `config.json` -> configuration.
    write: configuration -> `config.json`.
  """

  block: type[nn.Module]
  norm: type[nn.Module]
  names: Mapping[str, str]
  read: Callable[[Reader], ModelConfig]
  write: Callable[[ModelConfig], dict[str, Any]]


# By `model_type` of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    module.__name__.rpartition(".")[2]: Architecture(module.Block, module.Norm, module.NAMES, module.read, module.write)
    for module in (llama, mistral, phi, qwen2)}


def parse_config(values: dict[str, Any], path: str) -> ModelConfig:
  """Reads a `config.json` (already parsed) into a `ModelConfig`.

  Args:
    values: the parsed JSON object.
    path: where it was read, for messages.

  Raises:
    InputError: an architecture that is not in the table, a missing or ill-typed field, or a setting
      that this implementation does not compute.
  """
  read = Reader(values, path)
  kind = read.get("model_type", str)
  if kind not in ARCHITECTURES:
    raise read.fail("model_type", f"is {kind!r}, which is not supported",
                    f"use a checkpoint of one of: {', '.join(ARCHITECTURES)}")
  return ARCHITECTURES[kind].read(read)
