"""launch/ray on a Ray cluster of two nodes of this machine."""

import json
import pathlib
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from ..command import ROOT, argv, environment, relearn, summary
from ..parallel.several import smallest_audit


@pytest.mark.slow
def test_a_grid_on_two_nodes(cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("ray", reason="pip install 'relearn_jax[ray]'")
  from ray.cluster_utils import Cluster
  grid = ("--config.unlearn.methods=('ga', 'gd')",)
  relearn(cache, *smallest_audit(tmp_path / "whole", *grid))
  own = environment(cache, JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT),
                    RAY_USAGE_STATS_ENABLED="0")
  for name, value in own.items():
    monkeypatch.setenv(name, value)  # of the nodes
  cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
  try:
    cluster.add_node(num_cpus=1)
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "ray" / "run.py", "-n", "2", f"--address={cluster.address}", "--",
         *argv(*smallest_audit(tmp_path / "w", *grid, "--claim"))],
        capture_output=True, text=True, timeout=400, check=False)
  finally:
    cluster.shutdown()
  assert done.returncode == 0, done.stdout + done.stderr
  for name in ("answers.parquet", "results.parquet"):
    assert pq.read_table(tmp_path / "w" / name).equals(pq.read_table(tmp_path / "whole" / name)), name
  assert summary(tmp_path / "w") == summary(tmp_path / "whole")
  by = {json.loads(path.read_text())["pid"] for path in (tmp_path / "w" / "stages").glob("*.done.json")}
  assert len(by) == 2  # both took part
