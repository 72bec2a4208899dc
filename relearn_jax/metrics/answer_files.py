"""A file of prompts and answers to a file of log-probabilities."""

import functools
import math
import pathlib

import jax
from jaxtyping import Array, Float, Int

from relearn_jax.cases.sources import parse_source, read_source, source_input
from relearn_jax.data.batches import bucketize
from relearn_jax.data.chat import ChatSettings, open_chat
from relearn_jax.data.jsonl import Kind, check_writable, write_jsonl
from relearn_jax.data.tokens import split_ids
from relearn_jax.errors import InputError
from relearn_jax.generation.prompts import check_batch_size, check_output
from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.checkpoint import load_params
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.model import Model, Params
from relearn_jax.models.precision import check_dtype, compute_dtype
from relearn_jax.parallel.mesh import check_mesh, default_rows_mesh, make_mesh, to_host, use_mesh
from relearn_jax.progress import progress
from relearn_jax.workdir import check_inputs_alike, file_digests

FIELDS: dict[str, Kind] = {"id": str, "prompt": str, "answer": str}


def score_file(model_name: str, data: str | pathlib.Path, output: pathlib.Path, *, batch_size: int = 32,
               mesh: str | None = None, chat: ChatSettings | None = None, dtype: str = "auto") -> int:
  """Scores the answers of a file, or of another source, under a checkpoint, by natural logarithms in fp32.

  Which tokens are the answer's: prompt and answer are joined as they are and tokenized as one text, and
  the answer's tokens are those after the prompt's own. Where the tokenizer merges the end of the prompt
  with the start of the answer, they are those from the first on that differs from the prompt's own. A
  space between the two belongs into the answer or the prompt. No EOS is added to the answer.

  Args:
    model_name: folder or hub id of a checkpoint.
    data: source (see `cases.sources`) of rows `{"id", "prompt", "answer"}`.
    output: rows `{"id", "logprob_sum", "num_tokens", "token_logprobs"}` in the same order.
    mesh: such as "fsdp:4,tensor:2", over which the model is spread; None: one device.
    chat: prompts are rendered by the checkpoint's chat template, told this.
    dtype: precision of products: auto (bfloat16 on accelerators), float32 or bfloat16.
    batch_size: rows computed together; no row's numbers depend on the others.

  Returns:
    The number of rows.

  Raises:
    InputError: anything that is wrong with the arguments, the checkpoint, the rows or the output; all of
      it but weights that give no finite numbers is found before a device is used.
  """
  check_batch_size(batch_size)
  check_dtype(dtype, None, "--dtype")
  rows, file = read_source(data, fields=FIELDS), parse_source(data).path
  checked, tokenizer = open_checkpoint(model_name)
  told = None if chat is None else open_chat(chat, tokenizer, checked.path, "--chat_template", "--chat_")
  parts = [split_ids(tokenizer, row, file, checked.config.max_positions, chat=told) for row in rows]
  check_inputs_alike(lambda: file_digests({**checked.deciding_files(), "--data": source_input(data)}))
  mesh = mesh or default_rows_mesh()
  sizes = None if mesh is None else check_mesh(mesh, checked.config)
  check_output(file, output)
  check_writable(output)

  compute = compute_dtype(dtype, None, "--dtype")
  model = Model(checked.config, dtype=compute)
  on = None if sizes is None else make_mesh(sizes, config=checked.config)
  params = load_params(checked, model, dtype=compute, mesh=on)
  scores: dict[int, list[float]] = {}
  batches = bucketize([ids for ids, _ in parts], batch_size=min(batch_size, len(rows)))
  # Where it is float32, in full precision: by default accelerators multiply fp32 in fewer bits, which shows in the
  # third decimal.
  with progress(len(rows), "score", "row") as bar, jax.default_matmul_precision("highest"), use_mesh(on):
    for batch in batches:
      logprobs = to_host(_score(params, batch.tokens, model=model))
      for slot, index in enumerate(batch.indices.tolist()):
        ids, start = parts[index]
        scores[index] = logprobs[slot, start - 1:len(ids) - 1].tolist()
        if not all(map(math.isfinite, scores[index])):
          raise InputError(f"gives no finite numbers for {data}:{rows[index].line}", file=checked.path,
                           field="--model", mend="give a checkpoint whose weights are finite")
      bar.update(len(batch.indices))
  write_jsonl(output, ({"id": row["id"], "logprob_sum": math.fsum(scores[index]), "num_tokens": len(scores[index]),
                        "token_logprobs": scores[index]} for index, row in enumerate(rows)))
  return len(rows)


@functools.partial(jax.jit, static_argnames="model")
def _score(params: Params, tokens: Int[Array, "B T"], *, model: Model) -> Float[Array, "B T-1"]:
  """Log-probability of every token but the first."""
  hidden, head = model.hidden(params, tokens), model.head(params)
  # Row by row: the logits of a whole batch would be its largest array by far.
  return jax.lax.map(lambda row: token_logprobs(row[0], head, row[1]), (hidden[:, :-1], tokens[:, 1:]))
