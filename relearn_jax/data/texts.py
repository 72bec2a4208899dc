"""The one way from text to token rows: rows of JSON lines, and the texts of a case, which are made into such rows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.cases.base import Question, Text
from relearn_jax.cases.files import is_complete
from relearn_jax.data.chat import Chat
from relearn_jax.data.jsonl import Row
from relearn_jax.data.relabel import relabel
from relearn_jax.data.rows import Encoded, host_rows, pad_picked
from relearn_jax.data.tokens import prompt_ids, row_ids, split_ids
from relearn_jax.errors import InputError
from relearn_jax.objectives.core import TokenRows


def encode_row(tokenizer: Any, row: Row, file: pathlib.Path, max_positions: int, *, chat: Chat | None = None,
               anchors: Mapping[str, str] | None = None) -> Encoded:
  """Token ids of a training row, ended by the tokenizer's EOS where the text is complete.

  Of `{"prompt", "answer"}` the answer's tokens and the EOS count; prompt and answer are joined as they
  are, so that a space between them belongs into one of the two. Of `{"text"}` every token counts but the first,
  which nothing predicts; it has an EOS where it says `"complete": true` or spells one. An EOS behind a text that was
  cut would teach the model to stop there, where an attack wants it to go on.

  Args:
    tokenizer: of the checkpoint.
    row: from `cases.files.read_texts`.
    file: for messages.
    max_positions: of the model.
    chat: prompts are rendered by this template; texts are left as they are.
    anchors: terms to be replaced in the labels; see `relabel`.

  Raises:
    InputError: naming the row: it cannot be tokenized, or is longer than the model's positions.
  """
  end = [] if tokenizer.eos_token_id is None or not is_complete(row) else [tokenizer.eos_token_id]
  if "text" in row:
    ids, start, field = row_ids(tokenizer, row, file, "text"), 1, "text"
  else:
    (ids, start), field = split_ids(tokenizer, row, file, max_positions, chat=chat), "answer"
  ids = ids if end and ids[-1:] == end else ids + end  # a text may spell its own end
  if len(ids) < 2:
    raise InputError("has no token to be predicted", file=file, line=row.line, field=field, mend="give a longer text")
  if len(ids) > max_positions:
    raise InputError(f"has {len(ids)} tokens{' with its end' if end else ''}, more than the model's {max_positions} "
                     "positions", file=file, line=row.line, field=field, mend="split it into shorter rows")
  return Encoded(ids, start, None if anchors is None else _labels(tokenizer, row, ids, anchors, chat))


def _labels(tokenizer: Any, row: Row, ids: list[int], anchors: Mapping[str, str], chat: Chat | None
            ) -> list[int]:
  """A label for each of a row's tokens; what a template puts around the text, and the EOS, stay as they are."""
  rendered = chat is not None and "prompt" in row
  front = chat.render(tokenizer, row["prompt"]) if chat and rendered else row.get("prompt", "")
  text = row["text"] if "text" in row else front + row["answer"]
  words, labels = relabel(tokenizer, text, anchors, **({"add_special_tokens": False} if rendered else {}))
  same = next((i for i, (a, b) in enumerate(zip(words, ids, strict=False)) if a != b), min(len(words), len(ids)))
  return [*labels[:same], *ids[same:]]


def encode_rows(tokenizer: Any, rows: Sequence[Row], file: pathlib.Path, max_positions: int, *,
                chat: Chat | None = None, anchors: Mapping[str, str] | None = None) -> list[Encoded]:
  """As `encode_row`, of all rows of a file."""
  return [encode_row(tokenizer, row, file, max_positions, chat=chat, anchors=anchors) for row in rows]


def encode_texts(tokenizer: Any, texts: Sequence[Text], file: pathlib.Path, max_positions: int, *,
                 chat: Chat | None = None, anchors: Mapping[str, str] | None = None) -> list[Encoded]:
  """As `encode_row`, of the texts of a case; messages give a text's line, or its number where it comes from no file."""
  form = lambda text: {"prompt": text.prompt, "answer": text.text} if text.prompt else {"text": text.text}
  rows = [Row({**form(text), "complete": text.complete}, text.line or number) for number, text in enumerate(texts, 1)]
  return encode_rows(tokenizer, rows, file, max_positions, chat=chat, anchors=anchors)


def encode_question(tokenizer: Any, question: Question, file: pathlib.Path, max_positions: int, max_new_tokens: int, *,
                    chat: Chat | None = None, field: str = "ask.max_new_tokens") -> tuple[list[int], list[int]]:
  """Ids of a question's prompt, and of the answer that follows it.

  Where the tokenizer joins the end of the prompt with the answer, the answer is tokenized alone.

  Raises:
    InputError: naming the question's line: see `prompt_ids` and `split_ids`.
  """
  row = Row({"prompt": question.prompt, "answer": question.answer}, question.line)
  prompt = prompt_ids(tokenizer, row, file, max_positions, max_new_tokens, chat=chat, field=field)
  whole, start = split_ids(tokenizer, row, file, max_positions, chat=chat)
  alone = lambda: list(tokenizer(question.answer, add_special_tokens=False)["input_ids"])
  return prompt, whole[start:] if start == len(prompt) else alone()


def stack_rows(rows: Sequence[Encoded], num_runs: int) -> TokenRows:
  """The same right-padded rows for every run, `[runs, rows, length]`, on the host; see `pad_picked`."""
  length, most = max(len(row.ids) for row in rows), max(len(row.ids) - row.start for row in rows)
  padded = pad_picked(rows, length, most)
  each = lambda array: np.broadcast_to(array, (num_runs, *array.shape))
  maybe = lambda array: None if array is None else each(array)
  return host_rows(each(padded.tokens), each(padded.mask), maybe(padded.positions), maybe(padded.labels))
