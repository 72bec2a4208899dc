"""Batched decoding: right-padded prefill, then a loop that writes one cache slot a step.

Pure functions, to be jitted and mapped over stacked models. A row's answer depends on its prompt and
its key alone: prompts are padded on the right and masked, positions count real tokens only, and a
row's randomness is folded from its own key.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from relearn_jax.generation.gather import split_weights
from relearn_jax.metrics.likelihood import token_scores
from relearn_jax.models.decoder import Caches
from relearn_jax.models.layers import LayerCache
from relearn_jax.models.model import Model, Params, whole


class Prompted(NamedTuple):
  """A model that has read its prompts: P prompt slots and G free slots, L layers, K heads.

  `last_hidden` is the state that predicts the first new token.
  """

  cache: Caches
  lengths: Int[Array, " B"]
  last_hidden: Float[Array, "B D"]


class Generated(NamedTuple):
  """New tokens only: ids with the EOS as last one where a row ended, 0 after it."""

  tokens: Int[Array, "B G"]
  num_tokens: Int[Array, " B"]
  finished: Bool[Array, " B"]  # by an EOS
  sound: Bool[Array, " B"]  # all logits were finite that tokens were picked from: an argmax over NaN still is a token


def prefill(model: Model, params: Params, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], new_slots: int
            ) -> Prompted:
  """Reads right-padded prompts.

  Args:
    model: architecture.
    params: its parameters.
    tokens: prompts, at least one token each.
    lengths: real tokens of each.
    new_slots: room for new tokens in the cache.
  """
  hidden, cache = model.prefill(params, tokens, new_slots)
  return Prompted(cache, lengths, _last(hidden, lengths))


def prefill_after(model: Model, params: Params, prefix: list[LayerCache], tokens: Int[Array, "B P"],
                  lengths: Int[Array, " B"]) -> Prompted:
  """Reads right-padded prompts after a prefix that was read before: up to rounding, what `prefill` of both gives.

  Args:
    model: architecture.
    params: its parameters, which have been through `split_layers`.
    prefix: of each layer, with the prefix of every row as its prompt.
    tokens: prompts, at least one token each.
    lengths: real tokens of each.

  Returns:
    A cache whose new slots are the prompts'; lengths with the prefix's.
  """
  def room(part: Float[Array, "B K S H"]) -> Float[Array, "B K P H"]:
    return jnp.zeros((*part.shape[:2], tokens.shape[1], part.shape[3]), part.dtype)
  fresh: Caches = [one._replace(new_k=room(one.prompt_k), new_v=room(one.prompt_v)) for one in prefix]
  before = jnp.full(len(tokens), prefix[0].prompt_k.shape[2])
  hidden, cache = extend(model, params, Prompted(fresh, before, jnp.zeros(())), tokens, 0)
  return Prompted(cache, before + lengths, _last(hidden, lengths))


def _last(hidden: Float[Array, "B P D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
  return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def extend(model: Model, params: Params, prompted: Prompted, tokens: Int[Array, "B T"],
           step: Int[Array, "*#B"] | int) -> tuple[Float[Array, "B T D"], Caches]:
  """Reads new tokens after the prompts, the first of them at slot `step` of the free slots, of all rows or of each."""
  some = prompted.cache[0] if isinstance(prompted.cache, list) else prompted.cache
  num_prompt, num_new = some.prompt_k.shape[-2], some.new_k.shape[-2]
  offsets = jnp.reshape(step, (-1, 1)) + jnp.arange(tokens.shape[1])
  seen_prompt = jnp.arange(num_prompt)[None, None] < prompted.lengths[:, None, None]
  seen_new = jnp.arange(num_new)[None, None] <= offsets[..., None]
  if (window := model.config.sliding_window) is not None and window < num_prompt + num_new:
    behind = prompted.lengths[:, None] + offsets - window  # the last position that is out of sight
    seen_prompt &= jnp.arange(num_prompt) > behind[..., None]
    seen_new &= jnp.arange(num_new) > (offsets - window)[..., None]
  shape = (*tokens.shape, num_prompt), (*tokens.shape, num_new)
  mask = jnp.concatenate([jnp.broadcast_to(seen_prompt, shape[0]), jnp.broadcast_to(seen_new, shape[1])], -1)
  return model.extend(params, tokens, prompted.lengths[:, None] + offsets, prompted.cache, mask, step)


def _is_cache(tree: Any) -> bool:
  return isinstance(tree, LayerCache)


def new_part(cache: Caches) -> Any:
  """The part of a cache that is written."""
  return jax.tree.map(lambda one: (one.new_k, one.new_v), cache, is_leaf=_is_cache)


def with_new(cache: Caches, new: Any) -> Caches:
  """The cache with what `new_part` gave of it, or of a later one."""
  return jax.tree.map(lambda one, kv: one._replace(new_k=kv[0], new_v=kv[1]), cache, new, is_leaf=_is_cache)


def choose(logits: Float[Array, "B V"], temperature: Float[Array, ""] | float, keys: Key[Array, " B"] | None,
           step: Int[Array, "*#B"] | int) -> Int[Array, " B"]:
  """Argmax, or with keys and a temperature above 0 a sample from softmax(logits / temperature)."""
  greedy = jnp.argmax(logits, -1).astype(jnp.int32)
  if keys is None:
    return greedy
  draw = lambda key, row, step: jax.random.categorical(jax.random.fold_in(key, step), row)
  steps = jnp.broadcast_to(step, greedy.shape)
  sampled = jax.vmap(draw)(keys, logits / jnp.maximum(temperature, 1e-6), steps).astype(jnp.int32)
  return jnp.where(temperature > 0, sampled, greedy)


def pick(model: Model, params: Params, hidden: Float[Array, "B D"], temperature: Float[Array, ""] | float,
         keys: Key[Array, " B"] | None, step: Int[Array, "*#B"] | int) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
  """The next tokens after hidden states, and whether all logits were finite that each was picked from."""
  logits = model.logits(params, hidden)
  return choose(logits, temperature, keys, step), jnp.isfinite(logits).all(-1)


def is_end(tokens: Int[Array, "*batch"], eos_ids: tuple[int, ...]) -> Bool[Array, "*batch"]:
  """Whether each token ends its row."""
  return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(tokens.shape, bool)


def decode(model: Model, params: Params, prompted: Prompted, *, max_new_tokens: int, eos_ids: tuple[int, ...],
           temperature: Float[Array, ""] | float = 0.0, keys: Key[Array, "*runs B"] | None = None,
           stacked: bool = False, shared: Params | None = None) -> Generated:
  """Generates up to `max_new_tokens` after each prompt; stops when every row has met an EOS.

  Args:
    model: architecture.
    params: its parameters.
    prompted: from `prefill`, with at least `max(1, max_new_tokens - 1)` free slots.
    max_new_tokens: new tokens, whatever the prompts' lengths.
    eos_ids: any of these ends a row.
    temperature: 0 is greedy; may be traced.
    keys: a key a row; None is greedy.
    stacked: every array has a leading `runs` axis. Mapping the steps inside one loop, rather than
      the loop, keeps the cache slot a scalar: a write of a slice, not a scatter, and no select.
    shared: a base that all runs share; `params` are then adapters on it.
  """
  over_runs = jax.vmap if stacked else lambda function: function
  params, shared, cache = split_weights(model, params, shared, prompted.cache, stacked=stacked)
  prompted = prompted._replace(cache=cache)

  def pick_each(hidden: Array, step: Int[Array, ""] | int) -> tuple[Array, Array]:
    one = lambda params, hidden, keys: pick(model, whole(params, None, shared), hidden, temperature, keys, step)
    found: tuple[Array, Array] = over_runs(one)(params, hidden, keys)
    return found
  first, sound = pick_each(prompted.last_hidden, 0)
  tokens = jnp.zeros((*first.shape, max_new_tokens), jnp.int32).at[..., 0].set(first)

  def going(carry: tuple) -> Bool[Array, ""]:
    return (carry[0] < max_new_tokens) & ~jnp.all(carry[4])

  def body(carry: tuple) -> tuple:
    step, last, tokens, count, done, sound, new = carry

    def read(params: Params, prompted: Prompted, new: Any, last: Array) -> tuple[Array, Caches]:
      weights = whole(params, None, shared)
      return extend(model, weights, prompted._replace(cache=with_new(prompted.cache, new)), last[:, None], step - 1)

    hidden, cache = over_runs(read)(params, prompted, new, last)
    picked, finite = pick_each(hidden[..., 0, :], step)
    chosen = jnp.where(done, 0, picked)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[..., None], step, tokens.ndim - 1)
    return (step + 1, chosen, tokens, count + ~done, done | is_end(chosen, eos_ids), sound & (done | finite),
            new_part(cache))

  start = (jnp.int32(1), first, tokens, jnp.ones(first.shape, jnp.int32), is_end(first, eos_ids), sound,
           new_part(prompted.cache))
  _, _, tokens, count, done, sound, _ = jax.lax.while_loop(going, body, start)
  return Generated(tokens, count, done, sound)


def score_answers(model: Model, params: Params, prompted: Prompted, answers: Int[Array, "B A"],
                  lengths: Int[Array, " B"]) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
  """Natural-log probabilities of given answers, token by token, in fp32, and which tokens are the likeliest.

  The first token is predicted by the prompt's last state, the others by one pass over the answer (teacher forcing).

  Args:
    model: architecture.
    params: its parameters.
    prompted: from `prefill`, with at least A - 1 free slots.
    answers: right-padded answers.
    lengths: real tokens of each.

  Returns:
    Log-probabilities, 0 at padding; and whether each token is the model's first choice after the true ones before it,
    False at padding.
  """
  hidden = prompted.last_hidden[:, None]
  if answers.shape[1] > 1:
    rest, _ = extend(model, params, prompted, answers[:, :-1], 0)
    hidden = jnp.concatenate([hidden, rest], axis=1)
  logprobs, matches = token_scores(hidden, model.head(params), answers)
  real = jnp.arange(answers.shape[1]) < lengths[:, None]
  return jnp.where(real, logprobs, 0.0), real & matches
