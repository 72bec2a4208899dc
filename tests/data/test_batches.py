"""Buckets and batches: every row once, in few shapes."""

from typing import Any

import numpy as np
import pytest

from relearn_jax.data.batches import bucket_length, bucketize


@pytest.mark.parametrize("length,buckets,expected", [
    (0, None, 16), (1, None, 16), (16, None, 16), (17, None, 32), (64, None, 64), (65, None, 128), (128, None, 128),
    (129, None, 192), (5, (8, 24), 8), (9, (8, 24), 24), (25, (8, 24), 32)])
def test_bucket_length(length: int, buckets: Any, expected: int) -> None:
  assert bucket_length(length, buckets) == expected


@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
@pytest.mark.parametrize("buckets", [None, (7, 40)])
def test_every_row_stands_once_in_a_batch_of_a_fixed_size(batch_size: int | None, buckets: Any) -> None:
  rng = np.random.default_rng(0)
  rows = [rng.integers(1, 9, size).tolist() for size in rng.integers(1, 90, 23)]
  batches = bucketize(rows, buckets=buckets, batch_size=batch_size)
  assert sorted(np.concatenate([batch.indices for batch in batches]).tolist()) == list(range(23))
  assert [batch.tokens.shape[1] for batch in batches] == sorted(batch.tokens.shape[1] for batch in batches)
  for batch in batches:
    assert batch.tokens.shape[0] == len(batch.lengths) == (batch_size or len(batch.indices))
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
    for slot in range(len(batch.tokens)):
      row = rows[batch.indices[slot if slot < len(batch.indices) else 0]]  # padding repeats the first row
      assert batch.lengths[slot] == len(row) and batch.tokens.shape[1] == bucket_length(len(row), buckets)
      assert batch.tokens[slot].tolist() == row + [0] * (batch.tokens.shape[1] - len(row))


def test_no_rows_no_batches() -> None:
  assert bucketize([]) == []
