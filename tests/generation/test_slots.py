"""Prompts that take turns in the slots of a batch: the completions they get anyway, in fewer steps, by one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.batches import bucketize
from relearn_jax.generation import slots
from relearn_jax.generation.decode import decode, prefill
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, Params, split_layers, unstack, whole
from relearn_jax.parallel.mesh import make_mesh, use_mesh

from ..small import CONFIG, MODEL, params

NEW, LENGTH = 12, 16
EOS = tuple(range(0, CONFIG.vocab_size, 9))  # so many that completions end early and late
rng = np.random.default_rng(0)
PROMPTS = [[1, *rng.integers(4, CONFIG.vocab_size, size).tolist()] for size in rng.integers(1, LENGTH, 19)]
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(len(PROMPTS)))


def in_turns(model: Model = MODEL, temperature: float = 0.0, batch_size: int = 6, eos_ids: tuple[int, ...] = EOS,
             new: int = NEW) -> list[list[int]]:
  """New tokens of every prompt."""
  (rows,) = bucketize(PROMPTS, buckets=(LENGTH,))
  found = {}
  for done in slots.complete_rows(split_layers(params()), rows, KEYS[:, None] if temperature else None, temperature,
                                  model=model, batch_size=batch_size, max_new_tokens=new, eos_ids=eos_ids):
    assert done.sound and done.finished == (done.tokens[-1] in eos_ids) and done.row not in found
    found[done.row] = done.tokens
  return [found[index] for index in range(len(PROMPTS))]


def all_together(model: Model = MODEL, temperature: float = 0.0, new: int = NEW) -> list[list[int]]:
  """The same by one batch that is worked through as a whole."""
  (rows,) = bucketize(PROMPTS, buckets=(LENGTH,))
  got = complete(params(), rows.tokens, rows.lengths, temperature, KEYS if temperature else None, model=model,
                 max_new_tokens=new, eos_ids=EOS)
  return [np.asarray(got.tokens)[i, :got.num_tokens[i]].tolist() for i in range(len(PROMPTS))]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_gets_what_it_gets_in_a_batch_of_all(temperature: float) -> None:
  expected = all_together(temperature=temperature)
  assert len({len(row) for row in expected}) > 3  # they end at different steps, or nothing is shown
  slots._advance.clear_cache()
  assert in_turns(temperature=temperature) == expected
  assert slots._advance._cache_size() == 1


def test_a_sliding_window_moves_with_each_row() -> None:
  model = Model(dataclasses.replace(CONFIG, sliding_window=5))
  assert in_turns(model) == all_together(model) != all_together()


def test_one_token_each_and_one_slot() -> None:
  assert in_turns(new=1, batch_size=4) == [row[:1] for row in all_together()]
  assert in_turns(batch_size=1) == all_together()


def test_slots_are_not_idle_while_prompts_wait() -> None:
  """Steps taken, as the numbers of tokens tell them, against those of batches that wait for their longest row."""
  lengths = [len(row) for row in all_together()]
  whole_batches = sum(max(lengths[start:start + 6]) - 1 for start in range(0, len(lengths), 6))
  taken = 0
  advance = slots._advance

  def counting(*arguments: Any, **more: Any) -> Any:
    nonlocal taken
    begun = np.array(arguments[1].generated.num_tokens)
    running = np.array(arguments[1].running)
    fresh = arguments[5][arguments[5] < len(running)]
    begun[fresh], running[fresh] = 1, True
    after = advance(*arguments, **more)
    taken += int((np.asarray(after.generated.num_tokens) - begun)[running].max())
    return after
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slots, "_advance", counting)
    in_turns()
  assert 0 < taken < whole_batches


def test_rows_over_two_devices() -> None:
  with use_mesh(make_mesh({"runs": 1, "data": 2, "fsdp": 1, "tensor": 1}, config=CONFIG)):
    assert in_turns(batch_size=8) == all_together()


def test_split_layers_are_the_same_model() -> None:
  adapter = init_lora(MODEL, LoraConfig(4), jax.random.key(1))
  adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
  tokens = jnp.array([PROMPTS[0][:4] + PROMPTS[1][:4]])
  for tree in (params(), whole(adapter, None, params())):
    np.testing.assert_allclose(MODEL.hidden(split_layers(tree), tokens), MODEL.hidden(tree, tokens), atol=1e-5)
  copied = jax.tree.map(jnp.copy, params())
  np.testing.assert_array_equal(MODEL.hidden(unstack(copied), tokens), MODEL.hidden(split_layers(params()), tokens))
  assert not copied  # let go


@pytest.mark.parametrize("split", [False, True])
def test_no_step_joins_the_keys_of_prompt_and_new_tokens(split: bool) -> None:
  """The program has no array of keys or values as long as both together, which would be a copy at every token."""
  def run(weights: Params, tokens: Any, lengths: Any) -> Any:
    return decode(MODEL, weights, prefill(MODEL, weights, tokens, lengths, 7), max_new_tokens=8, eos_ids=())
  tokens, lengths = jnp.ones((3, LENGTH), jnp.int32), jnp.full(3, 2, jnp.int32)
  text = jax.jit(run).lower(split_layers(params()) if split else params(), tokens, lengths).as_text()
  assert f"x{LENGTH}x{CONFIG.head_dim}xf32>" in text and f"x{LENGTH + 7}xf32>" in text  # of the prompt; the scores
  assert f"x{LENGTH + 7}x{CONFIG.head_dim}xf32>" not in text and f"x{LENGTH + 7}x2x{CONFIG.head_dim}xf32>" not in text
