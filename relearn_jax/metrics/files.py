"""`relearn score`: answers in a file, their log-probabilities in another."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from relearn_jax.data.batches import bucketize
from relearn_jax.data.jsonl import check_writable, read_jsonl, write_jsonl
from relearn_jax.errors import InputError
from relearn_jax.generation.files import need_at_least_one, open_model, prompt_ids
from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.checkpoint import load_params
from relearn_jax.models.model import Model, Params


def split_tokens(tokenizer: Any, prompt: str, answer: str, eos_ids: Sequence[int]) -> tuple[list[int], int]:
  """Tokens of prompt and answer as one text, and where the answer's tokens begin.

  The answer begins at the first token that differs from the prompt tokenized alone; where a token
  spans the seam, it counts as the answer's. No EOS is added.
  """
  alone, whole = prompt_ids(tokenizer, prompt, eos_ids), prompt_ids(tokenizer, prompt + answer, eos_ids)
  start = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
  return whole, start


def score_file(model_name: str, data: pathlib.Path, output: pathlib.Path, *, batch_size: int = 32) -> int:
  """Scores the answers of a file; returns how many.

  Args:
    model_name: local Hugging Face folder or hub id.
    data: rows `{"id", "prompt", "answer"}`.
    output: rows `{"id", "logprob_sum", "num_tokens", "token_logprobs"}` in input order: natural
      logarithms in fp32, of the answer's tokens only (see `split_tokens`).
    batch_size: rows computed together.

  Raises:
    InputError: anything that is wrong with the model, the rows or the arguments, before any device work.
  """
  need_at_least_one(batch_size=batch_size)
  rows = read_jsonl(data, {"id": (str, int), "prompt": str, "answer": str})
  checked, tokenizer = open_model(model_name)
  config = checked.config
  split = [split_tokens(tokenizer, row["prompt"], row["answer"], config.eos_ids) for row in rows]
  for row, (tokens, start) in zip(rows, split, strict=True):
    where = {"file": data, "line": row["line"]}
    if start >= len(tokens):
      raise InputError("has no tokens", field="answer", mend="give the text to score", **where)
    if start == 0:
      raise InputError("has no tokens, so the answer's first token has nothing before it", field="prompt",
                       mend="give a prompt", **where)
    if len(tokens) > config.max_positions:
      raise InputError(f"has with the answer {len(tokens)} tokens, more than the model's context of "
                       f"{config.max_positions}", field="prompt", mend="shorten it", **where)
  check_writable(output)

  model = Model(config)
  params = load_params(checked, model)

  @jax.jit
  def run(params: Params, tokens: jax.Array) -> jax.Array:
    hidden = model.hidden(params, tokens)
    return token_logprobs(hidden[:, :-1], model.head(params), tokens[:, 1:])

  results: list[dict[str, Any]] = [{}] * len(rows)
  with tqdm(total=len(rows), desc="score", unit="answer", disable=not sys.stderr.isatty()) as bar:
    for batch in bucketize([tokens for tokens, _ in split], batch_size=min(batch_size, len(rows))):
      logprobs = np.asarray(run(params, jnp.asarray(batch.tokens)))
      for slot, index in enumerate(batch.indices):
        tokens, start = split[index]
        values = logprobs[slot, start - 1:len(tokens) - 1]
        results[index] = {"id": rows[index]["id"], "logprob_sum": float(values.sum(dtype=np.float64)),
                          "num_tokens": len(values), "token_logprobs": [float(value) for value in values]}
      bar.update(len(batch.indices))
  write_jsonl(output, results)
  return len(rows)
