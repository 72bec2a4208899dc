"""Any number of commands work through one grid: each claims a stage, does it, and claims the next.

What is left, and what can be begun, is seen from what is on disk; there is no scheduler. `stages/` of the workdir has
the plan, a file for each stage that is done or that failed, the leases, and, while commands share the workdir, the log
of each stage. `relearn status` reads it.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from relearn_jax import interrupts
from relearn_jax.audit import acquire, unlearning
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Cell, content_key
from relearn_jax.audit.shelf import finished
from relearn_jax.audit.stages import MEMORIZE, PRETRAIN, AtOnce, Planned
from relearn_jax.audit.status import COMMAND, DONE, FAILED, FOLDER, PLAN
from relearn_jax.errors import InputError
from relearn_jax.parallel.leases import POLL, LeaseLost, Leases, held
from relearn_jax.parallel.processes import agree, by_first, is_alone, is_first, write_atomically
from relearn_jax.training.checkpoints import Unreadable
from relearn_jax.training.log import TrainLog

AT_ONCE, LOG = "at_once.json", ".jsonl"
Cells = Callable[[Planned], list[Cell]]  # an attack -> its cells, with their unlearn steps


def write_plan(exp: Experiment, stages: Sequence[Planned]) -> None:
  """Writes down what is to be done, for `relearn status`; the model that all begin as is had before."""
  rows = [{"name": one.name, "kind": one.kind, "steps": one.steps, "runs": list(one.runs)} for one in stages
          if one.kind != PRETRAIN]
  write_atomically(exp.workdir / FOLDER / PLAN, json.dumps(rows, indent=1) + "\n")


@contextlib.contextmanager
def recorded_stage(exp: Experiment, stage: Planned, seconds: Mapping[str, float]) -> Iterator[None]:
  """Writes down behind the block that a stage is done, and what it took by then, or why it failed."""
  folder = exp.workdir / FOLDER
  mine = {"name": stage.name, "runs": list(stage.runs), "host": socket.gethostname(), "pid": os.getpid()}
  failed = folder / f"{stage.name}{FAILED}"
  by_first(lambda: failed.unlink(missing_ok=True))
  try:
    yield
  except Exception as error:
    write_atomically(failed, json.dumps({**mine, "error": f"{type(error).__name__}: {error}"}) + "\n")
    raise
  write_atomically(folder / f"{stage.name}{DONE}", json.dumps({**mine, "seconds": seconds.get(stage.name)}) + "\n")


class Claims:
  """The stages that this command, of any number of processes, has claimed in a workdir that it shares with others."""

  def __init__(self, workdir: pathlib.Path):
    self.workdir, self.folder = workdir, workdir / FOLDER
    self.name = f"{COMMAND}{socket.gethostname()}-{os.getpid()}"  # what it holds as long as it is there
    self.leases = Leases(self.folder) if is_first() else None

  def __enter__(self) -> "Claims":
    if self.leases:
      self.leases.claim(self.name)
    return self

  def __exit__(self, *_: object) -> None:
    if self.leases:
      self.leases.close()

  def claim(self, key: str, what: str = "") -> bool:
    """Claims something for all processes of this command; see `Leases.claim`."""
    return agree(lambda: self.leases is not None and self.leases.claim(key, what))

  def release(self, key: str) -> None:
    """Gives it back."""
    if self.leases:
      self.leases.release(key)

  @contextlib.contextmanager
  def hold(self, key: str, what: str = "") -> Iterator[None]:
    """Claims something as soon as nobody else has it, and gives it back behind the block."""
    while not self.claim(key, what):
      by_first(lambda: time.sleep(POLL))
    try:
      yield
    finally:
      self.release(key)

  def refuse_larger(self) -> None:
    """`InputError` where others are at work on the grid that is to become larger."""
    def look() -> list[str]:
      others = [one for one in held(self.folder) if one["key"].startswith(COMMAND) and one["key"] != self.name]
      return [one["host"] for one in others] if (self.workdir / "config.json").exists() else []
    if others := agree(look):
      raise InputError(f"has another grid, on which a command on {others[0]} is at work", file=self.workdir,
                       field="--workdir", mend="wait for it, or give another folder")

  def at_once(self, limit: AtOnce) -> AtOnce:
    """As `limit`, but what the first of all commands decided holds for the others, whatever devices they have."""
    path = self.folder / AT_ONCE
    sizes: dict[str, int] = agree(lambda: json.loads(path.read_text()) if path.exists() else {})

    def decide(stage: Planned) -> int:
      if stage.name not in sizes:
        sizes[stage.name] = limit(stage)
        write_atomically(path, json.dumps(sizes, indent=1) + "\n")
      return sizes[stage.name]
    return decide

  def log(self, stage: str) -> TrainLog:
    """Of a stage, until `merge_logs`: others write theirs at the same time."""
    return TrainLog(self.folder / f"{stage}{LOG}")

  def seconds_file(self) -> pathlib.Path:
    """Where this command writes what its stages took."""
    return self.workdir / "checkpoints" / f"seconds-{socket.gethostname()}-{os.getpid()}.json"

  def work_through(self, exp: Experiment, stages: Sequence[Planned], cells: Cells, do: Callable[[Planned], None]
                   ) -> None:
    """Claims and does stages until all are done, by whomever.

    Args:
      exp: what is shared.
      stages: as planned.
      cells: gives those of an attack whose method is through.
      do: does a stage, or what is left of it.
    """
    while True:
      left = self._left(exp, stages, cells)
      if not left:
        return
      for stage in left:
        if is_ready(stage, left):
          key = f"{stage.name}-{content_key(*sorted(_keys(exp, stage, cells)))[:8]}"
          if self.claim(key, stage.name):
            self._do(exp, stage, stages, cells, do, key)
            break
      else:
        by_first(lambda: time.sleep(POLL))

  def _do(self, exp: Experiment, stage: Planned, stages: Sequence[Planned], cells: Cells,
          do: Callable[[Planned], None], key: str) -> None:
    try:
      left = self._left(exp, stages, cells)
      # Nobody was through with it just before, or has found that weights are damaged which it starts from.
      if stage in left and is_ready(stage, left):
        exp.log = self.log(stage.name)
        do(stage)
    except LeaseLost:
      interrupts.ask(None)  # another command goes on with it, from the last state that was saved
    except Unreadable as error:
      if not is_alone():  # the other processes may not have read what is damaged
        raise
      print(f"{error.file}: {error.problem}; it is made again", file=sys.stderr)
    finally:
      self.release(key)

  def _left(self, exp: Experiment, stages: Sequence[Planned], cells: Cells) -> list[Planned]:
    by_first(lambda: _look_up(exp.checkpoints))
    exp.done = finished(exp.checkpoints)
    found: list[Planned] = []
    for stage in stages:
      if not is_done(exp, stage, stages, found, cells):
        found.append(stage)
    return found

  def merge_logs(self) -> None:
    """Makes train_log.jsonl of the logs of stages; for whoever writes the results."""
    target = self.workdir / "train_log.jsonl"
    logs = sorted(self.folder.glob(f"*{LOG}"), key=lambda path: path.stat().st_mtime)
    new = [line + "\n" for path in logs for line in path.read_text().splitlines()]

    def place(line: str) -> tuple[str, int]:
      row = json.loads(line)
      return row["stage"], row["step"]
    there = set(map(place, new))
    old = target.read_text().splitlines(keepends=True) if target.exists() else []
    kept = [line for line in old if line.endswith("}\n") and place(line) not in there]
    write_atomically(target, "".join([*kept, *new]))
    for path in [*logs, *self.folder.glob(".*")]:
      path.unlink(missing_ok=True)


def refuse_shared(workdir: pathlib.Path) -> None:
  """`InputError` where commands that share the workdir are, or may be, at work in it."""
  if agree(lambda: [one["key"] for one in held(workdir / FOLDER)]):
    raise InputError("is shared by commands with --claim, of which one may still be running", file=workdir,
                     field="--workdir", mend="give --claim, too, or another folder")


def _look_up(checkpoints: pathlib.Path) -> None:
  """Lists the folders of stages: what the file system of a network has cached of them is looked up again."""
  for path in list(checkpoints.iterdir()) if checkpoints.exists() else []:
    if path.is_dir():
      os.listdir(path)


def _keys(exp: Experiment, stage: Planned, cells: Cells) -> list[str]:
  """Content keys of the runs of a stage."""
  if stage.kind == "attack":
    return [exp.attacked_key(cell) for cell in cells(stage)]
  if stage.method:
    return [exp.unlearned_key(chain, stage.method, stage.kind) for chain in stage.chains]
  return [exp.memorized_keys[chain] for chain in stage.chains]


def is_ready(stage: Planned, left: Sequence[Planned]) -> bool:
  """Whether a stage can be begun while others are left: weights that it starts from are there."""
  before = left[:left.index(stage)]
  if stage.kind == MEMORIZE:
    return True
  method = stage.method.name if stage.method else next((c.point.method for c in stage.cells if c.point.method), None)
  # Parts of unlearning follow each other: controls go as far as their partners.
  return not any(one.kind == MEMORIZE or (one.method and one.method.name == method) for one in before)


def is_done(exp: Experiment, stage: Planned, stages: Sequence[Planned], left: Sequence[Planned], cells: Cells) -> bool:
  """Whether nothing is left to do of a stage; `left` are those before it of which something is."""
  if stage.kind == PRETRAIN:
    return True  # it was there before anything is claimed
  if stage.kind == MEMORIZE:
    return not acquire.left_to_memorize(exp, stage, unlearning.wanted(exp, stages))
  if stage.kind in ("reinforce", "unlearn"):
    mine = unlearning.left_to_unlearn(exp, stage)
    return not mine or set(mine) <= acquire.gone(exp, stage.method).keys()  # they have ended before
  return is_ready(stage, [*left, stage]) and all(exp.attacked_key(cell) in exp.done for cell in cells(stage))
