"""A checkpoint small enough to damage in every way, and the assertion that damage is named well."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from relearn_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12, "hidden_size": 8,
    "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """Random tensors under the names of `CONFIG`'s checkpoint."""
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8), "model.norm.weight": (8,)}
  for i in range(2):
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
        "input_layernorm": (8,), "post_attention_layernorm": (8,), "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (10, 8), "mlp.up_proj": (10, 8), "mlp.down_proj": (8, 10)}.items()}
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> pathlib.Path:
  """A checkpoint folder: one file of `tensors` (good ones by default), `CONFIG` with `fields` changed."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", CONFIG | fields)
  save_file(weights() if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return folder


def write_sharded(folder: pathlib.Path) -> pathlib.Path:
  """The good checkpoint in two shards and an index."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", CONFIG)
  rows = list(weights().items())
  weight_map: dict[str, str] = {}
  for number, part in enumerate((rows[:9], rows[9:]), 1):
    file = f"model-{number:05d}-of-00002.safetensors"
    save_file(dict(part), folder / file, metadata={"format": "pt"})
    weight_map |= {name: file for name, _ in part}
  write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
  return folder


def write_tokenizer(folder: pathlib.Path, size: int, added: int = 0) -> None:
  """A word-level tokenizer of `size` words and `added` tokens beyond them."""
  vocab = {"<unk>": 0} | {f"w{i}": i for i in range(1, size)} if size else {}
  special = [{"id": size + i, "content": f"<extra{i}>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in range(added)]
  write_json(folder / "tokenizer.json", {
      "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
      "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
      "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}})
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: pathlib.Path, values: Any) -> None:
  """One JSON file."""
  path.write_text(json.dumps(values))


def header_of(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
  """Header and tensor bytes of a safetensors file."""
  content = path.read_bytes()
  end = 8 + int.from_bytes(content[:8], "little")
  return json.loads(content[8:end]), content[end:]


def write_header(path: pathlib.Path, header: Any, data: bytes) -> None:
  """A safetensors file with any header."""
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@contextlib.contextmanager
def refuses(problem: str, *, file: Any, field: str | None = None, mend: str) -> Iterator[None]:
  """Asserts an `InputError` whose message names the problem, the file, the field and the mend."""
  with pytest.raises(InputError) as caught:
    yield
  error, message = caught.value, str(caught.value)
  assert str(error.file) == str(file) and message.startswith(f"{file}: "), message
  assert error.field == field and (field is None or f"`{field}`" in message), message
  assert problem in message, message
  assert mend in message[message.index(problem):], message
