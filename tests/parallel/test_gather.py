"""Decoding on a mesh that divides weights: they are gathered once, before the loop, and answers are what they were."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from relearn_jax.audit import interview
from relearn_jax.data.batches import bucketize
from relearn_jax.generation import gather, slots
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, flatten, split_layers, unstack
from relearn_jax.parallel.mesh import AXES, lay_out, make_mesh, parse_mesh, repeat_runs, use_mesh, weight_shardings
from relearn_jax.training.step import NOTHING, Frozen

from ..small import CONFIG, MODEL, make_tokenizer, params

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
PROMPTS = {"tokens": np.ones((4, 8), np.int32), "lengths": np.full(4, 8, np.int32)}


def on_mesh(text: str) -> tuple[Any, Any]:
  """A mesh, and the model's parameters on it."""
  mesh = make_mesh(parse_mesh(text), config=CONFIG)
  return mesh, lay_out(params(), weight_shardings(params(), MODEL.axes(), mesh, stacked=False))


def gathers(text: str) -> tuple[int, int]:
  """All-gathers of a compiled program: in its loops, and outside of them."""
  parts: dict[str, list[str]] = {}
  for line in text.splitlines():
    if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      parts[start[1]] = lines = []
    elif parts:
      lines.append(line)

  def called(name: str, by: str = "body|condition|calls|to_apply") -> Iterator[str]:
    for line in parts[name]:
      yield from re.findall(rf"(?:{by})=%?([\w.-]+)", line)
  looped, found = [body for name in parts for body in called(name, "body")], set[str]()
  assert looped  # or nothing is shown
  while looped:
    if (name := looped.pop()) not in found:
      found.add(name)
      looped += called(name)
  number = lambda names: sum(" all-gather(" in line or " all-gather-start(" in line
                             for name in names for line in parts[name])
  return number(found), number(set(parts) - found)


def compiled() -> tuple[int, int]:
  """Of completions, by `gathers`."""
  mesh, weights = on_mesh("fsdp:2")
  complete.clear_cache()
  with use_mesh(mesh):
    return gathers(complete.lower(weights, *PROMPTS.values(), 0.0, None, model=MODEL, max_new_tokens=6, eos_ids=(2,))
                   .compile().as_text())


def test_weights_are_gathered_once_for_all_tokens() -> None:
  inside, outside = compiled()
  assert inside == 0 and outside == 8  # seven products of all layers together, and the embedding, which is the head


def test_where_there_is_no_room_each_token_gathers_them(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(gather, "most_bytes", lambda: 0)
  inside, outside = compiled()
  assert inside >= 7 and outside > 0


def test_what_is_gathered_and_when_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
  """Weights of products in compute precision; norms and adapters as they were; a device's part has to fit."""
  half = Model(CONFIG, dtype=jnp.bfloat16)
  adapter = jax.eval_shape(lambda: init_lora(MODEL, LoraConfig(2), jax.random.key(0)))
  adapted = {**MODEL.abstract(), "lora": adapter}
  kept = {path for path in flatten(adapted) if "norm" in path or path.startswith("lora")}
  numbers = sum(leaf.size for path, leaf in flatten(adapted).items() if path not in kept)
  run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), adapted)
  split = jax.eval_shape(split_layers, adapted)
  for tree, runs, stacked in ((adapted, 1, False), (split, 1, False), (run, 2, True)):
    need = 2 * numbers // 2 * (2 if stacked else 1)  # bytes a number; tensor:2; two of four runs a device
    for most, dtype in ((need, jnp.bfloat16), (need - 1, jnp.float32)):
      monkeypatch.setattr(gather, "most_bytes", lambda most=most: most)
      with jax.sharding.use_abstract_mesh(AbstractMesh((runs, 1, 2, 2), AXES)):
        got = flatten(jax.eval_shape(lambda x, stacked=stacked: gather.gather_weights(half, x, stacked=stacked), tree))
      changed = {path for path, leaf in got.items() if "norm" not in path and not path.startswith("lora")}
      assert {got[path].dtype for path in changed} == {jnp.dtype(dtype)}
      assert {got[path].dtype for path in got if path not in changed} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_slots_get_the_same_from_gathered_weights(monkeypatch: pytest.MonkeyPatch) -> None:
  mesh, weights = on_mesh("fsdp:2")
  given, advance = [], slots._advance
  monkeypatch.setattr(slots, "_advance", lambda *args, **more: given.append(args[0]) or advance(*args, **more))
  (rows,) = bucketize([[1, 5, 9], [1, 7]], buckets=(8,))
  ask = lambda weights: [(done.row, done.tokens) for done in slots.complete_rows(
      weights, rows, None, 0.0, model=MODEL, batch_size=2, max_new_tokens=6, eos_ids=())]
  alone = ask(split_layers(params()))
  with use_mesh(mesh):
    assert ask(unstack(weights)) == alone
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(given[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_interviews_get_the_same_from_gathered_weights(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
  """Stacked runs of a mesh that divides weights: of their own, or of a base that all share; nothing in the loop."""
  mesh, base = on_mesh("fsdp:2")
  model = Model(CONFIG, lora_scale=2.0)
  trained = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(model, LoraConfig(2), jax.random.key(0)))
  runs = repeat_runs(trained if adapters else base, 2, mesh, model.axes())
  frozen = Frozen(shared=base) if adapters else NOTHING
  ids = make_tokenizer()("James Anthony Mark John")["input_ids"]
  answers = []
  for most in (gather.UNTOLD, 0):
    interview._programs.cache_clear()
    monkeypatch.setattr(gather, "most_bytes", lambda most=most: most)
    asked = interview.Interviewer(model, make_tokenizer(), [(ids[:3], ids[3:]), (ids[:2], ids[2:])], mesh,
                                  max_new_tokens=4, buckets=(4,), runs_per_call=2, eos_ids=())
    inside, outside = gathers(asked.ask.lower((runs, None), (asked.inputs[0], frozen.shared)).compile().as_text())
    assert outside and bool(inside) == (most == 0)
    answers.append(asked(runs, {}, ["a", "b"], frozen=frozen))
  np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
  np.testing.assert_allclose(answers[0].logprob, answers[1].logprob, atol=1e-4)
