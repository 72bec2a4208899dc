"""The tiny audit on other numbers of devices and other meshes."""

import json
import pathlib

import pyarrow.parquet as pq
import pytest

from ..command import relearn, summary
from .tiny import audit_flags


@pytest.mark.slow  # tests/parallel/test_several.py has an audit on two processes
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_the_number_of_devices_changes_nothing(finished: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path,
                                               devices: int) -> None:
  """Weights, answers and every number equal to the bit: 8 runs and 14 cells on 2 devices, and on others."""
  relearn(cache, *audit_flags(tmp_path), JAX_NUM_CPU_DEVICES=str(devices))
  for name in ("answers.parquet", "results.parquet"):
    ours, theirs = (pq.read_table(folder / name) for folder in (tmp_path, finished))
    assert ours.equals(theirs), name
  assert summary(tmp_path) == summary(finished)  # the hashes of the weights among it
  versions = json.loads((tmp_path / "summary.json").read_text())["versions"]
  assert versions["devices"].startswith(f"{devices} x")


@pytest.mark.slow  # tests/parallel/test_spread.py has a spread run of each kind
def test_runs_that_are_spread_over_devices_end_alike(finished: pathlib.Path, cache: pathlib.Path,
                                                     tmp_path: pathlib.Path) -> None:
  relearn(cache, *audit_flags(tmp_path / "spread"), "--mesh=fsdp:2")
  ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "spread", finished))
  assert [cell["variant"] for cell in ours["cells"]] == [cell["variant"] for cell in theirs["cells"]]
  for mine, other in zip(ours["cells"], theirs["cells"], strict=True):
    assert mine["mean"] == pytest.approx(other["mean"], abs=1e-3)  # fp32 sums in another order, some fifty steps on
  words = lambda summary: {v: row["verdict"] for v, row in summary["verdicts"]["ga"].items()}
  assert words(ours) == words(theirs)


@pytest.mark.parametrize(("mesh", "problem"), [
    ("fsdp:3", "`--mesh` has fsdp:3, which does not divide hidden_size=32"),
    ("tensor:4", "`--mesh` has tensor:4, which does not divide num_attention_heads=2"),
    ("fsdp:4", "which needs 4 devices, and there are 2"), ("fdsp:2", "has axis 'fdsp' (did you mean 'fsdp'?)")])
def test_meshes_that_cannot_be(cache: pathlib.Path, tmp_path: pathlib.Path, mesh: str, problem: str) -> None:
  done = relearn(cache, *audit_flags(tmp_path / "x"), f"--mesh={mesh}", status=2)
  assert problem in done.stderr
