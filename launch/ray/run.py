"""Lets several `relearn audit --claim` commands work through one grid on a Ray cluster, a Ray task each.

usage: python launch/ray/run.py -n 16 [--gpus=1] [--cpus=1] [--address=auto] -- relearn audit --claim --flag=value ...

Needs the extra `ray`, on every node, and a workdir that every node sees. Where each command runs Ray decides. One that
is told to stop (status 75), or whose node is lost, is started again somewhere; one that fails otherwise is not, and the
exit status is that of the first such. Each task's output is printed here, by Ray.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys

PREEMPTED = 75  # exit status of relearn after SIGTERM


class Again(Exception):
  """A command was told to stop, and is to be started again."""


def _end_with_parent() -> None:
  """Ray ends the processes of its tasks, and not their children."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run(command: list[str]) -> int:
  """Runs a command to its end, in a Ray task; returns its exit status.

  Raises:
    Again: it was told to stop.
  """
  # Ray sets OMP_NUM_THREADS, and hides GPUs from tasks that have none; the latter is what we want.
  environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
  status = subprocess.run([*command, "--num_processes=1"], preexec_fn=_end_with_parent, env=environment,
                          stdin=subprocess.DEVNULL, check=False).returncode
  if status == PREEMPTED:
    raise Again
  return status if status >= 0 else 128 - status


def main(arguments: list[str]) -> int:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("-n", "--number", type=int, required=True, help="commands")
  parser.add_argument("--gpus", type=float, default=0, help="of each")
  parser.add_argument("--cpus", type=float, default=1, help="of each")
  parser.add_argument("--address", default="auto", help="of the cluster; auto: the one that this host belongs to")
  parser.add_argument("command", nargs="+", help="after --: relearn audit --claim --flag=value ...")
  given = parser.parse_args(arguments)
  if given.number > 1 and "--claim" not in given.command:
    parser.error("several commands share a workdir by --claim alone; give it to relearn audit")
  try:
    import ray
  except ImportError:
    parser.error("there is no ray; pip install 'relearn_jax[ray]'")
  ray.init(address=given.address)
  task = ray.remote(num_cpus=given.cpus, num_gpus=given.gpus, max_retries=-1, retry_exceptions=[Again],
                    scheduling_strategy="SPREAD")(run)
  statuses = ray.get([task.remote(given.command) for _ in range(given.number)])
  return next((status for status in statuses if status), 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
