"""Decoding: a row's tokens are those of the full forward pass, whatever stands beside it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.batches import bucketize
from relearn_jax.generation.decode import Generated, choose, decode, prefill, score_answers
from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.model import Head

from ..small import CONFIG, MODEL, params

NEW = 24
rng = np.random.default_rng(0)
PROMPTS = [[1, *rng.integers(4, CONFIG.vocab_size, size).tolist()] for size in (1, 3, 9, 15, 16, 20, 30, 40)]
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(len(PROMPTS)))


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos_ids", "stacked"))
def run(weights: Any, tokens: Any, lengths: Any, keys: Any, *, max_new_tokens: int = NEW,
        eos_ids: tuple[int, ...] = (), temperature: Any = 0.0, stacked: bool = False) -> Generated:
  """Prefill and decode."""
  read = lambda p: prefill(MODEL, p, tokens, lengths, max(1, max_new_tokens - 1))
  return decode(MODEL, weights, jax.vmap(read)(weights) if stacked else read(weights), max_new_tokens=max_new_tokens,
                eos_ids=eos_ids, temperature=temperature, keys=keys, stacked=stacked)


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  tokens = np.zeros((len(rows), length), np.int32)
  for slot, row in enumerate(rows):
    tokens[slot, :len(row)] = row
  return tokens, np.array([len(row) for row in rows], np.int32)


def together(keys: Any = KEYS, **settings: Any) -> Generated:
  return run(params(), *pad(PROMPTS, 48), keys, **settings)


@jax.jit
def forward_logprobs(weights: Any, tokens: Any) -> Any:
  """Log-probabilities of every next token, `[B, T, V]`, by the full forward pass."""
  return jax.nn.log_softmax(MODEL.logits(weights, MODEL.hidden(weights, tokens)))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_gets_what_it_gets_alone(temperature: float) -> None:
  expected = together(temperature=temperature).tokens
  assert len({tuple(row) for row in np.asarray(expected).tolist()}) == len(PROMPTS)  # rows differ, or nothing is shown
  for index, prompt in enumerate(PROMPTS):
    for length in (48, 64):
      alone = run(params(), *pad([prompt], length), KEYS[index:index + 1], temperature=temperature).tokens
      np.testing.assert_array_equal(alone[0], expected[index])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("batch_size,buckets", [(3, None), (2, (48,))])
def test_a_row_gets_the_same_in_any_batch_bucket_and_order(temperature: float, batch_size: int | None,
                                                           buckets: Any) -> None:
  expected = np.asarray(together(temperature=temperature).tokens)
  order = np.random.default_rng(1).permutation(len(PROMPTS))
  got = np.zeros_like(expected)
  for batch in bucketize([PROMPTS[i] for i in order], buckets=buckets, batch_size=batch_size):
    rows = order[np.resize(batch.indices, len(batch.tokens))]
    tokens = run(params(), batch.tokens, batch.lengths, KEYS[rows], temperature=temperature).tokens
    got[order[batch.indices]] = tokens[:len(batch.indices)]
  np.testing.assert_array_equal(got, expected)


def test_what_stands_in_the_padding_does_not_matter() -> None:
  tokens, lengths = pad(PROMPTS, 48)
  tokens = np.where(np.arange(48) < lengths[:, None], tokens, 63)
  np.testing.assert_array_equal(run(params(), tokens, lengths, KEYS).tokens, together().tokens)


def test_greedy_tokens_are_those_of_the_full_forward_for_64_tokens() -> None:
  got = np.asarray(together(max_new_tokens=64).tokens)
  rows = [list(prompt) for prompt in PROMPTS]
  for _ in range(64):
    tokens, lengths = pad(rows, 108)
    logits = forward_logprobs(params(), tokens)
    for row, best in zip(rows, np.argmax(logits, -1)[np.arange(len(rows)), lengths - 1].tolist(), strict=True):
      row.append(best)
  np.testing.assert_array_equal(got, [row[-64:] for row in rows])


def test_sampling_follows_the_softmax_at_its_temperature() -> None:
  number, temperature = 20000, 2.0
  logits = forward_logprobs(params(), pad([PROMPTS[2]], 48)[0])[0, len(PROMPTS[2]) - 1]
  keys = jax.random.split(jax.random.key(3), number)
  drawn = np.asarray(choose(jnp.broadcast_to(logits, (number, len(logits))), temperature, keys, 0))
  expected = np.asarray(jax.nn.softmax(logits / temperature))
  share = np.bincount(drawn, minlength=CONFIG.vocab_size) / number
  # Of 20000 draws from 162 probabilities half the L1 distance is 0.036 at most in the mean.
  assert np.abs(share - expected).sum() / 2 < 0.05 and expected.max() < 0.9


def test_keys_decide_what_is_sampled_and_greedy_needs_none() -> None:
  again = together(jax.random.split(jax.random.key(8), len(PROMPTS)), temperature=1.5).tokens
  assert (np.asarray(together(temperature=1.5).tokens) != np.asarray(again)).any(1).all()
  np.testing.assert_array_equal(together(None, temperature=1.5).tokens, together().tokens)


def test_eos_stops_its_row_while_others_go_on() -> None:
  free = np.asarray(together().tokens)
  # A token that some rows come to early, each at its own step, and others never.
  eos = next(token for token in range(CONFIG.vocab_size) if 1 <= (free == token).any(1).sum() < len(PROMPTS)
             and 2 < np.argmax(free == token, 1).max() < NEW - 2)
  got = jax.device_get(together(eos_ids=(eos,)))
  for row, tokens, count, finished in zip(free, *got[:3], strict=True):
    ends = bool((row == eos).any())
    length = int(np.argmax(row == eos)) + 1 if ends else NEW
    assert (count, finished) == (length, ends)
    np.testing.assert_array_equal(tokens, np.where(np.arange(NEW) < length, row, 0))


def test_any_of_several_eos_ends_a_row_and_the_loop_ends_with_the_last_row() -> None:
  free = np.asarray(together().tokens)
  eos = tuple(sorted(set(free[:, 3].tolist())))
  got = jax.device_get(together(eos_ids=eos))
  assert got.finished.all() and (got.num_tokens <= 4).all() and not got.tokens[:, 4:].any()
  for row, tokens, count in zip(free, got.tokens, got.num_tokens, strict=True):
    assert tokens[count - 1] in eos and not set(row[:count - 1].tolist()) & set(eos)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_one_new_token_whatever_the_prompts_length(temperature: float) -> None:
  one, many = together(max_new_tokens=1, temperature=temperature), together(temperature=temperature)
  assert one.tokens.shape == (len(PROMPTS), 1) and np.all(one.num_tokens == 1)
  np.testing.assert_array_equal(one.tokens[:, 0], many.tokens[:, 0])
  assert np.all(many.num_tokens == NEW)  # a long prompt eats nothing of the budget


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_stacked_runs_give_what_each_gives_alone(temperature: float) -> None:
  runs = [params(seed) for seed in range(3)]
  stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
  keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(PROMPTS))))(
      jax.random.split(jax.random.key(5), 3))
  batch = pad(PROMPTS, 48)
  # A token that every run comes to somewhere, so that rows of one run end while other runs go on.
  free = [run(p, *batch, keys[i], temperature=temperature) for i, p in enumerate(runs)]
  eos = (int(free[0].tokens[0, 5]), int(free[1].tokens[1, 5]))
  got = run(stack, *batch, keys, eos_ids=eos, temperature=temperature, stacked=True)
  assert got.tokens.shape == (3, len(PROMPTS), NEW) and np.any(got.finished) and not np.all(got.finished)
  for index, alone in enumerate(runs):
    expected = run(alone, *batch, keys[index], eos_ids=eos, temperature=temperature)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=index: leaf[i], got), expected)


@pytest.mark.parametrize("answer_length", [1, 7])
def test_score_answers_equals_the_full_forward(answer_length: int) -> None:
  answers = np.random.default_rng(4).integers(4, CONFIG.vocab_size, (len(PROMPTS), answer_length)).astype(np.int32)
  lengths = np.maximum(1, answer_length - np.arange(len(PROMPTS)) % 3).astype(np.int32)

  @jax.jit
  def score(weights: Any, tokens: Any, num: Any) -> Any:
    prompted = prefill(MODEL, weights, tokens, num, max(1, answer_length - 1))
    return score_answers(MODEL, weights, prompted, jnp.asarray(answers), jnp.asarray(lengths))

  got, matches = map(np.asarray, score(params(), *pad(PROMPTS, 48)))
  whole, _ = pad([prompt + answer.tolist() for prompt, answer in zip(PROMPTS, answers, strict=True)], 48)
  full = np.asarray(forward_logprobs(params(), whole))
  for row, (prompt, answer, length) in enumerate(zip(PROMPTS, answers, lengths, strict=True)):
    places = len(prompt) - 1 + np.arange(length)
    np.testing.assert_allclose(got[row, :length], full[row, places, answer[:length]], atol=2e-5)
    assert matches[row, :length].tolist() == (np.argmax(full[row, places], -1) == answer[:length]).tolist()
    assert not got[row, length:].any() and not matches[row, length:].any()


def test_scoring_greedy_tokens_gives_the_highest_probability_at_every_step() -> None:
  tokens, lengths = pad(PROMPTS, 48)
  answers = together().tokens

  @jax.jit
  def score(weights: Any, tokens: Any, num: Any, answers: Any) -> Any:
    prompted = prefill(MODEL, weights, tokens, num, NEW - 1)
    return score_answers(MODEL, weights, prompted, answers, jnp.full(len(num), NEW))

  got, matches = score(params(), tokens, lengths, answers)
  assert np.asarray(matches).all()  # teacher forced by what it said itself, each token is its first choice
  whole, _ = pad([p + a for p, a in zip(PROMPTS, np.asarray(answers).tolist(), strict=True)], 108)
  best = np.max(forward_logprobs(params(), whole), -1)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(got[row], best[row, length - 1:length - 1 + NEW], atol=2e-5)


def test_token_logprobs_are_normalised_in_fp32_from_bf16() -> None:
  hidden = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16) * 30
  head = jax.random.normal(jax.random.key(1), (16, 8))
  targets = jnp.broadcast_to(jnp.arange(16)[:, None], (16, 3))
  got = token_logprobs(jnp.broadcast_to(hidden, (16, 3, 8)), Head(head), targets)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(jnp.exp(got).sum(0), 1.0, rtol=1e-5)
