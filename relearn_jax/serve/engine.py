"""Answers: one thread takes the requests that wait, and works through those of one model and kind together."""

import concurrent.futures
import dataclasses
import functools
import logging
import math
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from relearn_jax.data.batches import RowBatch, bucketize
from relearn_jax.data.jsonl import Row
from relearn_jax.data.tokens import row_ids
from relearn_jax.errors import InputError
from relearn_jax.generation.prompt_files import complete, finish
from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.mesh import to_host
from relearn_jax.serve.catalog import Base, Catalog
from relearn_jax.serve.conversations import Turns, as_prompt

LOG = logging.getLogger(__name__)
MOST_NEW = 1024  # new tokens of a chat that states no number, at most
TOP = 5  # alternatives that can be asked for
WINDOW = 4  # tokens before one, with which it is decoded
Prompt = str | Sequence[int] | Turns


class Busy(Exception):
  """More requests wait than may."""


@dataclasses.dataclass(frozen=True)
class Ask:
  """One prompt of a request.

  Attributes:
    model: name.
    prompt: text, token ids, or the turns of a conversation.
    max_new: new tokens at most; None: as many as there is room for, up to `MOST_NEW`; 0: the prompt is scored alone.
    temperature: 0 is greedy.
    seed: decides what is sampled.
    stop: strings before which an answer ends.
    top: None: no log-probabilities; else those of the tokens, and of so many alternatives.
    echo: log-probabilities of the prompt, too.
  """

  model: str
  prompt: Prompt
  max_new: int | None = None
  temperature: float = 0.0
  seed: int = 0
  stop: tuple[str, ...] = ()
  top: int | None = None
  echo: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
  """A token of an answer, or of an echo.

  Attributes:
    text: as the vocabulary spells it, so that different tokens differ.
    offset: where it begins in the text.
    logprob: natural; None: nothing predicts it.
    top: spelling -> log-probability of the likeliest tokens at its place.
  """

  text: str
  offset: int
  logprob: float | None
  top: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Answer:
  """What became of an `Ask`.

  Attributes:
    text: of the answer.
    finish: "stop" or "length".
    echo: the prompt as text, where it was asked for.
    tokens: of the echo and the answer, where log-probabilities were asked for.
    num_prompt, num_new: tokens.
  """

  text: str
  finish: str
  echo: str
  tokens: tuple[Token, ...]
  num_prompt: int
  num_new: int


Waiting = tuple[Ask, "concurrent.futures.Future[Answer]"]
Ready = tuple[Waiting, list[int], int]  # with the ids of the prompt, and how many new tokens it may have


class Engine:
  """Batched answers; `submit` from any thread."""

  def __init__(self, catalog: Catalog, max_waiting: int, max_batch: int = 64):
    self.catalog, self.max_batch, self.max_waiting = catalog, max_batch, max_waiting
    self.waiting: queue.Queue[Waiting | None] = queue.Queue()
    self.batches: list[int] = []  # rows of the last batches, for those who measure
    self.thread = threading.Thread(target=self._run, name="answers", daemon=True)
    self.thread.start()

  def submit(self, asks: Sequence[Ask]) -> list["concurrent.futures.Future[Answer]"]:
    """Answers to come, of prompts that are answered together if they can be.

    Raises:
      Busy: too many wait.
    """
    if self.waiting.qsize() + len(asks) > self.max_waiting:
      raise Busy
    found = []
    for ask in asks:
      future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
      self.waiting.put((ask, future))
      found.append(future)
    return found

  def close(self) -> None:
    """Ends the thread after what it is at; what still waits is refused."""
    self.waiting.put(None)
    self.thread.join()

  def _run(self) -> None:
    while True:
      taken = [self.waiting.get()]
      while not self.waiting.empty():
        taken.append(self.waiting.get())
      there = [one for one in taken if one is not None]
      groups: dict[tuple, list[Waiting]] = {}
      for one in there:
        groups.setdefault((one[0].model, one[0].temperature), []).append(one)
      for (name, _), group in groups.items():
        self._answer_group(name, [one for one in group if one[1].set_running_or_notify_cancel()])
      if len(there) < len(taken):
        return

  def _answer_group(self, name: str, group: list[Waiting]) -> None:
    """Answers prompts of one model and temperature; what fails is told to whoever asked."""
    try:
      base, params = self.catalog.base(name), self.catalog.params(name)
    except Exception as error:
      _fail(group, error)
      return
    ready: list[Ready] = []
    for one in group:
      try:
        ready.append((one, *_prepare(base, one[0])))
      except Exception as error:
        _fail([one], error)
    try:
      with jax.default_matmul_precision("highest"):
        self._answer(base, params, ready)
    except Exception as error:  # of the device: whoever waits for this batch is told, the next one is tried
      LOG.exception("a batch failed")
      _fail([one for one, _, _ in ready], error)

  def _answer(self, base: Base, params: Params, ready: Sequence[Ready]) -> None:
    new = self._complete(base, params, ready)
    tokens = self._score(base, params, ready, new)
    for (ask, future), ids, _, place in ((*one, i) for i, one in enumerate(ready)):
      told = new[place]
      echo = (ask.prompt if isinstance(ask.prompt, str) else _decode(base.tokenizer, ids)) if ask.echo else ""
      future.set_result(Answer(told["completion"], told["finish_reason"], echo, tokens.get(place, ()), len(ids),
                               len(told["token_ids"])))

  def _complete(self, base: Base, params: Params, ready: Sequence[Ready]) -> dict[int, dict[str, Any]]:
    """Place in `ready` -> what `prompt_files.finish` says of the answer."""
    found: dict[int, dict[str, Any]] = {}
    by_length: dict[int, list[int]] = {}  # new tokens, rounded up, so that there are few programs -> places
    for place, (_, _, max_new) in enumerate(ready):
      if max_new:
        by_length.setdefault(_round_up(max_new), []).append(place)
      else:
        found[place] = {"completion": "", "finish_reason": "length", "token_ids": []}
    for most, members in by_length.items():
      for batch in self._batches([ready[place][1] for place in members]):
        rows = [members[i] for i in np.resize(batch.indices, len(batch.tokens)).tolist()]
        generated = _generate(base, params, batch, [ready[place][0][0] for place in rows], most)
        for slot, place in enumerate(rows[:len(batch.indices)]):
          (ask, _), ids, max_new = ready[place]
          if not generated.sound[slot]:
            raise _unsound()
          count = int(generated.num_tokens[slot])
          ended = bool(generated.finished[slot]) and count <= max_new
          found[place] = finish(base.tokenizer, ids, generated.tokens[slot, :min(count, max_new)].tolist(), ended,
                                ask.stop)
    return found

  def _score(self, base: Base, params: Params, ready: Sequence[Ready], new: dict[int, dict[str, Any]]
             ) -> dict[int, tuple[Token, ...]]:
    """Place in `ready` -> what is told of tokens, of those whose log-probabilities are asked for."""
    places, found = [i for i, (one, _, _) in enumerate(ready) if one[0].top is not None], {}
    whole, most = [[*ready[i][1], *new[i]["token_ids"]] for i in places], min(TOP, base.model.config.vocab_size)
    for batch in self._batches(whole) if whole else []:
      logprobs, top, ids = to_host(score_all(params, batch.tokens, model=base.model, top=most))
      for slot, index in enumerate(batch.indices.tolist()):
        (ask, _), prompt, _ = ready[places[index]]
        found[places[index]] = _tokens(base.tokenizer, whole[index], 0 if ask.echo else len(prompt), ask.top or 0,
                                       logprobs[slot], top[slot], ids[slot])
    return found

  def _batches(self, rows: Sequence[Sequence[int]]) -> list[RowBatch]:
    """Batches of few shapes: a number of rows is a power of two."""
    size = min(self.max_batch, _round_up(len(rows), 1))
    self.batches = [*self.batches[-100:], len(rows)]
    return bucketize(rows, batch_size=size)


def _unsound() -> InputError:
  return InputError("gives no finite numbers", field="model", mend="serve one whose weights are finite")


def _round_up(number: int, least: int = 16) -> int:
  return max(least, 1 << (number - 1).bit_length())


def _fail(group: Sequence[Waiting], error: Exception) -> None:
  for _, future in group:
    if not future.done():
      future.set_exception(error)


def _prepare(base: Base, ask: Ask) -> tuple[list[int], int]:
  """Ids of a prompt, and how many new tokens it may have.

  Raises:
    InputError: it has no token, or leaves no room.
  """
  limit, nowhere = base.checked.config.max_positions, pathlib.Path("the request")
  if isinstance(ask.prompt, str):
    ids = row_ids(base.tokenizer, Row({"prompt": ask.prompt}, 1), nowhere, "prompt")
  elif ask.prompt and isinstance(ask.prompt[0], int):
    ids = [int(i) for i in ask.prompt]  # type: ignore[arg-type]
    if bad := [i for i in ids if not 0 <= i < base.checked.config.vocab_size]:
      raise InputError(f"has token {bad[0]}", field="prompt",
                       mend=f"expected 0 to {base.checked.config.vocab_size - 1}")
  else:
    text, chat = as_prompt(ask.prompt, base.chat)  # type: ignore[arg-type]
    ids = row_ids(base.tokenizer, Row({"prompt": text}, 1), nowhere, "prompt", chat=chat)
  if not ids:
    raise InputError("gives no token", field="prompt", mend="give text")
  left = limit - len(ids)
  wanted = min(max(left, 0), MOST_NEW) if ask.max_new is None else ask.max_new
  if len(ids) + wanted > limit or (ask.max_new is None and not wanted):
    raise InputError(f"has {len(ids)} tokens, and with {wanted} new ones more than the model's {limit} positions",
                     field="prompt", mend="shorten it, or ask for fewer tokens")
  return ids, wanted


def _generate(base: Base, params: Params, batch: RowBatch, asks: Sequence[Ask], most: int) -> Any:
  """Completions of a batch, on the host; all asks share a temperature."""
  temperature, keys = asks[0].temperature, None
  if temperature:
    keys = jax.vmap(jax.random.key)(jnp.array([ask.seed for ask in asks], jnp.uint32))
  return to_host(complete(params, batch.tokens, batch.lengths, temperature, keys, model=base.model,
                          max_new_tokens=most, eos_ids=base.eos_ids))


@functools.partial(jax.jit, static_argnames=("model", "top"))
def score_all(params: Params, tokens: Int[Array, "B T"], *, model: Model, top: int
              ) -> tuple[Float[Array, "B T-1"], Float[Array, "B T-1 K"], Int[Array, "B T-1 K"]]:
  """Natural-log probability of every token but the first, and of the K likeliest at its place, with their ids.

  Rows are right-padded; what stands at padding means nothing.
  """
  hidden, head = model.hidden(params, tokens), model.head(params)

  def one(row: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    logprobs = jax.nn.log_softmax(model.logits(params, row[0]), -1)
    best, ids = jax.lax.top_k(logprobs, top)
    return token_logprobs(row[0], head, row[1]), best, ids
  # Row by row: the logits of a whole batch would be its largest array by far.
  return jax.lax.map(one, (hidden[:, :-1], tokens[:, 1:]))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
  return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _tokens(tokenizer: Any, ids: Sequence[int], start: int, wanted: int, logprobs: np.ndarray, top: np.ndarray,
            top_ids: np.ndarray) -> tuple[Token, ...]:
  """What is told of the tokens from `start` on; offsets count from there."""
  spell: Callable[[int], str] = lambda i: str(tokenizer.convert_ids_to_tokens(int(i)))
  found, offset = list[Token](), 0
  for place in range(start, len(ids)):
    if place > start:  # what the token before it added to the few before that; to decode all each time is quadratic
      few = ids[max(0, place - 1 - WINDOW):place]
      offset += len(_decode(tokenizer, few)) - len(_decode(tokenizer, few[:-1]))
    if not place:
      found.append(Token(spell(ids[0]), offset, None, {}))
      continue
    value = float(logprobs[place - 1])
    if not math.isfinite(value):
      raise _unsound()
    best = {spell(i): float(p) for i, p in zip(top_ids[place - 1][:wanted], top[place - 1][:wanted], strict=True)}
    found.append(Token(spell(ids[place]), offset, value, best))
  return tuple(found)


def random_seed() -> int:
  """For a request that states none."""
  return int.from_bytes(os.urandom(4), "big")
