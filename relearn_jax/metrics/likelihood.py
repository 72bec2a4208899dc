"""Log-probabilities of tokens, the quantity that every objective and likelihood metric is made of."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from relearn_jax.models.model import Head, head_logits
from relearn_jax.parallel.rules import num_shards

CHUNK_BYTES = 64 * 1024**2  # of fp32 logits on a device at a time


def token_logprobs(hidden: Float[Array, "*batch D"], head: Head, targets: Int[Array, "*batch"]
                   ) -> Float[Array, "*batch"]:
  """log softmax(head @ hidden)[target], natural log, in fp32 at any precision of the inputs.

  Args:
    hidden: final hidden states; `hidden[..., t, :]` predicts the token after position t.
    head: output head.
    targets: the token to score at each position.
  """
  logits = head_logits(hidden, head)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_scores(hidden: Float[Array, "*batch D"], head: Head, targets: Int[Array, "*batch"]
                 ) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
  """`token_logprobs`, and whether each target is the token that the model finds likeliest there, from the same logits.

  Of equally likely tokens the first one in the vocabulary is the likeliest, as in greedy decoding.
  """
  logits = head_logits(hidden, head)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def per_token(function: Callable[..., Shaped[Array, "B C"]], tokens: Int[Array, "B T"],
              positions: Int[Array, "B A"] | None, vocab_size: int, *hidden: Float[Array, "B T D"]
              ) -> Shaped[Array, "B T"]:
  """A number of every token, or an id, from the hidden states that predict it, without `[B, T, V]` in memory.

  Only the tokens that count are looked at, and those in chunks whose logits take `CHUNK_BYTES`; a chunk's
  logits are computed again in the backward pass. Value and gradient equal those of the dense form.

  Args:
    function: (tokens `[B, C]`, hidden `[B, C, D]`, ...) -> `[B, C]`.
    tokens: token ids.
    positions: places of the tokens that count, 0 where a row has fewer; None: all.
    vocab_size: V.
    *hidden: final hidden states; `hidden[:, t]` predicts the token at t + 1.

  Returns:
    The quantity at each token's own place; 0 at the first, and wherever nothing counts.
  """
  if positions is None:
    return jnp.pad(_chunked(function, vocab_size, tokens[:, 1:], *(h[:, :-1] for h in hidden)), ((0, 0), (1, 0)))
  before = jnp.maximum(positions - 1, 0)
  targets = jnp.take_along_axis(tokens, positions, 1)
  values = _chunked(function, vocab_size, targets, *(jnp.take_along_axis(h, before[..., None], 1) for h in hidden))
  rows = jnp.arange(tokens.shape[0])[:, None]
  return jnp.zeros(tokens.shape, values.dtype).at[rows, positions].add(jnp.where(positions > 0, values, 0))


def _chunked(function: Callable[..., Array], vocab_size: int, *arrays: Array) -> Shaped[Array, "B T"]:
  """`function` over chunks of the second axis, each computed again when it is differentiated."""
  batch, length = arrays[0].shape
  chunk = max(1, CHUNK_BYTES * num_shards() // (4 * batch * vocab_size))
  if length <= chunk:
    return function(*arrays)
  count = math.ceil(length / chunk)
  chunk = math.ceil(length / count)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
  split = lambda x: jnp.moveaxis(pad(x).reshape(batch, count, chunk, *x.shape[2:]), 1, 0)
  values = jax.lax.map(lambda parts: jax.checkpoint(function)(*parts), tuple(map(split, arrays)))
  return jnp.moveaxis(values, 0, 1).reshape(batch, count * chunk)[:, :length]
