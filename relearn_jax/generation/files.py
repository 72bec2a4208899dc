"""`relearn generate`: prompts in a file, completions in another."""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from relearn_jax.data.batches import RowBatch, bucketize
from relearn_jax.data.jsonl import check_writable, read_jsonl, write_jsonl
from relearn_jax.errors import InputError
from relearn_jax.generation.decode import Generated, decode, prefill
from relearn_jax.models.checkpoint import Checked, check_checkpoint, load_params, load_tokenizer, resolve
from relearn_jax.models.model import Model, Params


def open_model(name: str) -> tuple[Checked, Any]:
  """Finds a checkpoint and its tokenizer and checks both, without a device."""
  checked = check_checkpoint(resolve(name))
  return checked, load_tokenizer(checked.path, checked.config)


def prompt_ids(tokenizer: Any, text: str, eos_ids: Sequence[int]) -> list[int]:
  """Tokens of a prompt as transformers makes them, less an EOS that the template puts at its end."""
  ids = list(tokenizer(text)["input_ids"])
  while ids and ids[-1] in {*eos_ids, tokenizer.eos_token_id}:
    ids.pop()
  return ids


def need_at_least_one(**values: int) -> None:
  """Refuses flags that must be positive."""
  for name, value in values.items():
    if value < 1:
      raise InputError(f"is {value}", field=f"--{name}", mend="expected at least 1")


def cut(completion: str, stop: Sequence[str]) -> str | None:
  """The part before the first stop string, or None where none occurs."""
  places = [place for text in stop if (place := completion.find(text)) >= 0]
  return completion[:min(places)] if places else None


def finish(tokenizer: Any, prompt: Sequence[int], new: Sequence[int], eos_ids: Sequence[int], stop: Sequence[str]
           ) -> dict[str, Any]:
  """Completion, ids and finish reason of one row.

  The text is what the new tokens add to the decoded prompt, so that spaces at the seam are right.
  With a stop string, the ids are the shortest prefix whose text contains it.
  """
  start = tokenizer.decode(prompt, skip_special_tokens=True)

  def text(count: int) -> str:
    whole = tokenizer.decode([*prompt, *new[:count]], skip_special_tokens=True)
    return whole[len(start):] if whole.startswith(start) else tokenizer.decode(new[:count], skip_special_tokens=True)

  completion = text(len(new))
  if (before := cut(completion, stop)) is not None:
    count = next(n for n in range(1, len(new) + 1) if cut(text(n), stop) is not None)
    return {"completion": before, "token_ids": list(new[:count]), "finish_reason": "stop"}
  ended = bool(new) and new[-1] in eos_ids
  return {"completion": completion, "token_ids": list(new), "finish_reason": "stop" if ended else "length"}


def generate_file(model_name: str, prompts: pathlib.Path, output: pathlib.Path, *, max_new_tokens: int,
                  batch_size: int = 32, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()) -> int:
  """Completes the prompts of a file; returns how many.

  A row's completion depends on its prompt, its place in the file and the seed, not on the batch.

  Args:
    model_name: local Hugging Face folder or hub id.
    prompts: rows `{"id", "prompt"}`.
    output: rows `{"id", "prompt", "completion", "token_ids", "finish_reason"}`, in input order;
      `token_ids` are the new tokens, an EOS included; the reason is "stop" (EOS or a stop string) or "length".
    max_new_tokens: new tokens at most, whatever the prompt's length.
    batch_size: rows computed together.
    temperature: 0 is greedy.
    seed: decides what is sampled.
    stop: a completion ends before the first of these.

  Raises:
    InputError: anything that is wrong with the model, the rows or the arguments, before any device work.
  """
  need_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
  if not (math.isfinite(temperature) and temperature >= 0):
    raise InputError(f"is {temperature}", field="--temperature", mend="expected a finite number of at least 0")
  if "" in stop:
    raise InputError("is empty", field="--stop", mend="give the text that ends a completion")
  rows = read_jsonl(prompts, {"id": (str, int), "prompt": str})
  checked, tokenizer = open_model(model_name)
  config = checked.config
  ids = [prompt_ids(tokenizer, row["prompt"], config.eos_ids) for row in rows]
  for row, tokens in zip(rows, ids, strict=True):
    if not tokens:
      raise InputError("has no tokens", file=prompts, line=row["line"], field="prompt", mend="give some text")
    if len(tokens) + max_new_tokens > config.max_positions:
      raise InputError(
          f"has {len(tokens)} tokens, which with {max_new_tokens} new ones exceeds the model's context of "
          f"{config.max_positions}", file=prompts, line=row["line"], field="prompt",
          mend="shorten it, or lower --max_new_tokens")
  check_writable(output)

  model = Model(config)
  params = load_params(checked, model)

  @jax.jit
  def run(params: Params, tokens: jax.Array, lengths: jax.Array, keys: jax.Array | None) -> Generated:
    prompted = prefill(model, params, tokens, lengths, max(max_new_tokens - 1, 1))
    return decode(model, params, prompted, max_new_tokens=max_new_tokens, eos_ids=config.eos_ids,
                  temperature=temperature, keys=keys)

  results: list[dict[str, Any]] = [{}] * len(rows)
  with tqdm(total=len(rows), desc="generate", unit="prompt", disable=not sys.stderr.isatty()) as bar:
    for batch in bucketize(ids, batch_size=min(batch_size, len(rows))):
      done = run(params, jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), _keys(seed, batch, temperature))
      new_tokens, counts = np.asarray(done.tokens), np.asarray(done.num_tokens)
      for slot, index in enumerate(batch.indices):
        new = [int(token) for token in new_tokens[slot, :counts[slot]]]
        results[index] = {"id": rows[index]["id"], "prompt": rows[index]["prompt"],
                          **finish(tokenizer, ids[index], new, config.eos_ids, stop)}
      bar.update(len(batch.indices))
  write_jsonl(output, results)
  return len(rows)


def _keys(seed: int, batch: RowBatch, temperature: float) -> jax.Array | None:
  """A key for each row of a batch, from its place in the file; none where nothing is sampled."""
  if temperature == 0:
    return None
  index = np.zeros(len(batch.lengths), np.int32)
  index[:len(batch.indices)] = batch.indices
  return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(index))
