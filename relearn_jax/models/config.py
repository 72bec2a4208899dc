"""Architecture of a decoder, as its Hugging Face `config.json` states it."""

import dataclasses
import difflib
import math
from typing import Any

from relearn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's frequency scaling: low frequencies are divided by `factor`, high ones kept.

  Between the two, the factor is interpolated (Llama 3 herd of models, 2024; the fields are those
  of `rope_parameters` in a Hugging Face configuration with `rope_type` "llama3").
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and constants of one decoder; hashable, so it can be a static argument of `jax.jit`."""

  architecture: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  tie_embeddings: bool
  bos_id: int | None
  eos_ids: tuple[int, ...]


class _Reader:
  """Takes typed fields out of a parsed `config.json`, naming file and field when one is wrong."""

  def __init__(self, values: dict[str, Any], path: str, prefix: str = ""):
    self.values, self.path, self.prefix = values, path, prefix

  def fail(self, field: str, problem: str, mend: str) -> InputError:
    return InputError(problem, file=self.path, field=self.prefix + field, mend=mend)

  def get(self, field: str, kind: type, default: Any = dataclasses.MISSING) -> Any:
    value: Any = self.values.get(field)
    if value is None:
      if default is dataclasses.MISSING:
        near = difflib.get_close_matches(field, self.values, 1)
        hint = f" (there is `{near[0]}`)" if near else ""
        problem = "is null" if field in self.values else f"is missing{hint}"
        raise self.fail(field, problem, f"state the model's {field}")
      return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
      raise self.fail(field, f"is {value!r}", f"expected {kind.__name__}")
    number: Any = value
    # json reads NaN and Infinity too.
    if kind in (int, float) and field != "bos_token_id" and not (number > 0 and math.isfinite(number)):
      raise self.fail(field, f"is {value!r}", "expected a positive number")
    return value

  def ids(self, field: str) -> tuple[int, ...]:
    """Token ids, written as one id, as a list of them or as null."""
    value = self.values.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
      raise self.fail(field, f"is {value!r}", "expected a token id, a list of token ids or null")
    return tuple(ids)


def _rope(read: _Reader) -> tuple[float, RopeScaling | None]:
  # transformers 5 writes one `rope_parameters`; older checkpoints have `rope_theta` beside a
  # `rope_scaling` that is null for the plain form.
  field = "rope_parameters" if read.values.get("rope_parameters") else "rope_scaling"
  rope = read.values.get(field) or {}
  if not isinstance(rope, dict):
    raise read.fail(field, f"is {rope!r}", "expected an object or null")
  inner = _Reader(rope, read.path, f"{field}.")
  theta = inner.get("rope_theta", float, read.get("rope_theta", float, 10000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if inner.get("partial_rotary_factor", float, 1.0) != 1.0:
    raise inner.fail("partial_rotary_factor", f"is {rope['partial_rotary_factor']!r}, which is not supported",
                     "expected 1.0")
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise inner.fail("rope_type", f"is {kind!r}, which is not supported",
                     "use a checkpoint with rope_type 'default' or 'llama3'")
  low, high = inner.get("low_freq_factor", float), inner.get("high_freq_factor", float)
  if low >= high:
    raise inner.fail("low_freq_factor", f"is {low}", f"expected less than high_freq_factor={high}")
  return theta, RopeScaling(
      factor=inner.get("factor", float), low_freq_factor=low, high_freq_factor=high,
      original_max_positions=inner.get("original_max_position_embeddings", int))


def parse_config(values: dict[str, Any], path: str) -> ModelConfig:
  """Reads a Llama `config.json` (already parsed) into a `ModelConfig`.

  Args:
    values: the parsed JSON object.
    path: where it was read, for messages.

  Raises:
    InputError: another architecture, a missing or ill-typed field, or a setting of the Llama
      family that this implementation does not compute.
  """
  read = _Reader(values, path)
  kind = read.get("model_type", str)
  if kind != "llama":
    raise read.fail("model_type", f"is {kind!r}, which is not supported", "use a Llama checkpoint (model_type 'llama')")
  for field, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
    if values.get(field, expected) != expected:
      raise read.fail(field, f"is {values[field]!r}, which is not supported", f"expected {expected!r}")
  if values.get("quantization_config"):
    raise read.fail("quantization_config", "is set, but quantized weights are not supported",
                    "use the checkpoint in float32, float16 or bfloat16")
  hidden, heads = read.get("hidden_size", int), read.get("num_attention_heads", int)
  kv_heads = read.get("num_key_value_heads", int, heads)
  if heads % kv_heads:
    raise read.fail("num_key_value_heads", f"is {kv_heads}", f"expected a divisor of num_attention_heads={heads}")
  if values.get("head_dim") is None and hidden % heads:
    raise read.fail("hidden_size", f"is {hidden}", f"expected a multiple of num_attention_heads={heads}, or a head_dim")
  head_dim = read.get("head_dim", int, hidden // heads)
  if head_dim % 2:
    raise read.fail("head_dim", f"is {head_dim}", "expected an even number (rotary embedding turns pairs)")
  theta, scaling = _rope(read)
  return ModelConfig(
      architecture="llama",
      vocab_size=read.get("vocab_size", int),
      hidden_size=hidden,
      intermediate_size=read.get("intermediate_size", int),
      num_layers=read.get("num_hidden_layers", int),
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      max_positions=read.get("max_position_embeddings", int, 2048),
      norm_eps=read.get("rms_norm_eps", float, 1e-6),
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=read.get("tie_word_embeddings", bool, False),
      bos_id=read.get("bos_token_id", int, None),
      eos_ids=read.ids("eos_token_id"))
