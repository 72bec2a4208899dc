"""More prompts than a batch has room for: a row that has ended leaves its slot to the next prompt.

A batch that is worked through as a whole lasts as long as its longest completion. Here steps are taken until some rows
have ended, and prompts that wait are read into their slots. Every row writes its cache at its own step, so that its
completion is what it is in any other batch.
"""

import collections
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from relearn_jax.data.batches import RowBatch
from relearn_jax.generation.decode import (
  Generated,
  Prompted,
  extend,
  is_end,
  new_part,
  pick,
  prefill,
  prefill_after,
  with_new,
)
from relearn_jax.generation.gather import gather_weights
from relearn_jax.models.decoder import Caches
from relearn_jax.models.layers import LayerCache
from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.mesh import to_host

SHARE = 4  # prompts are read once a fourth of the slots is free


class Slots(NamedTuple):
  """B rows that are being completed, or have been; P prompt slots and G new tokens of each.

  `generated.num_tokens` is how far a row has come, and where it writes its cache next. A prefix that all rows share
  lies in the first prompt slots of each, and stays there.
  """

  cache: Caches
  lengths: Int[Array, " B"]
  running: Bool[Array, " B"]
  generated: Generated
  keys: Key[Array, " B"] | None


class Completed(NamedTuple):
  """What became of a row: its new tokens, an EOS that ended it included; the rest as `Generated` has it."""

  row: int
  sample: int
  tokens: list[int]
  finished: bool
  sound: bool


def complete_rows(params: Params, rows: RowBatch, keys: Key[Array, "N samples"] | None, temperature: float, *,
                  model: Model, batch_size: int, max_new_tokens: int, eos_ids: tuple[int, ...],
                  prefix: list[LayerCache] | None = None) -> Iterator[Completed]:
  """Completions of any number of prompts by one program, as they come; a prompt is read once for all its samples.

  Args:
    params: that have been through `split_layers`.
    rows: right-padded prompts, N of them.
    keys: a key for each sample of each row, in the order of `rows`; None: one greedy completion each.
    temperature: 0 is greedy.
    model: architecture.
    batch_size: slots, at least as many as samples of a row.
    max_new_tokens: new tokens at most.
    eos_ids: any of these ends a row.
    prefix: what stands before all of these rows, by `prefix.read_prefix`.
  """
  params = gather_weights(model, params)  # once for all prompts, not in each call of `_advance`
  samples = 1 if keys is None else keys.shape[1]
  few = max(1, batch_size // SHARE // samples)
  waiting, owners = collections.deque(range(len(rows.indices))), dict[int, tuple[int, int]]()  # slot -> row, sample
  slots = _free_slots(model, rows.tokens.shape[1], batch_size, max_new_tokens, None if keys is None else keys[0, :1],
                      prefix)
  while waiting or owners:
    free = [place for place in range(batch_size) if place not in owners]
    taken = [waiting.popleft() for _ in range(min(few, len(waiting), len(free) // samples))]
    places = np.full((few, samples), batch_size, np.int32)
    places.flat[:len(taken) * samples] = free[:len(taken) * samples]
    owners |= {int(place): (row, sample) for row, some in zip(taken, places, strict=False)
               for sample, place in enumerate(some)}
    read = np.resize(taken or [0], few)  # what is read twice, or for no slot, goes nowhere
    slots = _advance(params, slots, rows.tokens[read], rows.lengths[read], None if keys is None else keys[read], places,
                     few * samples if waiting else batch_size, temperature, model=model, eos_ids=eos_ids,
                     shared=prefix[0].prompt_k.shape[2] if prefix else 0)
    running, generated = to_host((slots.running, slots.generated))
    for place in [place for place in owners if not running[place]]:
      row, sample = owners.pop(place)
      yield Completed(int(rows.indices[row]), sample, generated.tokens[place, :generated.num_tokens[place]].tolist(),
                      bool(generated.finished[place]), bool(generated.sound[place]))


@functools.partial(jax.jit, static_argnames=("model", "eos_ids", "shared"), donate_argnames="slots")
def _advance(params: Params, slots: Slots, tokens: Int[Array, "R P"], lengths: Int[Array, " R"],
             keys: Key[Array, "R samples"] | None, places: Int[Array, "R samples"], need: Int[Array, ""],
             temperature: Float[Array, ""], *, model: Model, eos_ids: tuple[int, ...], shared: int) -> Slots:
  """Reads prompts into their places, B for none, and takes steps until `need` slots are free.

  The first `shared` prompt slots hold what stands before all prompts.
  """
  slots = _read(model, params, slots, tokens, lengths, None if keys is None else keys.reshape(-1), places, temperature,
                eos_ids, shared)
  size, most = slots.generated.tokens.shape
  rows = jnp.arange(size)

  def body(carry: tuple) -> tuple:
    running, (tokens, count, finished, sound), new = carry
    last = tokens[rows, count - 1]
    prompted = Prompted(with_new(slots.cache, new), slots.lengths, jnp.zeros(()))
    hidden, cache = extend(model, params, prompted, last[:, None], jnp.minimum(count, most - 1) - 1)
    chosen, finite = pick(model, params, hidden[:, 0], temperature, slots.keys, count)
    tokens = tokens.at[rows, jnp.where(running, count, most)].set(chosen, mode="drop")
    count, ended = count + running, running & is_end(chosen, eos_ids)
    return (running & ~ended & (count < most), Generated(tokens, count, finished | ended, sound & (~running | finite)),
            new_part(cache))
  running, generated, new = jax.lax.while_loop(
      lambda carry: jnp.sum(~carry[0]) < need, body, (slots.running, slots.generated, new_part(slots.cache)))
  return slots._replace(running=running, generated=generated, cache=with_new(slots.cache, new))


def _read(model: Model, params: Params, slots: Slots, tokens: Array, lengths: Array, keys: Array | None, places: Array,
          temperature: Array, eos_ids: tuple[int, ...], shared: int) -> Slots:
  """The slots with prompts read into some, and the first token of each sample."""
  each = lambda rows: jnp.repeat(rows, places.shape[1], 0)
  put = lambda old, new: old.at[places.reshape(-1)].set(new, mode="drop")
  generated = slots.generated
  assert isinstance(slots.cache, list)
  if shared:
    before = [jax.tree.map(lambda leaf: leaf[:len(tokens), :, :shared], one) for one in slots.cache]  # as in any slots
    prompted = prefill_after(model, params, before, tokens, lengths)
    read = new_part(prompted.cache)
  else:
    prompted = prefill(model, params, tokens, lengths, 1)
    assert isinstance(prompted.cache, list)
    read = [(one.prompt_k, one.prompt_v) for one in prompted.cache]
  first, sound = pick(model, params, each(prompted.last_hidden), temperature, keys, 0)
  ended = is_end(first, eos_ids)
  after = lambda old, new: old.at[places.reshape(-1), :, shared:].set(each(new), mode="drop")
  cache: Caches = [one._replace(prompt_k=after(one.prompt_k, k), prompt_v=after(one.prompt_v, v))
                   for one, (k, v) in zip(slots.cache, read, strict=True)]
  row = jnp.zeros((len(first), generated.tokens.shape[1]), jnp.int32).at[:, 0].set(first)
  running = ~ended & (row.shape[1] > 1)
  return Slots(cache, put(slots.lengths, each(prompted.lengths)), put(slots.running, running),
               Generated(put(generated.tokens, row), put(generated.num_tokens, 1),
                         put(generated.finished, ended), put(generated.sound, sound)),
               None if slots.keys is None else put(slots.keys, keys))


def _free_slots(model: Model, prompt_length: int, size: int, max_new_tokens: int, key: Key[Array, "1"] | None,
                prefix: list[LayerCache] | None) -> Slots:
  c = model.config
  part = lambda length: jnp.zeros((size, c.num_kv_heads, length, c.head_dim), model.dtype)
  new = max(1, max_new_tokens - 1)
  cache = [LayerCache(part(prompt_length), part(prompt_length), part(new), part(new)) for _ in range(c.num_layers)]
  if prefix:
    before = lambda read, own: jnp.concatenate([jnp.broadcast_to(read, (size, *read.shape[1:])), own], 2)
    cache = [own._replace(prompt_k=before(read.prompt_k, own.prompt_k), prompt_v=before(read.prompt_v, own.prompt_v))
             for read, own in zip(prefix, cache, strict=True)]
  whole = lambda value, dtype: jnp.full(size, value, dtype)
  generated = Generated(jnp.zeros((size, max_new_tokens), jnp.int32), whole(1, jnp.int32), whole(False, bool),
                        whole(True, bool))
  return Slots(cache, whole(1, jnp.int32), whole(False, bool), generated,
               None if key is None else jnp.repeat(key, size))
