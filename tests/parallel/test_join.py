"""Whether there are several processes, and what is said where they do not meet or were not given the same."""

import pathlib
import re
import socket
import subprocess
import time

import pytest

from relearn_jax import workdir as workdirs
from relearn_jax.parallel import join, processes

from ..command import ROOT, argv, environment, relearn
from .several import smallest_audit

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(("variables", "several"), [
    ({}, False), ({**SLURM, "SLURM_NTASKS": "2"}, True), ({**SLURM, "SLURM_NTASKS": "1"}, False),
    ({**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1 within a larger job
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # in the job's script
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True), ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True)])
def test_the_environment_says_whether_there_are_several(variables: dict[str, str], several: bool) -> None:
  assert join.several_by_environment(variables) == several


@pytest.mark.parametrize(("line", "says"), [
    (["--num_processes=2", "--process_id=0"], "`--coordinator_address` is not given"),
    (["--coordinator_address=a:1", "--num_processes=2"], "`--process_id` is not given"),
    (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "`--process_id` is 2; expected 0 to 1"),
    (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "`--coordinator_address` is 'a'"),
    (["--num_processes=0"], "`--num_processes` is 0")])
def test_flags_that_cannot_be(cache: pathlib.Path, tmp_path: pathlib.Path, line: list[str], says: str) -> None:
  assert says in relearn(cache, *smallest_audit(tmp_path), *line, status=2).stderr


def test_one_process_is_alone_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(join, "join", lambda *_: pytest.fail("it must not connect"))
  for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
    monkeypatch.setenv(name, value)
  values, rest = join.take_flags(["--num_processes=1", "--config", "c.py", "--config.x", "-1", "--workdir=w"])
  assert rest == ["--config", "c.py", "--config.x", "-1", "--workdir=w"]
  with join.together(values, "audit", ""):
    assert processes.is_alone() and processes.agree(lambda: 3) == 3 and processes.everyone(4) == [4]


def test_other_contents_on_another_host_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(processes, "_peers", object())
  monkeypatch.setattr(processes, "everyone", lambda mine: [mine, {"forget": "b", "retain": "c"}, mine])
  with pytest.raises(ValueError, match="not the same on all hosts:\n  process 1, and process 0: forget; give"):
    workdirs.check_inputs_alike(lambda: {"forget": "a", "retain": "c"})


def test_no_other_file_asks_for_a_process_index() -> None:
  asks = re.compile(r"process_index|process_count|jax\.distributed|multihost_utils|os\.replace|\.tmp\b")
  found = {path.relative_to(ROOT / "relearn_jax").as_posix() for path in (ROOT / "relearn_jax").rglob("*.py")
           if asks.search(path.read_text())}
  assert found == {"parallel/processes.py", "parallel/join.py", "parallel/leases.py"}


def test_nobody_there_is_a_message(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Neither for one that waits for the first, nor for the first, which waits for the others."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  for me, says in ((1, "`--coordinator_address` is localhost:{0}, and nothing answers there within 2 s (Connection "
                       "refused); start process 0, too"),
                   (0, "all 2 processes have not met at localhost:{0} within 2 s (--initialization_timeout)")):
    begin = time.monotonic()
    done = subprocess.run(argv(*smallest_audit(tmp_path), f"--coordinator_address=localhost:{port}",
                               "--num_processes=2", f"--process_id={me}", "--initialization_timeout=2"),
                          cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and time.monotonic() - begin < 30
    assert says.format(port) in done.stderr and "Traceback" not in done.stderr and "Check failure" not in done.stderr
