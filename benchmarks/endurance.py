"""A grid by several commands under faults, against the same grid left alone: rows have to be equal to the bit.

usage: mount -t tmpfs -o size=1g tmpfs /mnt/small
       python benchmarks/endurance.py --folder=/mnt/small/endurance --log=endurance.log \\
         [--commands=4] [--seed=0] [--faults=30] [--every=60]

The grid is first worked through by one command, which fills the cache of compiled programs, then by several. The
faults, drawn by the seed, come every --every seconds or so while a stage is claimed; where that is less than a command
takes to start, nothing gets done:
  kill      SIGKILL; the command is started again, as it is whenever it ends before the rows are there
  stop      SIGTERM
  full      the disk is filled to its last byte, for a time; it is a small one, for others would notice
  truncate  SIGKILL to whoever trains, and the largest file of the state that it had saved is cut in half
  kept      the largest file of kept weights, from which some stage that is left has to start, is cut in half
  suspend   SIGSTOP for longer than a lease lives: somebody takes over; then SIGCONT
  outlive   SIGKILL, but the leases say another machine: nobody can tell that their owner is gone before they expire
The last four come first, in an order of the seed's, once each: some of them have their time only at the beginning.

108 cells in 21 stages: 4 methods, 4 seeds, 3 learning rates.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import pyarrow.parquet as pq

from relearn_jax.parallel.leases import EXPIRY, SUFFIX, is_dead, read_lease
from relearn_jax.parallel.processes import write_atomically

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRID = ["--config.case.variants=(7,)", "--config.seeds=(0, 1, 2, 3)", "--config.case.num_questions=6",
        *(f"--config.arms.pretrain.{field}" for field in (
            "steps=20", "warmup_steps=2", "hidden_size=16", "intermediate_size=32", "num_layers=1", "num_heads=2",
            "num_kv_heads=2")),
        "--config.memorize.steps=40", "--config.memorize.learning_rate=0.003", "--config.unlearn.max_steps=10",
        "--config.unlearn.depths=1", "--config.unlearn.methods=('ga', 'gd', 'npo', 'simnpo')",
        "--config.attack.keep_steps=(1, 40)", "--config.attack.learning_rates=(1e-4, 3e-4, 1e-3)",
        "--config.unlearn.batch_size=3", "--config.attack.batch_size=3", "--config.verdict.draws=100",
        "--config.checkpoint_seconds=0"]
FIRST, ALWAYS = ("suspend", "outlive", "truncate", "kept"), ("kill", "stop", "full", "truncate", "kept")
SMALL_DISK = 4 * 2**30  # bytes, at most
FULL_SECONDS = 20.0


def command(folder: pathlib.Path, *more: str) -> list[str]:
  """The audit's command line."""
  return [sys.executable, "-m", "relearn_jax", "audit", f"--config={ROOT / 'configs' / 'names.py'}",
          f"--workdir={folder}", *GRID, *more]


def cut_in_half(folders: Iterable[pathlib.Path]) -> bool:
  """Cuts the largest file of some folders; returns whether there was any."""
  files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
  if files:
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
  return bool(files)


class Crowd:
  """Commands that share a workdir; one that ends is started again."""

  def __init__(self, given: argparse.Namespace, rng: random.Random):
    self.given, self.workdir, self.rng = given, given.folder / "shared", rng
    self.statuses: collections.Counter[str] = collections.Counter()
    self.members = [self.start() for _ in range(given.commands)]
    self.suspended: tuple[subprocess.Popen[bytes], float] | None = None  # who is, and until when
    self.filled: float | None = None  # until when the disk is full

  def start(self) -> subprocess.Popen[bytes]:
    """Another command."""
    with self.given.log.open("ab") as log:
      return subprocess.Popen(command(self.workdir, "--claim"), stdout=log, stderr=log, cwd=ROOT)

  def end(self, member: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """A signal, and another command in the place of the one that got it."""
    member.send_signal(how)
    self.statuses[f"after {how.name}: {member.wait(120)}"] += 1
    self.members[self.members.index(member)] = self.start()

  def look(self, now: bool = False) -> None:
    """Starts again who has ended, and ends what lasts for a time, once that is over or at once."""
    if self.suspended and (now or time.monotonic() > self.suspended[1]):
      self.suspended[0].send_signal(signal.SIGCONT)
      self.suspended = None
    if self.filled and (now or time.monotonic() > self.filled):
      self.ballast.unlink()
      self.filled = None
    for number, member in enumerate(self.members):  # what a fault did to it may show later
      if member.poll():
        self.statuses[f"by itself: {member.returncode}"] += 1
        self.members[number] = self.start()

  @property
  def ballast(self) -> pathlib.Path:
    """The file that fills the disk."""
    return self.given.folder / "ballast"

  def owner(self) -> tuple[str, subprocess.Popen[bytes]] | None:
    """A stage that is claimed, and who has it."""
    stopped = self.suspended[0] if self.suspended else None
    for path in sorted((self.workdir / "stages").glob(f"*{SUFFIX}")):
      found = read_lease(path)
      if found and found[0]["what"] and not is_dead(found[0]):
        for member in self.members:
          if member.pid == found[0]["pid"] and member is not stopped and member.poll() is None:
            return found[0]["what"], member
    return None

  def fault(self, kind: str) -> bool:
    """Lets something go wrong; returns whether there was anything that could."""
    if self.filled or (kind == "suspend" and self.suspended):
      return False
    if kind == "full":
      return self.fill()
    if kind == "kept":
      return cut_in_half(self.needed())
    if kind in ("kill", "stop"):
      member = self.rng.choice([one for one in self.members if not (self.suspended and one is self.suspended[0])])
      if member.poll() is not None:
        return False
      self.end(member, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
      return True
    if (owner := self.owner()) is None:
      return False
    stage, member = owner
    resume = self.workdir / "checkpoints" / stage / "resume"
    if kind == "truncate" and not any(path.is_file() for path in resume.rglob("*")):
      return False
    member.send_signal(signal.SIGSTOP)
    if kind == "suspend":
      self.suspended = member, time.monotonic() + EXPIRY + 15
      return True
    if kind == "outlive":
      self.disguise(member.pid)
    self.end(member, signal.SIGKILL)
    return kind == "outlive" or cut_in_half([resume])

  def fill(self) -> bool:
    """Takes the last byte of the disk."""
    with self.ballast.open("wb", buffering=0) as file:
      for size in (2**20, 2**12, 1):
        try:
          while True:
            file.write(b"\0" * size)
        except OSError:
          pass
    self.filled = time.monotonic() + FULL_SECONDS
    return True

  def disguise(self, pid: int) -> None:
    """Lets the leases of a process say that it is another machine's."""
    for path in (self.workdir / "stages").glob(f"*{SUFFIX}"):
      if (found := read_lease(path)) and found[0]["pid"] == pid:
        write_atomically(path, json.dumps(found[0] | {"machine": "another one"}) + "\n")

  def needed(self) -> list[pathlib.Path]:
    """Kept weights of one stage, drawn among those of which some attack, or unlearning, that is left begins."""
    plan = self.workdir / "stages" / "plan.json"
    stages = json.loads(plan.read_text()) if plan.exists() else []
    left = [one["name"] for one in stages if not (self.workdir / "checkpoints" / one["name"] / "done").exists()]
    done = [one["name"] for one in stages if one["kind"] in ("memorize", "unlearn") and one["name"] not in left]
    starts = lambda name: "unlearn-" if name == "memorize" else f"attack-{name.removeprefix('unlearn-')}-"
    wanted = [name for name in done if any(other.startswith(starts(name)) for other in left)]
    folder = self.workdir / "checkpoints" / self.rng.choice(wanted) if wanted else None
    return [path for path in folder.iterdir() if path.name.isdecimal()] if folder else []


def main() -> int:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="must not exist")
  parser.add_argument("--log", type=pathlib.Path, required=True, help="of the commands; on another disk")
  parser.add_argument("--commands", type=int, default=4)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--faults", type=int, default=30, help="at most")
  parser.add_argument("--every", type=float, default=60, help="seconds from one to the next, on average")
  given = parser.parse_args()
  given.folder.mkdir(parents=True)
  if shutil.disk_usage(given.folder).total > SMALL_DISK:
    parser.error(f"--folder={given.folder} is on a disk that is too large to be filled; mount a small one")
  begin = time.monotonic()
  with given.log.open("wb") as log:
    subprocess.run(command(given.folder / "whole"), stdout=log, stderr=log, cwd=ROOT, check=True)
  print(f"1 command, left alone: {time.monotonic() - begin:.0f} s", flush=True)
  rng = random.Random(given.seed)
  crowd, done, begin = Crowd(given, rng), collections.Counter[str](), time.monotonic()
  first, kind, due = rng.sample(FIRST, len(FIRST)), "", begin
  while not (crowd.workdir / "results.parquet").exists():
    time.sleep(1)
    crowd.look()
    if time.monotonic() > due and sum(done.values()) < given.faults and crowd.owner():
      kind = kind or (first.pop() if first else rng.choice(ALWAYS))
      if crowd.fault(kind):
        print(f"{time.monotonic() - begin:5.0f} s: {kind}", flush=True)
        done[kind] += 1
        kind, due = "", time.monotonic() + rng.uniform(0, 2 * given.every)
  crowd.look(now=True)
  for member in crowd.members:
    crowd.statuses[f"at the end: {member.wait(300)}"] += 1
  print(f"{given.commands} commands, seed {given.seed}: {time.monotonic() - begin:.0f} s")
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
