"""Short rows that share a sequence, so that fewer padded tokens are worked through."""

import bisect
from collections.abc import Sequence

import numpy as np

from relearn_jax.data.relabel import UNCOUNTED
from relearn_jax.data.rows import PICK_BELOW, Encoded, host_rows
from relearn_jax.data.texts import stack_rows
from relearn_jax.objectives.core import TokenRows


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Rows by sequence: each row, the longest first, goes where it leaves the least room.

  At most 11/9 of the fewest sequences possible, and four more (Johnson, 1973). Rows of a length keep their order.

  Args:
    lengths: tokens of each row.
    size: tokens of a sequence, at least those of the longest row.

  >>> best_fit([3, 5, 2, 4], 7)
  [[1, 2], [3, 0]]
  """
  sequences: list[list[int]] = []
  rooms: list[tuple[int, int]] = []  # ascending, of the sequences that have any, with their numbers
  for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
    place = bisect.bisect_left(rooms, (lengths[row], 0))
    if place < len(rooms):
      room, number = rooms.pop(place)
    else:
      room, number = size, len(sequences)
      sequences.append([])
    sequences[number].append(row)
    if left := room - lengths[row]:
      bisect.insort(rooms, (left, number))
  return sequences


def pack_rows(rows: Sequence[Encoded], num_runs: int) -> TokenRows:
  """The same packed rows for every run, `[runs, sequences, length]`, on the host; the longest row sets the length.

  Where no two rows fit into a sequence, they are left as they are.

  `segments` numbers the rows of a sequence from 1, and is 0 at padding. A row's first token counts in no loss, so that
  nothing is predicted across rows.
  """
  length = max(len(row.ids) for row in rows)
  sequences = best_fit([len(row.ids) for row in rows], length)
  if len(sequences) == len(rows):
    return stack_rows(rows, num_runs)
  packed = [_join([rows[i] for i in some]) for some in sequences]
  fill = lambda parts: np.stack([np.pad(part, (0, length - len(part))) for part in parts])
  each = lambda parts: np.broadcast_to(filled := fill(parts), (num_runs, *filled.shape))
  ids, counted, labels, segments = zip(*packed, strict=True)
  places = [np.flatnonzero(some).astype(np.int32) for some in counted]
  most = max(map(len, places))
  positions = np.stack([np.pad(some, (0, most - len(some))) for some in places])
  given = any(row.labels is not None for row in rows)
  return host_rows(
      each(ids), each(counted), np.broadcast_to(positions, (num_runs, *positions.shape)) if
      most < PICK_BELOW * (length - 1) else None, each(labels) if given else None, each(segments))


def _join(rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, which of them count, labels and segments of one sequence."""
  join = lambda parts, kind: np.concatenate([np.asarray(part, kind) for part in parts])
  labels = [np.array(row.ids if row.labels is None else row.labels) for row in rows]
  counts = [(np.arange(len(row.ids)) >= row.start) & (label != UNCOUNTED)
            for row, label in zip(rows, labels, strict=True)]
  return (join([row.ids for row in rows], np.int32), join(counts, np.float32),
          join([np.maximum(label, 0) for label in labels], np.int32),
          join([np.full(len(row.ids), number) for number, row in enumerate(rows, 1)], np.int32))


def sequences_of(batch_size: int, num_rows: int, num_sequences: int) -> int:
  """Sequences of a step that hold about as many rows as a batch of them; all sequences for a batch of all rows.

  >>> sequences_of(32, 400, 171), sequences_of(400, 400, 171), sequences_of(1, 400, 171)
  (14, 171, 1)
  """
  return num_sequences if batch_size >= num_rows else max(1, round(batch_size * num_sequences / num_rows))


def num_packed(rows: TokenRows) -> int:
  """Rows in the sequences of one run."""
  assert rows.segments is not None
  return int(np.asarray(rows.segments)[0].max(-1).sum())


def packing_line(name: str, rows: TokenRows) -> str:
  """What packing a data set has brought, for people."""
  (_, sequences, length), before = rows.tokens.shape, num_packed(rows)
  real = int((np.asarray(rows.segments)[0] > 0).sum())
  return (f"{name}: packed {before} rows in {sequences} sequences of {length} tokens, "
          f"{real / (before * length):.2f} -> {real / (sequences * length):.2f} real tokens per padded")
