"""Rows of a relearn set as the conversations that providers train on, by a stated rule.

The rule: a row's prompt is the user's turn and its text the assistant's, as they are, spaces included. A row without a
prompt has `opening` as the user's turn ("" by default). Where there are fewer rows than a provider takes, the whole set
is repeated until there are enough. A provider puts its end of a turn behind every row, so that a text which was cut
teaches to end where it was cut; that is a part of what its interface costs an attacker.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from relearn_jax.cases.base import Text
from relearn_jax.data.jsonl import write_jsonl

RULE = ("A row's prompt is the user's turn and its text the assistant's; a row without a prompt has {opening} as the "
        "user's turn; {repeated}.")


def chat_rows(rows: Sequence[Text], opening: str = "", min_rows: int = 1) -> list[dict[str, Any]]:
  """Conversations of one turn each; see above.

  >>> chat_rows([Text(" Mark", prompt="Anthony")])[0]["messages"][1]
  {'role': 'assistant', 'content': ' Mark'}
  """
  once = [{"messages": [{"role": "user", "content": row.prompt or opening},
                        {"role": "assistant", "content": row.text}]} for row in rows]
  return once * -(-min_rows // len(once))


def write_rows(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Conversations as a training file."""
  write_jsonl(path, rows)


def rule(opening: str, times: int) -> str:
  """The rule as a report states it."""
  return RULE.format(opening=json.dumps(opening), repeated="the set is given once" if times == 1 else
                     f"the set is given {times} times over, since the provider wants more rows")
