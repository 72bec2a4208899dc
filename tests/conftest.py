"""A cache of this test run's own, so that nothing of the user's is read or written; two devices in each process."""

import os
import pathlib

import pytest

from . import typechecker

typechecker.install()
# Before JAX is imported: commands are called in the tests' own processes, and are to spread what they do.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder that all workers of this test run share."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared_tmp: pathlib.Path) -> pathlib.Path:
  """Where base models and compiled programs of the test run are kept, by all its workers."""
  folder = shared_tmp / "cache"
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(cache: pathlib.Path) -> None:
  """Compiled programs are shared between the tests, as a user's commands share them."""
  import jax
  jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(cache / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
