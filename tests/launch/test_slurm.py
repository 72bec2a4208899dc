"""launch/slurm on a real SLURM of two nodes: one audit over both, a grid by an array, a job that is cancelled."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import pyarrow.parquet as pq
import pytest

from relearn_jax.parallel.leases import SUFFIX, read_lease

from ..audit.test_restarts import logged
from ..command import ROOT, relearn, summary
from ..parallel.several import smallest_audit
from .cluster import Cluster, free_ports, missing, started

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
SCRIPT = ROOT / "launch" / "slurm" / "relearn.sbatch"
GRID = ("--config.unlearn.methods=('ga', 'gd')",)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
  with started(tmp_path_factory.mktemp("slurm") / "two") as found:
    yield found


@pytest.fixture
def submit(cluster: Cluster, cache: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., str]:
  """sbatch: flags of its own, and a command; gives the job's number."""
  def call(flags: list[str], line: list[str]) -> str:
    own = {"RELEARN": f"{sys.executable} -m relearn_jax", "RELEARN_CACHE": str(cache), "PYTHONPATH": str(ROOT),
           "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
           # The nodes' names are known to this SLURM alone.
           "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"}
    return cluster.call("sbatch", "--parsable", *flags, f"--chdir={ROOT}", f"--output={tmp_path}/%x-%j.log", SCRIPT,
                        *line, more=own).split(";")[0]
  return call


def shown(folder: pathlib.Path) -> str:
  return "".join(path.read_text(errors="replace") for path in sorted(folder.glob("relearn-*.log")))


def until(reached: Callable[[], bool], folder: pathlib.Path, seconds: float = 300) -> None:
  end = time.monotonic() + seconds
  while not reached():
    assert time.monotonic() < end and "Traceback" not in shown(folder), shown(folder)
    time.sleep(0.1)


def assert_same_rows(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  for name in ("answers.parquet", "results.parquet"):
    assert pq.read_table(ours / name).equals(pq.read_table(theirs / name)), name
  assert summary(ours) == summary(theirs)


@pytest.fixture(scope="module")
def whole(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("whole")
  relearn(cache, *smallest_audit(folder / "w", *GRID))
  return folder / "w"


def test_what_is_submitted_could_run(cluster: Cluster) -> None:
  cluster.call("sbatch", "--test-only", "--nodes=2", "--ntasks-per-node=1", SCRIPT, "audit")
  cluster.call("sbatch", "--test-only", "--array=0-7", SCRIPT, "audit", "--claim")


def test_one_audit_on_two_nodes_that_is_cancelled_and_submitted_again(
    cluster: Cluster, submit: Callable[..., str], whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
  line = smallest_audit(tmp_path / "w", *GRID, "--config.checkpoint_seconds=1000")
  flags = ["--nodes=2", "--ntasks-per-node=1"]
  job = submit(flags, line)
  until(logged(tmp_path / "w", "unlearn-ga", 4), tmp_path)
  cluster.call("scancel", job)
  assert cluster.wait(job) == ["CANCELLED"]  # and is not put into the queue again
  assert "relearn audit: interrupted; run the same command again to continue" in shown(tmp_path)
  job = submit(flags, line)
  assert cluster.wait(job) == ["COMPLETED"], shown(tmp_path)
  assert_same_rows(tmp_path / "w", whole)
  versions = json.loads((tmp_path / "w" / "summary.json").read_text())["versions"]
  assert versions["devices"].startswith("2 x")


def test_a_job_that_is_told_to_stop_is_queued_again(cluster: Cluster, submit: Callable[..., str], whole: pathlib.Path,
                                                    tmp_path: pathlib.Path) -> None:
  """As SLURM tells its steps before the time limit: its saved state is what it goes on from."""
  line = smallest_audit(tmp_path / "w", *GRID, "--config.checkpoint_seconds=1000", "--config.memorize.steps=300")
  job = submit(["--nodes=2", "--ntasks-per-node=1"], line)
  until(logged(tmp_path / "w", "memorize", 2), tmp_path)
  cluster.call("scancel", "--signal=TERM", job)  # to the steps alone
  until(lambda: cluster.states(job) == ["PENDING"], tmp_path)
  assert os.listdir(tmp_path / "w" / "checkpoints" / "memorize" / "resume")
  cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait a minute or two
  assert cluster.wait(job) == ["COMPLETED"], shown(tmp_path)
  relearn_rows = pq.read_table(tmp_path / "w" / "results.parquet")
  assert relearn_rows.num_rows and (tmp_path / "w" / "report.html").exists()


def at_work(workdir: pathlib.Path) -> list[str]:
  """The tasks of an array that are in the middle of an attack: they hold its lease, and have logged a step of it."""
  found = []
  for path in (workdir / "stages").glob(f"attack-*{SUFFIX}"):
    if (lease := read_lease(path)) and (workdir / "stages" / f"{lease[0]['what']}.jsonl").exists():
      with contextlib.suppress(OSError):  # it has ended since
        given = pathlib.Path(f"/proc/{lease[0]['pid']}/environ").read_bytes().decode().split("\0")
        found += [one.partition("=")[2] for one in given if one.startswith("SLURM_ARRAY_TASK_ID=")]
  return found


def test_a_grid_of_24_cells_by_an_array(cluster: Cluster, submit: Callable[..., str], cache: pathlib.Path,
                                        tmp_path: pathlib.Path) -> None:
  """Of four tasks on two nodes one is cancelled in the middle of an attack, and submitted again."""
  grid = ("--config.seeds=(0, 1, 2, 3)", "--config.attack.learning_rates=(1e-4, 1e-3)",
          "--config.attack.runs_at_once=3", "--config.attack.keep_steps=(1, 20)")
  relearn(cache, *smallest_audit(tmp_path / "whole", *grid))
  line = smallest_audit(tmp_path / "w", *grid, "--claim")
  job = submit(["--array=0-3"], line)
  until(lambda: bool(at_work(tmp_path / "w")), tmp_path)
  task = at_work(tmp_path / "w")[0]
  cluster.call("scancel", f"{job}_{task}")
  again = submit([f"--array={task}"], line)
  assert sorted(cluster.wait(job)) == ["CANCELLED", *["COMPLETED"] * 3], shown(tmp_path)
  assert cluster.wait(again) == ["COMPLETED"], shown(tmp_path)
  assert_same_rows(tmp_path / "w", tmp_path / "whole")
  rows = pq.read_table(tmp_path / "w" / "results.parquet").to_pandas().query("relearn_step > 0")
  assert len(rows[["arm", "seed", "learning_rate"]].drop_duplicates()) == 24
  steps = [(row["stage"], row["step"]) for row in map(
      json.loads, (tmp_path / "w" / "train_log.jsonl").read_text().splitlines())]
  assert len(steps) == len(set(steps)) and sum(stage.startswith("attack-") for stage, _ in steps) == 8 * 20
