"""Rates are measured on small arrays: what they are does not matter here."""

import pytest

from relearn_jax.bench import rates


@pytest.fixture(scope="package", autouse=True)
def small_arrays() -> None:
  """For all tests of this folder, whose fixtures measure too."""
  rates.SIDE["cpu"], rates.BYTES["cpu"] = 256, 2**22
