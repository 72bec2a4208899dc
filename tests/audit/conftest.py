"""A finished audit that the tests of all workers read."""

import pathlib
import shutil

import pytest

from relearn_jax.workdir import one_at_a_time

from ..command import relearn
from .tiny import audit_flags


@pytest.fixture(scope="session")
def finished(shared_tmp: pathlib.Path) -> pathlib.Path:
  """The workdir of the tiny audit, not to be written to; beside it what the command printed, and its cache."""
  folder = shared_tmp / "finished"
  with one_at_a_time(folder.with_suffix(".lock"), "finished"):
    if not (folder / "stderr").exists():
      done = relearn(folder / "cache", *audit_flags(folder / "names"))  # a base of its own, so that it is trained
      (folder / "stdout").write_text(done.stdout)
      (folder / "stderr").write_text(done.stderr)
  return folder / "names"


@pytest.fixture
def workdir(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the finished workdir, the test's own."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / "names"))
