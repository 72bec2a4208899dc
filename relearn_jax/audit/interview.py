"""Asking stacked models the questions: greedy answers, their log-probabilities, likelihoods of scored rows."""

import dataclasses
import functools
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.data.batches import RowBatch, bucketize
from relearn_jax.data.rows import host_rows
from relearn_jax.data.tokens import completion_text
from relearn_jax.errors import InputError
from relearn_jax.generation.decode import decode, prefill, score_answers
from relearn_jax.generation.gather import gather_weights
from relearn_jax.metrics.choices import LETTER, OPTION
from relearn_jax.models.model import Model, Params, whole
from relearn_jax.objectives.core import TokenRows, reduce_tokens
from relearn_jax.parallel.mesh import (
  RUNS,
  lay_out,
  map_runs,
  padded_runs,
  replicated,
  shard_rows,
  take_held,
  take_runs,
  to_host,
  weight_shardings,
)
from relearn_jax.parallel.processes import agree, write_atomically
from relearn_jax.training.step import NOTHING, PROGRAMS, Frozen, model_outputs

SHORT = (64,)  # tokens; longer rows that are scored are padded to multiples of it
ROWS = ("retain", "forget", "relearn", "generic", LETTER, OPTION)  # of which log-probabilities may be scored


@dataclasses.dataclass(frozen=True)
class Answers:
  """What stacked models answered, on the host. R runs, Q questions, G new tokens, S scored rows.

  Attributes:
    runs: their names, `[R]`.
    texts: completions, special tokens left out, up to the first token that ends an answer, `[R, Q]`.
    tokens: generated ids, 0 after the end, `[R, Q, G]`.
    logprob: natural log-probability of the answer after the prompt, `[R, Q]`.
    matched: for each token of the answer "1" where it is the model's first choice after the prompt and the answer's
      tokens before it, and "0" where it is not, `[R, Q]`.
    finite: whether everything here is, and the logits that tokens were generated from, `[R]`. Where it is not,
      nothing of the run is an answer; where it is, NaN in the next six says that there is no such row.
    retain, forget, relearn, generic, letter, option: mean token log-probability of each row of these data sets, NaN
      where a run has fewer, `[R, S]`; None: they were not asked for.
    retain_tokens, ...: how many tokens that is the mean of, `[R, S]`.
  """

  runs: np.ndarray
  texts: np.ndarray
  tokens: np.ndarray
  logprob: np.ndarray
  matched: np.ndarray
  finite: np.ndarray
  retain: np.ndarray | None = None
  forget: np.ndarray | None = None
  relearn: np.ndarray | None = None
  generic: np.ndarray | None = None
  letter: np.ndarray | None = None
  option: np.ndarray | None = None
  retain_tokens: np.ndarray | None = None
  forget_tokens: np.ndarray | None = None
  relearn_tokens: np.ndarray | None = None
  generic_tokens: np.ndarray | None = None
  letter_tokens: np.ndarray | None = None
  option_tokens: np.ndarray | None = None


def finite_by_name(answers: Answers) -> dict[str, bool]:
  """Name of a run -> whether what it answered is finite."""
  return dict(zip(answers.runs.tolist(), answers.finite.tolist(), strict=True))


def save_answers(path: pathlib.Path, answers: Answers) -> None:
  """Writes answers; see `write_atomically`."""
  def write(temporary: pathlib.Path) -> None:
    with temporary.open("wb") as file:
      np.savez_compressed(file, **{name: array for name, array in vars(answers).items() if array is not None})
  write_atomically(path, write)


def load_answers(path: pathlib.Path) -> Answers:
  """Reads what `save_answers` wrote.

  Raises:
    InputError: it is damaged, or an earlier version wrote it, which did not store all of that.
  """
  data = agree(path.read_bytes)
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      found = dict(arrays)
  except (ValueError, EOFError, zipfile.BadZipFile):  # of a file that was cut
    raise InputError("cannot be read", file=path, mend=f"remove {path.parent.parent}, the folder of its stage, and run "
                     "the same command again") from None
  if "matched" not in found:
    raise InputError("was written by an earlier version", file=path, mend="give another --workdir")
  return Answers(**found)


def join_rows(named: Mapping[str, TokenRows]) -> list[tuple[list[str], TokenRows]]:
  """Data sets that are scored together, since a program for each would take longer to compile than their padding takes.

  Args:
    named: name -> rows `[R, S, T]` on the host, without statistics.

  Returns:
    Names, and their rows one after the other, `[R, sum of S, longest T]`; those of which few tokens count, whose places
    are picked, by themselves.
  """
  groups: dict[bool, list[str]] = {}
  for name, rows in named.items():
    groups.setdefault(rows.positions is None, []).append(name)

  def join(some: Sequence[Any]) -> np.ndarray:
    longest = max(leaf.shape[-1] for leaf in some)
    return np.concatenate([np.pad(leaf, ((0, 0), (0, 0), (0, longest - leaf.shape[-1]))) for leaf in some], axis=1)

  def of(names: Sequence[str]) -> TokenRows:
    every = [named[name] for name in names]
    labelled = any(rows.labels is not None for rows in every)
    return host_rows(
        join([rows.tokens for rows in every]), join([rows.mask for rows in every]),
        None if every[0].positions is None else join([rows.positions for rows in every]),
        join([rows.tokens if rows.labels is None else rows.labels for rows in every]) if labelled else None)
  return [(names, of(names)) for names in groups.values()]


@functools.lru_cache(maxsize=PROGRAMS)
def _programs(model: Model, mesh: Mesh, slots: int, max_new_tokens: int, eos_ids: tuple[int, ...]
              ) -> tuple[Callable[..., tuple[jax.Array, ...]], Callable[..., jax.Array]]:
  """What asks questions of stacked models, and what scores rows; of equal arguments the same, with what is compiled."""
  def ask(run: tuple[Params, Params | None], common: tuple, stacked: bool) -> tuple[jax.Array, ...]:
    (params, own), ((tokens, lengths, answers, answer_lengths), shared) = run, common
    over_runs = jax.vmap if stacked else lambda function: function
    params = gather_weights(model, whole(params, own), stacked=stacked)
    shared = None if shared is None else gather_weights(model, shared)
    prompted = over_runs(lambda p: prefill(model, whole(p, None, shared), tokens, lengths, slots))(params)
    generated = decode(model, params, prompted, max_new_tokens=max_new_tokens, eos_ids=eos_ids, stacked=stacked,
                       shared=shared)
    logprobs, matches = over_runs(lambda p, q: score_answers(
        model, whole(p, None, shared), q, answers, answer_lengths))(params, prompted)
    return generated.tokens, jnp.sum(logprobs, -1), matches, generated.sound

  def utility(run: tuple[Params, Params | None, TokenRows], shared: Params | None) -> jax.Array:
    params, own, rows = run
    logprobs = model_outputs(model, whole(params, own, shared), rows).logprobs
    count = jnp.sum(rows.mask, -1)
    return jnp.where(count > 0, reduce_tokens(logprobs, rows, "sequence_sum") / jnp.maximum(count, 1), jnp.nan)
  asking = map_runs(functools.partial(ask, stacked=False), mesh, functools.partial(ask, stacked=True))
  return jax.jit(asking), jax.jit(map_runs(utility, mesh))


class Interviewer:
  """Asks a fixed list of questions of stacked models, some at a time, with one executable a bucket."""

  def __init__(self, model: Model, tokenizer: Any, questions: Sequence[tuple[Sequence[int], Sequence[int]]], mesh: Mesh,
               *, max_new_tokens: int, buckets: Sequence[int] | None, runs_per_call: int, batch_size: int | None = None,
               eos_ids: tuple[int, ...] | None = None):
    """
    Args:
      model: architecture.
      tokenizer: of the models.
      questions: token ids of each prompt and of its answer, equal for all models.
      mesh: where the models lie.
      max_new_tokens: tokens generated after each prompt.
      buckets: prompt lengths that are padded to; see `bucketize`.
      runs_per_call: models that answer side by side.
      batch_size: questions asked, and rows scored, at a time; None: all of a bucket.
      eos_ids: any of these ends an answer; the model's own by default.
    """
    self.tokenizer, self.mesh, self.axes = tokenizer, mesh, model.axes()
    self.batch_size = batch_size
    # On CPU a device asks one model after the other anyway, and models that only fill up a call cost as much as others.
    self.block = padded_runs(1 if mesh.devices.flat[0].platform == "cpu" else runs_per_call, mesh)
    self.eos_ids = model.config.eos_ids if eos_ids is None else eos_ids
    self.prompt_ids, answers = zip(*questions, strict=True)
    self.answer_lengths = np.array([len(ids) for ids in answers], np.int32)
    self.answers = np.zeros((len(answers), max(self.answer_lengths)), np.int32)
    for row, ids in zip(self.answers, answers, strict=True):
      row[:len(ids)] = ids
    self.batches = bucketize(self.prompt_ids, buckets=buckets, batch_size=batch_size)
    self.max_new_tokens = max_new_tokens
    self.said: dict[tuple[int, bytes], str] = {}

    slots = max(max_new_tokens - 1, self.answers.shape[1] - 1, 1)
    self.ask, self.utility = _programs(model, mesh, slots, max_new_tokens, self.eos_ids)
    spread = lambda x: lay_out(x, replicated(mesh))
    self.inputs = [tuple(map(spread, (b.tokens, b.lengths, *self._answers(b)))) for b in self.batches]

  def _answers(self, batch: RowBatch) -> tuple[np.ndarray, np.ndarray]:
    """Answers in the order of a batch's rows; padding rows repeat the first question's."""
    index = np.zeros(len(batch.tokens), np.int64)
    index[:len(batch.indices)] = batch.indices
    return self.answers[index], self.answer_lengths[index]

  def __call__(self, params: Params, rows: Mapping[str, TokenRows], names: Sequence[str], *, frozen: Frozen = NOTHING
               ) -> Answers:
    """Asks, and reads what was said; see `ask_all`."""
    return self.read(self.ask_all(params, rows, names, frozen=frozen))

  def read(self, said: Answers) -> Answers:
    """Answers with their texts; work of the host alone."""
    texts = [[self._text(q, row) for q, row in enumerate(run)] for run in said.tokens]
    return dataclasses.replace(said, texts=np.array(texts, str))

  def ask_all(self, params: Params, rows: Mapping[str, TokenRows], names: Sequence[str], *, frozen: Frozen = NOTHING
              ) -> Answers:
    """Answers of the first of stacked models, as many as have a name, whose texts are yet to be read.

    Args:
      params: parameters (or adapters) `[runs, ...]`, possibly padded.
      rows: some of `ROWS` -> rows to be scored `[len(names), S, T]`, on the host.
      names: of the runs.
      frozen: what the adapters stand on.
    """
    num_runs, joined = len(names), dict[str, np.ndarray]()
    for index, start in self._blocks({len(leaf) for leaf in jax.tree.leaves((params, frozen.own))}, num_runs):
      there = index < num_runs
      for name, values in self._block(params, frozen, rows, index, start, num_runs).items():
        joined.setdefault(name, np.zeros((num_runs, *values.shape[1:]), values.dtype))[index[there]] = values[there]
    return Answers(runs=np.array(names, str), texts=np.array([], str), **joined)

  def _blocks(self, sizes: set[int], num_runs: int) -> Iterator[tuple[np.ndarray, int | None]]:
    """The places of the runs of each block, and where it begins among the runs of every device.

    A device asks the runs that it holds: picked in their order they would all travel, and devices wait for each other.
    None where that cannot be, since there are fewer runs, or some that are not laid out evenly.

    Args:
      sizes: of the stacked axis, with its padding.
      num_runs: that are asked.
    """
    devices, most = self.mesh.shape[RUNS], max(sizes)
    held, each = most // devices, self.block // devices
    if len(sizes) == 1 and most % devices == 0 and held >= each:
      for start in range(0, held, each):
        start = min(start, held - each)  # the last block repeats some
        index = (np.arange(devices)[:, None] * held + start + np.arange(each)).reshape(-1)
        if index.min() < num_runs:
          yield index, start
    else:
      for start in range(0, num_runs, self.block):
        yield np.resize(np.arange(start, min(start + self.block, num_runs)), self.block), None

  def _block(self, params: Params, frozen: Frozen, named: Mapping[str, TokenRows], index: np.ndarray,
             start: int | None, num_runs: int) -> dict[str, np.ndarray]:
    """What the runs at some places answered, in that order; of padding, anything."""
    def pick(tree: Any) -> Any:
      if start is None:
        some = take_runs(tree, index)
      else:  # a copy of all runs would be a second set of weights
        every = all(len(leaf) == self.block for leaf in jax.tree.leaves(tree))
        some = tree if every else take_held(tree, start, self.mesh.shape[RUNS], self.block // self.mesh.shape[RUNS])
      return lay_out(some, weight_shardings(some, self.axes, self.mesh, stacked=True))
    of_rows = index % num_runs
    some, own = pick(params), pick(frozen.own)
    kept = [(names, [(places, self.utility((some, own, shard_rows(part, self.mesh)), frozen.shared))
                     for places, part in self._parts(rows, of_rows)]) for names, rows in join_rows(named)]
    # All are dispatched before any is waited for.
    answered = [self.ask((some, own), (inputs, frozen.shared)) for inputs in self.inputs]
    tokens = np.zeros((self.block, len(self.prompt_ids), self.max_new_tokens), np.int32)
    logprob = np.zeros((self.block, len(self.prompt_ids)), np.float32)
    matches = np.zeros((self.block, *self.answers.shape), bool)
    finite = np.ones(self.block, bool)
    for batch, (new_tokens, new_logprob, new_matches, sound) in zip(self.batches, answered, strict=True):
      count = len(batch.indices)
      finite &= to_host(sound, self.block)[:, :count].all(1)
      tokens[:, batch.indices] = to_host(new_tokens, self.block)[:, :count]
      logprob[:, batch.indices] = to_host(new_logprob, self.block)[:, :count]
      matches[:, batch.indices] = to_host(new_matches, self.block)[:, :count]
    finite &= np.isfinite(logprob).all(1)
    found: dict[str, np.ndarray] = {}
    for names, scored in kept:
      sizes = [named[name].tokens.shape[1] for name in names]
      values = np.full((self.block, sum(sizes)), np.nan, np.float32)
      for places, part in scored:
        values[:, places] = to_host(part, self.block)[:, :len(places)]
      for name, own_values in zip(names, np.split(values, np.cumsum(sizes)[:-1], axis=1), strict=True):
        tokens_of = np.asarray(named[name].mask)[of_rows].sum(-1).astype(np.int32)
        found |= {name: own_values, f"{name}_tokens": tokens_of}
        # A row without a token that counts is none; its mean is NaN whatever the model is.
        finite &= (np.isfinite(own_values) | (tokens_of == 0)).all(1)
    return {"tokens": tokens, "logprob": logprob, "matched": self._matched(matches), "finite": finite, **found}

  def _matched(self, matches: np.ndarray) -> np.ndarray:
    """`matches` `[R, Q, A]` as strings of "0" and "1", as long as each answer."""
    return np.array([["".join("01"[int(match)] for match in row[:length])
                      for row, length in zip(run, self.answer_lengths, strict=True)] for run in matches], str)

  def _parts(self, rows: TokenRows, index: np.ndarray) -> Iterator[tuple[np.ndarray, TokenRows]]:
    """Rows of some runs by their length's bucket, `batch_size` at a time; the last part is filled up with empty rows.

    Returns:
      For each part the places of its rows, and the rows as long as the bucket.
    """
    mask = np.asarray(rows.mask)
    counted: np.ndarray = mask.max(axis=0) > 0
    longest = mask.shape[-1] - np.argmax(counted[:, ::-1], axis=-1)  # of a row that has no token: all of it
    # A row's own ids do not matter here. Short rows share one shape, or seeds would have programs of their own.
    for batch in bucketize([range(length) for length in longest.tolist()], buckets=SHORT, batch_size=self.batch_size):
      places, length = batch.indices, min(batch.tokens.shape[1], mask.shape[-1])
      missing = len(batch.tokens) - len(places)
      pick = lambda leaf, places=places, missing=missing: np.pad(
          leaf[index][:, places], ((0, 0), (0, missing), (0, 0)))
      labels = None if rows.labels is None else rows.labels[..., :length]
      short = rows._replace(tokens=rows.tokens[..., :length], mask=rows.mask[..., :length], labels=labels)
      yield places, jax.tree.map(pick, short)

  def _text(self, question: int, tokens: np.ndarray) -> str:
    """What was generated after the prompt, with the space in front of it; generated again it is the same text."""
    key = (question, tokens.tobytes())
    if key not in self.said:
      ids = tokens.tolist()  # up to the first id that ends an answer: 0 may be a token like any other
      ids = ids[:next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))]
      self.said[key] = completion_text(self.tokenizer, self.prompt_ids[question], ids)
    return self.said[key]
