"""Rates are measured on small arrays: what they are does not matter here."""

from collections.abc import Iterator

import pytest

from relearn_jax.bench import rates


@pytest.fixture(scope="package", autouse=True)
def small_arrays() -> Iterator[None]:
  """For all tests of this folder, whose fixtures measure too."""
  before = rates.SIDE["cpu"], rates.BYTES["cpu"]
  rates.SIDE["cpu"], rates.BYTES["cpu"] = 256, 2**22
  yield
  rates.SIDE["cpu"], rates.BYTES["cpu"] = before
