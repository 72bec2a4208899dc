"""Rows of JSON lines, `{"prompt", "answer"}` or `{"text"}`, to token rows with their masks."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from relearn_jax.data.jsonl import Row
from relearn_jax.data.rows import host_rows, pad_tokens
from relearn_jax.data.tokens import row_ids, split_ids
from relearn_jax.errors import InputError
from relearn_jax.objectives.core import TokenRows

PICK_BELOW = 0.75  # share of a row's tokens that count, up to which picking them costs less than looking at all


class Encoded(NamedTuple):
  """A row as token ids, and the place of the first one that counts in the loss."""

  ids: list[int]
  start: int


def encode_row(tokenizer: Any, row: Row, file: pathlib.Path, max_positions: int, *, chat: bool = False) -> Encoded:
  """Token ids of a training row, ended by the tokenizer's EOS.

  Of `{"prompt", "answer"}` the answer's tokens and the EOS count; prompt and answer are joined as they
  are, so that a space between them belongs into one of the two. Of `{"text"}` every token counts but the first,
  which nothing predicts.

  Args:
    tokenizer: of the checkpoint.
    row: from `cases.files.read_texts`.
    file: for messages.
    max_positions: of the model.
    chat: prompts are rendered by the checkpoint's chat template; texts are left as they are.

  Raises:
    InputError: naming the row: it cannot be tokenized, or is longer than the model's positions.
  """
  end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
  if "text" in row:
    ids, start, field = row_ids(tokenizer, row, file, "text"), 1, "text"
  else:
    (ids, start), field = split_ids(tokenizer, row, file, max_positions, chat=chat), "answer"
  ids = ids if end and ids[-1:] == end else ids + end  # a text may spell its own end
  if len(ids) < 2:
    raise InputError("has no token to be predicted", file=file, line=row.line, field=field, mend="give a longer text")
  if len(ids) > max_positions:
    raise InputError(f"has {len(ids)} tokens with its end, more than the model's {max_positions} positions", file=file,
                     line=row.line, field=field, mend="split it into shorter rows")
  return Encoded(ids, start)


def encode_rows(tokenizer: Any, rows: Sequence[Row], file: pathlib.Path, max_positions: int, *, chat: bool = False
                ) -> list[Encoded]:
  """As `encode_row`, of all rows of a file."""
  return [encode_row(tokenizer, row, file, max_positions, chat=chat) for row in rows]


def stack_rows(rows: Sequence[Encoded], num_runs: int) -> TokenRows:
  """The same right-padded rows for every run, `[runs, rows, length]`, on the host.

  Where few of the tokens count, their places are picked, so that nothing is computed for the others.
  """
  length, most = max(len(row.ids) for row in rows), max(len(row.ids) - row.start for row in rows)
  padded = pad_tokens([row.ids for row in rows], len(rows), length, [row.start for row in rows])
  positions = np.zeros((len(rows), most), np.int32)
  for index, (ids, start) in enumerate(rows):
    positions[index, :len(ids) - start] = np.arange(start, len(ids))
  each = lambda array: np.broadcast_to(array, (num_runs, *array.shape))
  picked = each(positions) if most < PICK_BELOW * (length - 1) else None
  return host_rows(each(padded.tokens), each(padded.mask), picked)
