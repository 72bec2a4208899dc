"""A cache of this test run's own, so that nothing of the user's is read or written."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where base models and compiled programs of the test run are kept."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(cache: pathlib.Path) -> None:
  """Compiled programs are shared between the tests, as a user's commands share them."""
  import jax
  jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
