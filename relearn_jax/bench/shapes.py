"""Models to measure: named shapes with random weights, which are made on the devices that hold them."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relearn_jax.errors import InputError
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.parallel.mesh import weight_shardings
from relearn_jax.plan.presets import preset

_LLAMA = ModelConfig(
    architecture="llama", vocab_size=162, hidden_size=128, intermediate_size=256, num_layers=4, num_heads=4,
    num_kv_heads=4, head_dim=32, max_positions=128, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
    tie_embeddings=True, bos_id=1, eos_ids=(2,))

_SMALL: dict[str, ModelConfig] = {
    # For tests: everything in a second.
    "tiny": dataclasses.replace(_LLAMA, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
                                head_dim=8),
    # 0.7 M parameters: the model of the default audit (`audit_config.PretrainSettings`).
    "names": _LLAMA,
    # 8.4 M.
    "small": dataclasses.replace(_LLAMA, vocab_size=4096, hidden_size=256, intermediate_size=688, num_layers=8,
                                 num_heads=8, num_kv_heads=8, max_positions=512, tie_embeddings=False),
    # 71 M and 115 M: those of benchmarks/plan.md.
    "llama_71m": dataclasses.replace(_LLAMA, vocab_size=32000, hidden_size=512, intermediate_size=1376, num_layers=12,
                                     num_heads=8, num_kv_heads=8, head_dim=64, max_positions=2048,
                                     tie_embeddings=False),
    "phi_115m": dataclasses.replace(_LLAMA, architecture="phi", vocab_size=51200, hidden_size=640,
                                    intermediate_size=2560, num_layers=10, num_heads=10, num_kv_heads=10, head_dim=64,
                                    max_positions=2048, tie_embeddings=False, rotary_dim=32),
    # 220 M: that of benchmarks/loading.md.
    "llama_220m": dataclasses.replace(_LLAMA, vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_layers=12,
                                      num_heads=16, num_kv_heads=16, head_dim=64, max_positions=2048,
                                      tie_embeddings=False),
}
_PUBLISHED = {
    "phi_1_5": "microsoft/phi-1_5", "llama_2_7b": "meta-llama/Llama-2-7b-hf", "llama_3_1_8b": "meta-llama/Llama-3.1-8B",
    "zephyr_7b_beta": "HuggingFaceH4/zephyr-7b-beta", "qwen2_5_7b": "Qwen/Qwen2.5-7B-Instruct"}
SHAPES = (*_SMALL, *_PUBLISHED)


def shape_config(name: str) -> ModelConfig:
  """The architecture of a named shape.

  Raises:
    InputError: there is none of that name; the nearest are listed.
  """
  config = _SMALL.get(name) or (preset(_PUBLISHED[name]) if name in _PUBLISHED else None)
  if config is None:
    near = difflib.get_close_matches(name, SHAPES, 2, 0.4)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise InputError(f"is {name!r}, which is no named shape{hint}", field="--shape",
                     mend=f"expected one of {', '.join(SHAPES)}; or give a folder by --model")
  return config


def num_params(shapes: Mapping[str, Any]) -> int:
  """Numbers in a tree of arrays or of their shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def random_params(model: Model, dtype: Any, mesh: Mesh, seed: int = 0) -> Params:
  """Random parameters, laid out over the mesh as `parallel.rules` says: normal(0, 0.02), unit norms, no biases.

  They are `Model.init`'s in kind; leaf by leaf, since its fp32 copy of all of them need not fit.
  """
  abstract = model.abstract()
  where = flatten(weight_shardings(abstract, model.axes(), mesh, stacked=False))
  made = {}
  for number, (path, leaf) in enumerate(sorted(flatten(abstract).items())):
    def draw(key: jax.Array, path: str = path, shape: tuple[int, ...] = leaf.shape) -> jax.Array:
      if path.endswith("bias"):
        return jnp.zeros(shape, dtype)
      if "norm" in path:
        return jnp.ones(shape, dtype)
      return jax.random.normal(key, shape, jnp.float32).astype(dtype) * jnp.asarray(0.02, dtype)
    key = jax.random.fold_in(jax.random.key(seed), number)
    made[path] = jax.jit(draw, out_shardings=where[path])(key)
  return unflatten(made)
