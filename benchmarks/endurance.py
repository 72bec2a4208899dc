"""A grid by several commands under faults, against the same grid left alone: rows have to be equal to the bit.

usage: python benchmarks/endurance.py --folder=/tmp/endurance [--commands=3] [--seed=0] [--faults=30] [--every=60]

The faults, drawn by the seed, come every --every seconds or so while a stage is claimed; where that is less than a
command takes to start, nothing gets done:
  kill      SIGKILL; the command is started again
  stop      SIGTERM; likewise
  full      a command that may write no file above 64 kB, as on a full disk, in place of one that is killed
  truncate  SIGKILL to whoever trains, and the largest file of the state that it had saved is cut in half
  suspend   SIGSTOP for longer than a lease lives: somebody takes over; then SIGCONT (once, the first fault)

108 cells in 21 stages: 4 methods, 4 seeds, 3 learning rates. The grid that is left alone runs beside the other.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq

from relearn_jax.parallel.leases import EXPIRY, SUFFIX, is_dead, read_lease

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRID = ["--config.case.variants=(7,)", "--config.seeds=(0, 1, 2, 3)", "--config.case.num_questions=6",
        *(f"--config.arms.pretrain.{field}" for field in (
            "steps=20", "warmup_steps=2", "hidden_size=16", "intermediate_size=32", "num_layers=1", "num_heads=2",
            "num_kv_heads=2")),
        "--config.memorize.steps=10", "--config.memorize.learning_rate=0.003", "--config.unlearn.max_steps=10",
        "--config.unlearn.depths=1", "--config.unlearn.methods=('ga', 'gd', 'npo', 'simnpo')",
        "--config.attack.keep_steps=(1, 3)", "--config.attack.learning_rates=(1e-4, 3e-4, 1e-3)",
        "--config.unlearn.batch_size=3", "--config.attack.batch_size=3", "--config.verdict.draws=100",
        "--config.checkpoint_seconds=0"]
SMALL = 64 * 1024  # bytes of a file on the "full" disk


def command(folder: pathlib.Path, *more: str) -> list[str]:
  """The audit's command line."""
  return [sys.executable, "-m", "relearn_jax", "audit", f"--config={ROOT / 'configs' / 'names.py'}",
          f"--workdir={folder}", *GRID, *more]


class Crowd:
  """Commands that share a workdir; one that ends for a fault is started again."""

  def __init__(self, given: argparse.Namespace):
    self.given, self.workdir = given, given.folder / "shared"
    self.statuses: collections.Counter[str] = collections.Counter()
    self.members = [self.start() for _ in range(given.commands)]
    self.suspended: tuple[subprocess.Popen[bytes], float] | None = None  # who is, and until when

  def start(self, full: bool = False) -> subprocess.Popen[bytes]:
    """Another command."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))) if full else None
    with (self.given.folder / "commands.log").open("ab") as log:
      return subprocess.Popen(command(self.workdir, "--claim"), stdout=log, stderr=log, preexec_fn=limit, cwd=ROOT)

  def end(self, member: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """A signal, and another command in the place of the one that got it."""
    member.send_signal(how)
    self.statuses[f"after {how.name}: {member.wait(120)}"] += 1
    self.members[self.members.index(member)] = self.start()

  def wake(self, now: bool = False) -> None:
    """Lets the suspended one go on, when its time has come."""
    if self.suspended and (now or time.monotonic() > self.suspended[1]):
      self.suspended[0].send_signal(signal.SIGCONT)
      self.suspended = None

  def owner(self) -> tuple[str, subprocess.Popen[bytes]] | None:
    """A stage that is claimed, and who has it."""
    stopped = self.suspended[0] if self.suspended else None
    for path in sorted((self.workdir / "stages").glob(f"*{SUFFIX}")):
      found = read_lease(path)
      if found and found[0]["what"] and not is_dead(found[0]):
        for member in self.members:
          if member.pid == found[0]["pid"] and member is not stopped:
            return found[0]["what"], member
    return None

  def fault(self, kind: str, rng: random.Random) -> bool:
    """Lets something go wrong; returns whether there was anything that could."""
    member = rng.choice([one for one in self.members if not (self.suspended and one is self.suspended[0])])
    if member.poll() is not None:
      return False
    if kind in ("kill", "stop"):
      self.end(member, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    elif kind == "full":
      self.end(member, signal.SIGKILL)
      place = self.start(full=True)
      self.statuses[f"on a full disk: {place.wait(300)}"] += 1
    elif (owner := self.owner()) is None:
      return False
    elif kind == "suspend":
      stage, member = owner
      member.send_signal(signal.SIGSTOP)
      self.suspended = member, time.monotonic() + EXPIRY + 15
    else:
      stage, member = owner
      self.end(member, signal.SIGKILL)
      files = [path for path in (self.workdir / "checkpoints" / stage / "resume").rglob("*") if path.is_file()]
      if not files:
        return False
      largest = max(files, key=lambda path: path.stat().st_size)
      os.truncate(largest, largest.stat().st_size // 2)
    return True


def main() -> int:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="must not exist")
  parser.add_argument("--commands", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--faults", type=int, default=30, help="at most")
  parser.add_argument("--every", type=float, default=60, help="seconds from one to the next, on average")
  given = parser.parse_args()
  given.folder.mkdir(parents=True)
  with (given.folder / "whole.log").open("wb") as log:
    whole = subprocess.Popen(command(given.folder / "whole"), stdout=log, stderr=log, cwd=ROOT)
  rng, crowd, done = random.Random(given.seed), Crowd(given), collections.Counter[str]()
  begin, kinds, due = time.monotonic(), ["suspend"], time.monotonic()
  while not (crowd.workdir / "results.parquet").exists():
    time.sleep(1)
    crowd.wake()
    for number, member in enumerate(crowd.members):  # what a fault did to it may show later
      if member.poll():
        crowd.statuses[f"by itself: {member.returncode}"] += 1
        crowd.members[number] = crowd.start()
    if time.monotonic() > due and sum(done.values()) < given.faults and crowd.owner():
      kind = kinds[0] if kinds else rng.choice(["kill", "stop", "full", "truncate", "truncate"])
      if crowd.fault(kind, rng):
        done[kind] += 1
        kinds, due = [], time.monotonic() + rng.uniform(0, 2 * given.every)
  crowd.wake(now=True)
  for member in crowd.members:
    crowd.statuses[f"at the end: {member.wait(300)}"] += 1
  print(f"{given.commands} commands, seed {given.seed}: {time.monotonic() - begin:.0f} s")
  assert whole.wait() == 0
  print("faults:", dict(done))
  print("exit statuses:", dict(crowd.statuses))
  equal = True
  for name in ("answers.parquet", "results.parquet"):
    ours, theirs = (pq.read_table(given.folder / which / name) for which in ("shared", "whole"))
    equal &= ours.equals(theirs)
    print(f"{name}: {ours.num_rows} rows, {'equal' if ours.equals(theirs) else 'NOT EQUAL'}")
  steps = [(row["stage"], row["step"]) for row in map(
      json.loads, (crowd.workdir / "train_log.jsonl").read_text().splitlines())]
  print(f"train_log.jsonl: {len(steps)} steps, {len(steps) - len(set(steps))} of them twice")
  return 0 if equal and len(steps) == len(set(steps)) else 1


if __name__ == "__main__":
  sys.exit(main())
