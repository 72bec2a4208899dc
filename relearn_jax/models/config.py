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
  """Sizes and constants of one decoder; hashable, so it can be a static argument of `jax.jit`.

  `architecture` is a key of `architectures.ARCHITECTURES`.
  """

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
  rotary_dim: int | None = None  # leading dimensions of a head that are turned; None: all of them
  sliding_window: int | None = None  # tokens that a token sees, itself included; None: all before it


class Reader:
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


def read_rope(read: Reader, max_positions: int, *, partial: float = 1.0, scaled: bool = False
              ) -> tuple[float, RopeScaling | None, float]:
  """Base of the angles, their scaling, and the share of a head that is turned.

  Args:
    read: the configuration.
    max_positions: of the model; what its angles were scaled from, where the file does not state that.
    partial: the share where the file states none.
    scaled: whether the architecture may scale its angles (by Llama 3's form).

  Raises:
    InputError: a form of rotary embedding that is not computed here, or invalid constants.
  """
  # Where a constant is stated twice, transformers 5 decides: a `rope_scaling` that is not empty takes the place of
  # `rope_parameters`, and what the one that is read states goes before `rope_theta` and `partial_rotary_factor`
  # beside it. (transformers 4 knows `rope_theta` and `rope_scaling` alone.)
  old = read.values.get("rope_scaling") or not read.values.get("rope_parameters")
  field = "rope_scaling" if old else "rope_parameters"
  rope = read.values.get(field) or {}
  if not isinstance(rope, dict):
    raise read.fail(field, f"is {rope!r}", "expected an object or null")
  if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
    raise read.fail(f"{field}.{nested[0]}", "states angles of its own for a kind of layer, which is not supported",
                    "use a checkpoint whose layers are all alike")
  inner = Reader(rope, read.path, f"{field}.")
  theta = inner.get("rope_theta", float, read.get("rope_theta", float, 10000.0))
  share = inner.get("partial_rotary_factor", float, read.get("partial_rotary_factor", float, partial))
  if share > 1 or (share != 1 and partial == 1):
    raise inner.fail("partial_rotary_factor", f"is {share!r}, which is not supported",
                     "expected 1.0" if partial == 1 else "expected at most 1.0")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None, share
  if kind != "llama3" or not scaled:
    raise inner.fail("rope_type", f"is {kind!r}, which is not supported",
                     "use a checkpoint with rope_type 'default'" + (" or 'llama3'" if scaled else ""))
  low, high = inner.get("low_freq_factor", float), inner.get("high_freq_factor", float)
  if low >= high:
    raise inner.fail("low_freq_factor", f"is {low}", f"expected less than high_freq_factor={high}")
  return theta, RopeScaling(
      factor=inner.get("factor", float), low_freq_factor=low, high_freq_factor=high,
      original_max_positions=inner.get("original_max_position_embeddings", int, max_positions)), share


def read_decoder(read: Reader, architecture: str, *, fixed: dict[str, Any], norm_eps: tuple[str, float],
                 max_positions: int, partial_rotary: float = 1.0, scaled_rope: bool = False) -> ModelConfig:
  """The fields that all architectures state alike.

  Args:
    read: the configuration.
    architecture: as it stands in `ModelConfig`.
    fixed: field -> the only value of it that is computed here (also what its absence means).
    norm_eps: the field's name, and what its absence means.
    max_positions: what its absence means.
    partial_rotary: share of a head that is turned where the file states none; 1 allows no other.
    scaled_rope: whether the angles may be scaled.

  Raises:
    InputError: a missing or ill-typed field, or a setting that is not computed here.
  """
  for field, expected in fixed.items():
    if read.values.get(field, expected) != expected:
      raise read.fail(field, f"is {read.values[field]!r}, which is not supported", f"expected {expected!r}")
  if read.values.get("quantization_config"):
    raise read.fail("quantization_config", "is set, but quantized weights are not supported",
                    "use the checkpoint in float32, float16 or bfloat16")
  hidden, heads = read.get("hidden_size", int), read.get("num_attention_heads", int)
  kv_heads = read.get("num_key_value_heads", int, heads)
  if heads % kv_heads:
    raise read.fail("num_key_value_heads", f"is {kv_heads}", f"expected a divisor of num_attention_heads={heads}")
  if read.values.get("head_dim") is None and hidden % heads:
    raise read.fail("hidden_size", f"is {hidden}", f"expected a multiple of num_attention_heads={heads}, or a head_dim")
  head_dim = read.get("head_dim", int, hidden // heads)
  positions = read.get("max_position_embeddings", int, max_positions)
  theta, scaling, share = read_rope(read, positions, partial=partial_rotary, scaled=scaled_rope)
  rotary = int(head_dim * share)
  if rotary % 2 or not rotary:
    raise read.fail("head_dim", f"is {head_dim}", "expected an even number (rotary embedding turns pairs)")
  return ModelConfig(
      architecture=architecture,
      vocab_size=read.get("vocab_size", int),
      hidden_size=hidden,
      intermediate_size=read.get("intermediate_size", int),
      num_layers=read.get("num_hidden_layers", int),
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      max_positions=positions,
      norm_eps=read.get(norm_eps[0], float, norm_eps[1]),
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=read.get("tie_word_embeddings", bool, False),
      bos_id=read.get("bos_token_id", int, None),
      eos_ids=read.ids("eos_token_id"),
      rotary_dim=None if rotary == head_dim else rotary)


def write_decoder(config: ModelConfig, model_type: str, class_name: str, norm_eps: str) -> dict[str, Any]:
  """The fields that all architectures state alike, as transformers writes them."""
  share = {} if config.rotary_dim is None else {"partial_rotary_factor": config.rotary_dim / config.head_dim}
  scaled: dict[str, Any] | None = None
  if (scaling := config.rope_scaling) is not None:
    scaled = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
              "high_freq_factor": scaling.high_freq_factor,
              "original_max_position_embeddings": scaling.original_max_positions}
  # transformers 5 reads `rope_parameters`; transformers 4, and what was made for it, `rope_theta` and `rope_scaling`.
  rope = {"rope_type": "default", "rope_theta": config.rope_theta} | (scaled or {}) | share
  eos = list(config.eos_ids) if len(config.eos_ids) > 1 else (config.eos_ids or (None,))[0]
  return {
      "architectures": [class_name], "model_type": model_type, "vocab_size": config.vocab_size,
      "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
      "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
      "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
      "max_position_embeddings": config.max_positions, norm_eps: config.norm_eps, "rope_parameters": rope,
      "rope_theta": config.rope_theta, "rope_scaling": scaled, **share,
      "tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_id, "eos_token_id": eos}
