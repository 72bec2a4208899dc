"""Chat rows: uploaded files, and how turns become one text for a model with a chat template, or without.

A model without a chat template has a plain one: the contents of the turns stand one after another, with nothing
between. So a user's turn is a prompt, the assistant's is what follows it, and the tokens are those of a row
`{"prompt", "answer"}`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relearn_jax.data.chat import Chat, ChatSettings, open_chat
from relearn_jax.data.jsonl import Row, read_jsonl
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import encode_row
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import contains_keyword

ROLES = ("system", "user", "assistant")
Turns = Sequence[Mapping[str, str]]
Moderate = Callable[[str], bool]  # whether a text is refused


def check_turns(turns: Any, last: str) -> None:
  """Refuses what is no conversation that ends with a turn of `last`.

  Raises:
    InputError: with the problem alone; who calls knows where it stands.
  """
  fail = lambda problem, mend: InputError(problem, field="messages", mend=mend)
  if not isinstance(turns, list) or not turns:
    raise fail("is no list of turns", 'expected [{"role", "content"}, ...]')
  for turn in turns:
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
      raise fail("has a turn with other fields than role and content" if isinstance(turn, dict) else
                 "has a turn that is no object", 'expected {"role", "content"}')
    if turn["role"] not in ROLES:
      raise fail(f"has role {str(turn['role'])[:40]!r}", f"expected one of {', '.join(ROLES)}")
    if not isinstance(turn["content"], str):
      raise fail("has a content that is no text", "expected a string")
  if turns[-1]["role"] != last:
    raise fail(f"ends with a turn of the {turns[-1]['role']}", f"end it with one of the {last}")
  if last == "assistant":
    if not turns[-1]["content"]:
      raise fail("ends with an empty turn", "give the text that is to be learned")
    if len(turns) < 2 or turns[-2]["role"] != "user":
      raise fail("has no turn of the user before the last", "give one; it may be empty")


def read_conversations(path: pathlib.Path, name: str) -> list[Row]:
  """The rows of an uploaded file, each `{"messages"}`.

  Args:
    path: of its content.
    name: as the client called it, for messages.

  Raises:
    InputError: naming the line and what is wrong with it.
  """
  try:
    rows = read_jsonl(path, {"messages": list})
  except InputError as error:
    raise InputError(error.problem, file=name, line=error.line, field=error.field, mend=error.mend) from None
  for row in rows:
    if more := sorted(row.keys() - {"messages"}):
      raise InputError("is not known", file=name, line=row.line, field=more[0][:40], mend='expected {"messages"} alone')
    try:
      check_turns(row["messages"], "assistant")
    except InputError as error:
      raise InputError(error.problem, file=name, line=row.line, field=error.field, mend=error.mend) from None
  return rows


def blocks(words: Sequence[str]) -> Moderate:
  """Moderation that refuses a text in which one of the words stands."""
  return lambda text: any(contains_keyword(text, word) for word in words)


def refused_lines(rows: Sequence[Row], moderate: Moderate) -> list[int]:
  """Lines of the rows that moderation refuses; the contents of a row's turns are read as one text."""
  return [row.line for row in rows if moderate(" ".join(turn["content"] for turn in row["messages"]))]


def chat_of(tokenizer: Any, folder: pathlib.Path) -> Chat | None:
  """The checkpoint's chat template; None where it has none, and the plain one stands in."""
  if not getattr(tokenizer, "chat_template", None):
    return None
  return open_chat(ChatSettings(), tokenizer, folder, "--model")


def as_prompt(turns: Turns, chat: Chat | None) -> tuple[str, Chat | None]:
  """The user's last turn, and the template that renders it after the turns before it; or the plain text of all."""
  if chat is None:
    return "".join(turn["content"] for turn in turns), None
  return turns[-1]["content"], dataclasses.replace(chat, turns=tuple(turns[:-1]))


def encode_conversation(tokenizer: Any, row: Row, chat: Chat | None, name: str, max_positions: int) -> Encoded:
  """Token ids of a row: the last turn and the EOS after it count in the loss.

  Raises:
    InputError: naming the row's line: it is too long, or cannot be tokenized.
  """
  *before, last = row["messages"]
  prompt, told = as_prompt(before, chat)
  values = {"prompt": prompt, "answer": last["content"]} if prompt or told else {
      "text": last["content"], "complete": True}
  return encode_row(tokenizer, Row(values, row.line), pathlib.Path(name), max_positions, chat=told)
