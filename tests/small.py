"""A random Llama with a word tokenizer, scaled so that its greedy answers differ; and where real checkpoints lie."""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import pytest

from relearn_jax.audit.pretrained import word_tokenizer
from relearn_jax.cases.names import VOCABULARY
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model, Params

CONFIG = ModelConfig(
    architecture="llama", vocab_size=162, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_positions=160, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
    tie_embeddings=True, bos_id=1, eos_ids=(2,))
MODEL = Model(CONFIG)


@functools.cache
def params(seed: int = 0) -> Params:
  """Weights far from zero, so that every token depends on every token before it."""
  scale = lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else leaf * 12
  return jax.tree_util.tree_map_with_path(scale, MODEL.init(jax.random.key(seed)))


def make_tokenizer() -> Any:
  """A token a name, as the names case has it."""
  return word_tokenizer(VOCABULARY)


def write_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """The random Llama as a Hugging Face folder with the names tokenizer."""
  export(params(), MODEL, folder, tokenizer=make_tokenizer())
  return folder


def shared(path: str) -> pathlib.Path:
  """A real checkpoint or data file beside the repository; skips the test where there is none."""
  root = os.environ.get("RELEARN_SHARED") or pathlib.Path(__file__).resolve().parents[2] / "shared"
  found = pathlib.Path(root) / path
  if not found.exists():
    pytest.skip(f"{path} is not at hand (set RELEARN_SHARED)")
  return found


def write_lines(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """JSON lines."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
