"""Token rows: ids, loss masks and labels, padded and stacked over runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from relearn_jax.data.relabel import UNCOUNTED
from relearn_jax.objectives.core import TokenRows

PICK_BELOW = 0.75  # share of a row's tokens that count, up to which picking them costs less than looking at all


class Encoded(NamedTuple):
  """A row as token ids.

  Attributes:
    ids: the tokens.
    start: place of the first one that counts in the loss.
    labels: what is to be predicted at each place, `UNCOUNTED` where nothing is; None: the tokens themselves.
  """

  ids: list[int]
  start: int = 1
  labels: list[int] | None = None


def host_rows(tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray | None = None,
              labels: np.ndarray | None = None, segments: np.ndarray | None = None) -> TokenRows:
  """Rows that are still on the host."""
  return TokenRows(cast(Any, tokens), cast(Any, mask), positions=cast(Any, positions), labels=cast(Any, labels),
                   segments=cast(Any, segments))


def pad_tokens(rows: Sequence[Encoded], num_rows: int, length: int) -> TokenRows:
  """Right-pads to `[num_rows, length]`; with labels where any row has some."""
  tokens, labels = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, length), np.int32)
  mask = np.zeros((num_rows, length), np.float32)
  for index, row in enumerate(rows):
    size = len(row.ids)
    given = np.array(row.ids if row.labels is None else row.labels)
    tokens[index, :size], labels[index, :size] = row.ids, np.maximum(given, 0)
    mask[index, row.start:size] = given[row.start:] != UNCOUNTED
  return host_rows(tokens, mask, labels=labels if any(row.labels is not None for row in rows) else None)


def pad_picked(rows: Sequence[Encoded], length: int, most: int) -> TokenRows:
  """Right-pads to `[rows, length]`; where few of the tokens count, their places are picked.

  Then nothing is computed for the others.

  Args:
    rows: one without tokens is empty.
    length: of the longest row.
    most: tokens that count, of the row with the most.
  """
  padded = pad_tokens(rows, len(rows), length)
  if most >= PICK_BELOW * (length - 1):
    return padded
  positions = np.zeros((len(rows), most), np.int32)
  for index, row in enumerate(rows):
    counted = np.arange(row.start, len(row.ids))
    positions[index, :len(counted)] = counted
  return padded._replace(positions=cast(Any, positions))


def stack_runs(runs: Sequence[Sequence[Encoded]]) -> TokenRows:
  """Token rows of several runs as `[runs, rows, length]`; runs with fewer rows get masked ones."""
  num_rows = max(len(rows) for rows in runs)
  length = max(len(row.ids) for rows in runs for row in rows)
  padded = [pad_tokens(rows, num_rows, length) for rows in runs]
  labels = None if padded[0].labels is None else np.stack([cast(Any, p.labels) for p in padded])
  return host_rows(np.stack([p.tokens for p in padded]), np.stack([p.mask for p in padded]), labels=labels)
