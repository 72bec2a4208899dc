"""Layers of stacked runs lie by themselves while tokens are decoded, where a device has room: no token copies them."""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from relearn_jax.generation import gather
from relearn_jax.generation.decode import decode, prefill
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import LAYER, Model, whole
from relearn_jax.parallel.mesh import AXES
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work, leaves, split_off

from ..small import CONFIG, MODEL, params

PROMPTS = jnp.array([[1, 5, 9, 0], [1, 7, 0, 0]]), jnp.array([3, 2])
HALF = Model(CONFIG, dtype=jnp.bfloat16, lora_scale=2.0)
LORA = LoraConfig(2)
ASK = Work("ask", "generate", CONFIG, runs=2, rows=2, length=4, max_new_tokens=5, compute_bytes=2)


def needed(work: Work, mesh: dict[str, int] | None = None) -> int:
  """Bytes from which on the plan counts on a copy."""
  return bisect.bisect_left(range(10**6), True, key=lambda most: split_off(work, mesh or {}, most) > 0)


def runs(adapters: bool = False) -> tuple[Any, Any]:
  """Two runs, or two adapters and the base that they share."""
  stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  if not adapters:
    return stack(params(), params(1)), None
  drawn = init_lora(MODEL, LORA, jax.random.key(0))
  return stack(*(jax.tree.map(lambda leaf, add=add: leaf + add, drawn) for add in (0.1, 0.2))), params()


def answer(trees: Any, shared: Any, model: Model = HALF) -> Any:
  """New tokens of both runs."""
  prompted = jax.vmap(lambda p: prefill(model, whole(p, None, shared), *PROMPTS, 4))(trees)
  return decode(model, trees, prompted, max_new_tokens=5, eos_ids=(), stacked=True, shared=shared).tokens


def looped(jaxpr: Any, inside: bool = False) -> Iterator[Any]:
  """All operations that a while loop's body makes."""
  for equation in jaxpr.eqns:
    if inside:
      yield equation
    for name, value in equation.params.items():
      if inner := getattr(value, "jaxpr", None):
        yield from looped(inner, inside or (equation.primitive.name == "while" and name == "body_jaxpr"))


def copies(trees: Any, shared: Any) -> int:
  """Weights of products that the loop takes out of a stack, or casts."""
  shapes = {leaf.shape[1:] for leaf in leaves(CONFIG) if len(leaf.shape) == 3}
  found = list(looped(jax.make_jaxpr(lambda *given: answer(*given))(trees, shared).jaxpr))
  assert any(one.primitive.name == "dot_general" for one in found)
  scans = [one for one in found if one.primitive.name == "scan" and one.params["length"] == CONFIG.num_layers]
  of_scans = [var.aval.shape[1:] for one in scans for var in one.invars]
  casts = [one.outvars[0].aval.shape for one in found if one.primitive.name == "convert_element_type"]
  return sum(any(shape[-2:] == weight for weight in shapes) for shape in of_scans + casts)


@pytest.mark.parametrize("adapters", [False, True])
def test_where_there_is_room_no_token_copies_weights(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
  work = dataclasses.replace(ASK, adapter="lora", lora_rank=2, shared=True) if adapters else ASK
  need = needed(work)
  trees, shared = runs(adapters)
  said = []
  for most in (need, need - 1):
    monkeypatch.setattr(gather, "most_bytes", lambda most=most: most)
    assert bool(copies(trees, shared)) == (most < need)
    if not adapters:
      said.append(jax.jit(lambda *given: answer(*given))(trees, shared))
  assert all(np.array_equal(said[0], other) for other in said[1:])


def test_a_copy_is_in_compute_precision_and_beside_what_was_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
  trees, _ = runs()
  cache = jax.eval_shape(jax.vmap(lambda p: prefill(HALF, p, *PROMPTS, 4).cache), trees)

  def split(mesh: dict[str, int], most: float) -> tuple[Any, Any]:
    monkeypatch.setattr(gather, "most_bytes", lambda: most)
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(mesh.get(axis, 1) for axis in AXES), AXES)):
      kept, _, caches = jax.eval_shape(lambda p, c: gather.split_weights(HALF, p, None, c, stacked=True), trees, cache)
    return kept, caches
  kept, caches = split({}, 10**9)
  layer = kept[LAYER.format(1)]
  assert len(caches) == CONFIG.num_layers and caches[0].prompt_k.shape == (2, 2, 2, 4, 8)
  assert layer["attn"]["q"]["weight"].dtype == jnp.bfloat16 and layer["mlp_norm"]["weight"].dtype == jnp.float32
  assert kept["embed"]["weight"].dtype == jnp.float32
  for mesh in ({}, {"fsdp": 2}, {"tensor": 2}, {"runs": 2}, {"fsdp": 2, "tensor": 2}):
    need = needed(ASK, mesh)
    assert "layers" not in split(mesh, need)[0] and "layers" in split(mesh, need - 1)[0]


def test_the_plan_counts_the_copy_where_it_is_made() -> None:
  need = needed(ASK)
  made, left = estimate(ASK, {}, need), estimate(ASK, {}, need - 1)
  head, layer = 162 * 32, 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
  assert left.compute == 2 * 2 * (layer + head) and made.compute == 2 * 2 * (2 * layer + head)
  assert made.cache == left.cache == need - 2 * 2 * 2 * layer and made.layer >= made.cache
  assert left.phases[1].bytes - made.phases[1].bytes == 5 * 2 * 2 * 2 * layer  # each token, half of fp32
