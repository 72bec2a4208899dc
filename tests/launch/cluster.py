"""A SLURM of two nodes on this machine: Debian's slurmctld, slurmd and munge, in a folder of their own."""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sacct")
CONFIG = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobRequeue=1
MinJobAge=600
KillWait=60
OverTimeLimit=0
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/slurmd.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
  """Why there is no such cluster; empty where there can be."""
  if os.geteuid():
    return "a SLURM of one's own is started by root"
  absent = [name for name in PROGRAMS[:-1] if shutil.which(name) is None]
  return f"there is no {absent[0]} (apt-get install slurmctld slurmd slurm-client munge)" if absent else ""


def free_ports(number: int) -> list[int]:
  with contextlib.ExitStack() as opened:
    found = [opened.enter_context(socket.socket()) for _ in range(number)]
    for one in found:
      one.bind(("127.0.0.1", 0))
    return [one.getsockname()[1] for one in found]


class Cluster:
  """Its commands.

  Attributes:
    folder: of its files.
    environment: that its commands are called with.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.environment = folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

  def call(self, *line: object, more: Mapping[str, str] | None = None) -> str:
    """What a command prints; its status is asserted."""
    done = subprocess.run(list(map(str, line)), env=self.environment | (more or {}), capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout.strip()

  def states(self, job: str) -> list[str]:
    """Of every task of a job."""
    return [line for line in self.call("squeue", "--noheader", "--states=all", "--array", f"--jobs={job}",
                                       "--format=%T").splitlines() if line]

  def wait(self, job: str, seconds: float = 500) -> list[str]:
    """The states of a job's tasks once none of them is left to run."""
    end = time.monotonic() + seconds
    while (found := self.states(job)) and {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & set(found):
      assert time.monotonic() < end, found
      time.sleep(0.5)
    return found


@contextlib.contextmanager
def started(folder: pathlib.Path) -> Iterator[Cluster]:
  """The cluster, while the block lasts."""
  (folder / "state").mkdir(parents=True)
  for number in (1, 2):
    (folder / f"slurmd.n{number}").mkdir()
  folder.chmod(0o755)
  key = folder / "munge.key"
  key.write_bytes(secrets.token_bytes(128))
  key.chmod(0o400)
  host = socket.gethostname().split(".")[0]
  (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(3)))
  cluster = Cluster(folder)
  lines = [["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
           ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
  daemons: list[subprocess.Popen[bytes]] = []
  try:
    with (folder / "daemons.log").open("wb") as log:
      for line in lines:
        daemons.append(subprocess.Popen(line, env=cluster.environment, stdout=log, stderr=log))
        time.sleep(0.5)
    end = time.monotonic() + 60
    while "idle" not in (states := subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.environment, capture_output=True, text=True, check=False,
        timeout=60).stdout).split():
      assert time.monotonic() < end, states + (folder / "daemons.log").read_text()
      time.sleep(0.5)
    yield cluster
    for job in cluster.call("squeue", "--noheader", "--format=%i").split():  # else steps outlive their daemons
      cluster.call("scancel", job)
    while cluster.call("squeue", "--noheader"):
      time.sleep(0.5)
  finally:
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in daemons:
      try:
        daemon.wait(20)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
