"""Ragged token rows into few shapes: length buckets and batches of a fixed size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RowBatch(NamedTuple):
  """Rows of similar length, right-padded.

  Attributes:
    indices: where each row stood; shorter than the batch when the last rows are padding.
    tokens: `[B, T]`, 0 at padding; padding rows repeat the first row.
    lengths: `[B]` real tokens.
  """

  indices: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray


def bucket_length(length: int, buckets: Sequence[int] | None = None) -> int:
  """The smallest bucket that holds `length` tokens; multiples of 16 to 64, then of 64, by default.

  A length beyond the last given bucket is rounded up to the default grid.
  """
  for bucket in buckets or ():
    if length <= bucket:
      return bucket
  unit = 16 if length <= 64 else 64
  return max(-(-length // unit) * unit, unit)


def bucketize(rows: Sequence[Sequence[int]], *, buckets: Sequence[int] | None = None, batch_size: int | None = None
              ) -> list[RowBatch]:
  """Groups rows by bucket, ascending, into batches.

  Args:
    rows: token ids.
    buckets: padded lengths; see `bucket_length`.
    batch_size: every batch has exactly this many rows (the last one of a bucket is padded), so that a
      bucket has one shape. None: one batch a bucket, as long as it has rows.
  """
  groups: dict[int, list[int]] = {}
  for index, row in enumerate(rows):
    groups.setdefault(bucket_length(len(row), buckets), []).append(index)
  batches = []
  for length, members in sorted(groups.items()):
    size = batch_size or len(members)
    for start in range(0, len(members), size):
      indices = np.array(members[start:start + size])
      tokens, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
      for slot in range(size):
        row = rows[indices[slot if slot < len(indices) else 0]]
        tokens[slot, :len(row)], lengths[slot] = row, len(row)
      batches.append(RowBatch(indices, tokens, lengths))
  return batches
