"""Prompts and answers as token ids, and token ids as text: what a model is asked, trained on and scored by."""

import pathlib
from collections.abc import Sequence
from typing import Any

from relearn_jax.data.chat import Chat
from relearn_jax.data.jsonl import Row
from relearn_jax.errors import InputError


def text_ids(tokenizer: Any, text: str) -> list[int]:
  """Ids of a text that is to be continued: as the tokenizer makes them, special tokens in front included.

  An EOS that the tokenizer's template puts behind the text is left out: nothing follows it in
  training. An EOS that the text itself spells is kept.
  """
  ids = list(tokenizer(text, verbose=False)["input_ids"])
  eos = tokenizer.eos_token_id
  if eos is None or not ids or ids[-1] != eos:
    return ids
  bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
  # A text without tokens leaves the template alone: [BOS, EOS], [EOS], or one token that is both.
  by_template = ids[-len(bare):] != bare if bare else len(ids) > 1 or eos != tokenizer.bos_token_id
  return ids[:-1] if by_template else ids


def row_ids(tokenizer: Any, row: Row, file: pathlib.Path, *fields: str, chat: Chat | None = None) -> list[int]:
  """Ids of one or two fields of a row, joined as they are.

  Args:
    tokenizer: of the checkpoint.
    row: of the file.
    file: for messages.
    *fields: "prompt", and what follows it.
    chat: the first field is rendered by this template, which puts its special tokens itself.

  Raises:
    InputError: the tokenizer fails, or the embedding has no row for a token; the row is named.
  """
  text = "".join(row[field] for field in fields[1:])
  try:
    if chat:
      whole = chat.render(tokenizer, row[fields[0]]) + text
      return list(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    return text_ids(tokenizer, row[fields[0]] + text)
  except InputError as error:
    raise InputError(error.problem, file=file, line=row.line, field=fields[-1], mend=error.mend) from None
  except Exception as error:  # a vocabulary without a token for what it does not know raises a plain Exception
    raise InputError(f"cannot be tokenized ({type(error).__name__}: {str(error)[:100]})", file=file, line=row.line,
                     field=fields[-1], mend="use text that the checkpoint's tokenizer knows") from None


def prompt_ids(tokenizer: Any, row: Row, file: pathlib.Path, max_positions: int, max_new_tokens: int, *,
               chat: Chat | None = None, field: str = "--max_new_tokens") -> list[int]:
  """Ids of a row's prompt; `field` is where messages say that new tokens are set.

  Raises:
    InputError: it has none, or leaves no room for the new tokens.
  """
  ids = row_ids(tokenizer, row, file, "prompt", chat=chat)
  if not ids:
    raise InputError("gives no token", file=file, line=row.line, field="prompt",
                     mend="give text: the checkpoint's tokenizer puts no token in front of an empty prompt")
  if len(ids) + max_new_tokens > max_positions:
    raise InputError(f"has {len(ids)} tokens, and with {max_new_tokens} new ones more than the model's "
                     f"{max_positions} positions", file=file, line=row.line, field="prompt",
                     mend=f"shorten it, or lower {field}")
  return ids


def split_ids(tokenizer: Any, row: Row, file: pathlib.Path, max_positions: int, *, chat: Chat | None = None
              ) -> tuple[list[int], int]:
  """Ids of prompt and answer, and where the answer's begin.

  Raises:
    InputError: an answer without a token, nothing in front of it, or more tokens than positions.
  """
  fail = lambda problem, field, mend: InputError(problem, file=file, line=row.line, field=field, mend=mend)
  if not row["answer"]:
    raise fail("is empty", "answer", "give the text to score")
  prompt = row_ids(tokenizer, row, file, "prompt", chat=chat)
  ids = row_ids(tokenizer, row, file, "prompt", "answer", chat=chat)
  same = (mine == whole for mine, whole in zip(prompt, ids, strict=False))
  start = next((place for place, equal in enumerate(same) if not equal), min(len(prompt), len(ids)))
  if start == len(ids):
    raise fail("adds no token to the prompt", "answer", "give text that the checkpoint's tokenizer keeps")
  if start == 0:
    raise fail("leaves no token in front of the answer", "prompt",
               "give a prompt: the checkpoint's tokenizer puts no token in front of it")
  if len(ids) > max_positions:
    raise fail(f"ends at token {len(ids)}, counted with the prompt, beyond the model's {max_positions} positions",
               "answer", "shorten it or its prompt")
  return ids, start


def completion_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
  """What new tokens add to a prompt's text, special tokens left out.

  The whole is decoded and the prompt's text taken off: decoded alone, some tokenizers strip the space
  in front of the first word. Where the prompt's text is no prefix of the whole (it ended within a
  character), the new tokens are decoded alone.
  """
  decode_ids = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  before, whole = decode_ids(list(prompt)), decode_ids([*prompt, *new])
  return whole[len(before):] if whole.startswith(before) else decode_ids(list(new))
