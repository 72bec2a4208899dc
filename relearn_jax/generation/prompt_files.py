"""A file of prompts to a file of completions."""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from relearn_jax.cases.sources import parse_source, read_source, source_input
from relearn_jax.data.chat import ChatSettings, open_chat
from relearn_jax.data.jsonl import Kind, Row, check_writable, write_jsonl
from relearn_jax.data.tokens import completion_text, prompt_ids, row_ids
from relearn_jax.errors import InputError
from relearn_jax.generation.decode import Generated, decode, prefill
from relearn_jax.generation.gather import gather_weights
from relearn_jax.generation.prefix import bucketize_after, read_prefix, shared_ids
from relearn_jax.generation.prompts import check_batch_size, check_output, end_ids
from relearn_jax.generation.slots import complete_rows
from relearn_jax.generation.stop import find_stop
from relearn_jax.models.checkpoint import load_params
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.model import Model, Params, unstack
from relearn_jax.models.precision import check_dtype, compute_dtype
from relearn_jax.parallel.mesh import check_mesh, default_rows_mesh, make_mesh, use_mesh
from relearn_jax.progress import progress
from relearn_jax.workdir import check_inputs_alike, file_digests

FIELDS: dict[str, Kind] = {"id": str, "prompt": str}


def generate_file(model_name: str, prompts: str | pathlib.Path, output: pathlib.Path, *, max_new_tokens: int,
                  batch_size: int = 32, temperature: float = 0.0, seed: int = 0, samples: int = 1,
                  stop: Sequence[str] = (), mesh: str | None = None, chat: ChatSettings | None = None,
                  dtype: str = "auto", prefix: str = "") -> int:
  """Completes the prompts of a file, or of another source.

  A row's completion depends on its prompt, and if sampled on its place in the file and the seed, but on
  no other row and not on the batch size. Prompts are given as they are, unless `chat` is set. What stands before all of
  them, `prefix` and what a template puts before the user's text, is read once.

  Args:
    model_name: folder or hub id of a checkpoint.
    prompts: source (see `cases.sources`) of rows `{"id", "prompt"}`.
    output: rows `{"id", "prompt", "completion", "token_ids", "finish_reason"}` in the prompts' order.
      `completion` is the text after the prompt, without special tokens; `token_ids` are the new tokens,
      an EOS that ended them included; `finish_reason` is "stop" (an EOS or a stop string) or "length". Of several
      samples each is a row, with its number as "sample" behind the prompt.
    max_new_tokens: new tokens at most, whatever the prompt's length.
    mesh: such as "fsdp:4,tensor:2", over which the model is spread; None: one device.
    chat: prompts are rendered by the checkpoint's chat template, each as the user's turn, told this.
    dtype: precision of products: auto (bfloat16 on accelerators), float32 or bfloat16.
    batch_size: rows computed together.
    temperature: 0 is greedy.
    seed: decides what is sampled.
    samples: completions of each prompt, which is read once; the first is what it is without the others.
    stop: a completion ends before the first of these to be complete, and `token_ids` with the token that
      completes it. They are looked for after decoding, so they shorten the text, not the time.
    prefix: text that is put before every prompt; in the user's turn, where `chat` is set.

  Returns:
    The number of completions.

  Raises:
    InputError: anything that is wrong with the arguments, the checkpoint, the prompts or the output; all
      of it but weights that give no finite numbers is found before a device is used.
  """
  _check_arguments(max_new_tokens, batch_size, temperature, seed, samples, stop)
  check_dtype(dtype, None, "--dtype")
  rows, file = read_source(prompts, fields=FIELDS), parse_source(prompts).path
  checked, tokenizer = open_checkpoint(model_name)
  eos_ids = end_ids(checked)
  told = None if chat is None else open_chat(chat, tokenizer, checked.path, "--chat_template", "--chat_")
  positions = checked.config.max_positions
  after = lambda row: Row({**row, "prompt": prefix + row["prompt"]}, row.line) if prefix else row
  asked = [prompt_ids(tokenizer, after(row), file, positions, max_new_tokens, chat=told) for row in rows]
  shared = shared_ids(lambda text: row_ids(tokenizer, after(Row({"prompt": text}, 0)), file, "prompt", chat=told))
  check_inputs_alike(lambda: file_digests({**checked.deciding_files(), "--prompts": source_input(prompts),
                                           "--prefix": prefix}))
  mesh = mesh or default_rows_mesh()
  sizes = None if mesh is None else check_mesh(mesh, checked.config)
  check_output(file, output)
  check_writable(output)

  compute = compute_dtype(dtype, None, "--dtype")
  model = Model(checked.config, dtype=compute)
  on = None if sizes is None else make_mesh(sizes, config=checked.config)
  params = unstack(load_params(checked, model, dtype=compute, mesh=on))
  keys = _row_keys(seed, len(rows), samples) if temperature else None
  finished: dict[tuple[int, int], dict[str, Any]] = {}
  # A smaller file needs no larger batch.
  slots = max(samples, min(batch_size, len(rows) * samples))
  # Where it is float32, in full precision: by default accelerators multiply fp32 in fewer bits, and near-ties between
  # tokens would fall differently than elsewhere.
  with progress(len(rows) * samples, "generate", "row") as bar, jax.default_matmul_precision("highest"), use_mesh(on):
    read = read_prefix(params, np.array(shared, np.int32), model=model) if shared else None
    for batch, begins in bucketize_after(asked, shared):
      for done in complete_rows(params, batch, None if keys is None else keys[batch.indices], temperature, model=model,
                                batch_size=slots, max_new_tokens=max_new_tokens, eos_ids=eos_ids,
                                prefix=read if begins else None):
        if not done.sound:
          raise InputError(f"gives no finite numbers for {prompts}:{rows[done.row].line}", file=checked.path,
                           field="--model", mend="give a checkpoint whose weights are finite")
        finished[done.row, done.sample] = finish(tokenizer, asked[done.row], done.tokens, done.finished, stop)
        bar.update(1)
  number = lambda sample: {"sample": sample} if samples > 1 else {}
  write_jsonl(output, ({"id": row["id"], "prompt": row["prompt"], **number(sample), **finished[index, sample]}
                       for index, row in enumerate(rows) for sample in range(samples)))
  return len(rows) * samples


def _row_keys(seed: int, rows: int, samples: int) -> Key[Array, "rows samples"]:
  """A key for each sample of each row; those of the first sample do not depend on how many there are."""
  root = jax.random.key(seed)
  roots = [root, *(jax.random.fold_in(root, 2**32 - sample) for sample in range(1, samples))]  # no row has that number
  of_rows = jax.vmap(jax.random.fold_in, (None, 0))
  return jnp.stack([of_rows(one, jnp.arange(rows)) for one in roots], 1)


def _check_arguments(max_new_tokens: int, batch_size: int, temperature: float, seed: int, samples: int,
                     stop: Sequence[str]) -> None:
  if max_new_tokens < 1:
    raise InputError(f"is {max_new_tokens}", field="--max_new_tokens", mend="expected at least 1")
  check_batch_size(batch_size)
  if not (math.isfinite(temperature) and temperature >= 0):
    raise InputError(f"is {temperature}", field="--temperature", mend="expected 0 (greedy) or a positive number")
  if not 0 <= seed < 2**32:  # a larger one is cut to 32 bits in silence
    raise InputError(f"is {seed}", field="--seed", mend="expected 0 to 4294967295")
  if samples < 1 or (samples > 1 and not temperature):
    raise InputError(f"is {samples}", field="--samples", mend="expected at least 1, and 1 at temperature 0")
  if "" in stop:
    raise InputError("is empty", field="--stop", mend="give text, or leave the flag out")


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_ids"))
def complete(params: Params, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], temperature: Float[Array, ""],
             keys: Key[Array, " B"] | None, *, model: Model, max_new_tokens: int, eos_ids: tuple[int, ...]
             ) -> Generated:
  """Completions of right-padded prompts; see `decode.prefill` and `decode.decode`."""
  params = gather_weights(model, params)
  prompted = prefill(model, params, tokens, lengths, max(1, max_new_tokens - 1))
  return decode(model, params, prompted, max_new_tokens=max_new_tokens, eos_ids=eos_ids, temperature=temperature,
                keys=keys)


def finish(tokenizer: Any, prompt: Sequence[int], new: list[int], ended: bool, stop: Sequence[str]
            ) -> dict[str, Any]:
  """The fields that a completion adds to its row."""
  # Without the EOS, which a tokenizer need not know as a special token.
  words = new[:-1] if ended else new
  text = completion_text(tokenizer, prompt, words)
  span = find_stop(text, stop)
  if span is None:
    return {"completion": text, "token_ids": new, "finish_reason": "stop" if ended else "length"}
  few, enough = 0, len(words)  # once the stop string is complete it stays, so that halving finds its token
  while enough - few > 1:
    middle = (few + enough) // 2
    complete = find_stop(completion_text(tokenizer, prompt, words[:middle]), stop) is not None
    few, enough = (few, middle) if complete else (middle, enough)
  return {"completion": text[:span[0]], "token_ids": words[:enough], "finish_reason": "stop"}
