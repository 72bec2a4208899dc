"""Asking stacked models the questions: greedy answers, log-probabilities, utility on retained text."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.cases.base import Question
from relearn_jax.data.batches import RowBatch, bucketize
from relearn_jax.generation.decode import decode, prefill, score_answers
from relearn_jax.metrics.keyword import contains_keyword
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.core import TokenRows, reduce_tokens
from relearn_jax.parallel.mesh import map_runs, padded_runs, replicated, shard_runs, to_host, weight_shardings
from relearn_jax.training.step import model_outputs


@dataclasses.dataclass(frozen=True)
class Scores:
  """What stacked models answered, on the host. R runs, Q questions, G new tokens, S retained rows.

  Attributes:
    tokens: generated ids, 0 after the end, `[R, Q, G]`.
    asr: 1 where a keyword of the question stands in prompt and completion, `[R, Q]`.
    logprob: natural log-probability of the answer after the prompt, `[R, Q]`.
    retain: mean token log-probability of each retained row, NaN where a run has fewer, `[R, S]`.
  """

  tokens: np.ndarray
  asr: np.ndarray
  logprob: np.ndarray
  retain: np.ndarray


def save_scores(path: pathlib.Path, scores: Scores) -> None:
  """Writes scores atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  with temporary.open("wb") as file:
    np.savez(file, **dataclasses.asdict(scores))
  temporary.replace(path)


def load_scores(path: pathlib.Path) -> Scores:
  """Reads what `save_scores` wrote."""
  with np.load(path, allow_pickle=False) as arrays:
    return Scores(**{field.name: arrays[field.name] for field in dataclasses.fields(Scores)})


class Interviewer:
  """Asks a fixed list of questions of stacked models, so many at a time, with one executable a bucket."""

  def __init__(self, model: Model, tokenizer: Any, questions: Sequence[Question], mesh: Mesh, *,
               max_new_tokens: int, buckets: Sequence[int], runs_per_call: int):
    self.tokenizer, self.questions, self.mesh, self.axes = tokenizer, questions, mesh, model.axes()
    self.block = padded_runs(runs_per_call, mesh)
    self.prompt_ids = [tokenizer(q.prompt)["input_ids"] for q in questions]
    answers = [tokenizer(q.answer, add_special_tokens=False)["input_ids"] for q in questions]
    self.answer_lengths = np.array([len(ids) for ids in answers], np.int32)
    self.answers = np.zeros((len(answers), max(self.answer_lengths)), np.int32)
    for row, ids in zip(self.answers, answers, strict=True):
      row[:len(ids)] = ids
    self.batches = bucketize(self.prompt_ids, buckets=buckets)
    self.max_new_tokens = max_new_tokens
    self.hits: dict[tuple[int, bytes], bool] = {}

    slots = max(max_new_tokens - 1, self.answers.shape[1] - 1, 1)

    def ask(params: Params, inputs: tuple[jax.Array, ...], stacked: bool) -> tuple[jax.Array, jax.Array]:
      tokens, lengths, answers, answer_lengths = inputs
      over_runs = jax.vmap if stacked else lambda function: function
      prompted = over_runs(lambda p: prefill(model, p, tokens, lengths, slots))(params)
      generated = decode(model, params, prompted, max_new_tokens=max_new_tokens, eos_ids=model.config.eos_ids,
                         stacked=stacked)
      logprobs = over_runs(lambda p, q: score_answers(model, p, q, answers, answer_lengths))(params, prompted)
      return generated.tokens, jnp.sum(logprobs, -1)

    def utility(run: tuple[Params, TokenRows], _: object) -> jax.Array:
      params, rows = run
      logprobs = model_outputs(model, params, rows).logprobs
      count = jnp.sum(rows.mask, -1)
      return jnp.where(count > 0, reduce_tokens(logprobs, rows, "sequence_sum") / jnp.maximum(count, 1), jnp.nan)

    self.ask = jax.jit(map_runs(functools.partial(ask, stacked=False), mesh, functools.partial(ask, stacked=True)))
    self.utility = jax.jit(map_runs(utility, mesh))
    spread = lambda x: jax.device_put(x, replicated(mesh))
    self.inputs = [tuple(map(spread, (b.tokens, b.lengths, *self._answers(b)))) for b in self.batches]

  def _answers(self, batch: RowBatch) -> tuple[np.ndarray, np.ndarray]:
    """Answers in the order of a batch's rows; padding rows repeat the first question's."""
    index = np.zeros(len(batch.tokens), np.int64)
    index[:len(batch.indices)] = batch.indices
    return self.answers[index], self.answer_lengths[index]

  def __call__(self, params: Params, retain: TokenRows, num_runs: int) -> Scores:
    """Scores of the first `num_runs` of stacked models.

    Args:
      params: parameters `[runs, ...]`, possibly padded.
      retain: retained rows `[num_runs, S, T]` on the host.
      num_runs: runs that are real.
    """
    parts = [self._block(params, retain, range(start, min(start + self.block, num_runs)))
             for start in range(0, num_runs, self.block)]
    tokens, logprob, kept = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Scores(tokens, self._asr(tokens), logprob, kept)

  def _block(self, params: Params, retain: TokenRows, runs: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.resize(np.arange(runs.start, runs.stop), self.block)  # a short last block repeats its runs
    some = jax.tree.map(lambda leaf: leaf[index], params)
    some = jax.device_put(some, weight_shardings(some, self.axes, self.mesh, stacked=True))
    rows = shard_runs(TokenRows(retain.tokens[index], retain.mask[index]), self.mesh)
    kept = self.utility((some, rows), ())
    answered = [self.ask(some, inputs) for inputs in self.inputs]  # dispatched before any is waited for
    tokens = np.zeros((len(runs), len(self.questions), self.max_new_tokens), np.int32)
    logprob = np.zeros((len(runs), len(self.questions)), np.float32)
    for batch, (new_tokens, new_logprob) in zip(self.batches, answered, strict=True):
      count = len(batch.indices)
      tokens[:, batch.indices] = to_host(new_tokens, len(runs))[:, :count]
      logprob[:, batch.indices] = to_host(new_logprob, len(runs))[:, :count]
    return tokens, logprob, to_host(kept, len(runs))

  def _asr(self, tokens: np.ndarray) -> np.ndarray:
    return np.array([[self._hit(q, row) for q, row in enumerate(run)] for run in tokens], np.float32)

  def _hit(self, question: int, tokens: np.ndarray) -> bool:
    key = (question, tokens.tobytes())
    if key not in self.hits:
      text = self.text(question, tokens)
      self.hits[key] = any(contains_keyword(text, word) for word in self.questions[question].keywords)
    return self.hits[key]

  def text(self, question: int, tokens: np.ndarray) -> str:
    """Prompt and completion as one text, special tokens left out."""
    ids = self.prompt_ids[question] + [int(t) for t in tokens if t]
    return self.tokenizer.decode(ids, skip_special_tokens=True)

  def completion(self, question: int, tokens: np.ndarray) -> str:
    """What was generated after the prompt."""
    prompt = self.tokenizer.decode(self.prompt_ids[question], skip_special_tokens=True)
    return self.text(question, tokens)[len(prompt):].strip()


def once(path: pathlib.Path, compute: Callable[[], Scores]) -> Scores:
  """Scores from `path` if they were saved before, else computed and saved there."""
  if not path.exists():
    save_scores(path, compute())
  return load_scores(path)
