"""Text to token rows: ids, loss masks and stacking over runs."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from relearn_jax.cases.base import Text
from relearn_jax.objectives.core import TokenRows


def encode(tokenizer: Any, row: Text) -> list[int]:
  """Token ids of a training text: BOS, the text, and EOS where the text is complete.

  Special tokens are put explicitly, whatever the tokenizer's own template adds, so that training and
  prompting agree and a cut text never ends in EOS.
  """
  ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
  start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
  end = [tokenizer.eos_token_id] if row.complete and tokenizer.eos_token_id is not None else []
  return start + ids + end


def host_rows(tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray | None = None) -> TokenRows:
  """Rows that are still on the host."""
  return TokenRows(cast(Any, tokens), cast(Any, mask), positions=cast(Any, positions))


def pad_tokens(rows: Sequence[Sequence[int]], num_rows: int, length: int, starts: Sequence[int] | None = None
               ) -> TokenRows:
  """Right-pads to `[num_rows, length]`; of each row the tokens from `starts` on count (from 1 by default)."""
  tokens = np.zeros((num_rows, length), np.int32)
  mask = np.zeros((num_rows, length), np.float32)
  for index, ids in enumerate(rows):
    tokens[index, :len(ids)] = ids
    mask[index, starts[index] if starts else 1:len(ids)] = 1.0
  return host_rows(tokens, mask)


def stack_runs(runs: Sequence[Sequence[Sequence[int]]]) -> TokenRows:
  """Token rows of several runs as `[runs, rows, length]`; runs with fewer rows get masked ones."""
  num_rows = max(len(rows) for rows in runs)
  length = max(len(ids) for rows in runs for ids in rows)
  padded = [pad_tokens(rows, num_rows, length) for rows in runs]
  return host_rows(np.stack([p.tokens for p in padded]), np.stack([p.mask for p in padded]))
