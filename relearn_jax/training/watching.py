"""Looking on while something is trained: TensorBoard beside train_log.jsonl, and traces of some steps."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import is_first

SCALARS = ("loss", "grad_norm", "learning_rate", "save_seconds", "mfu")


class Watcher:
  """What looks on; on other processes than the first, nothing.

  Attributes:
    board: folder of TensorBoard's files, by stage; None: none are written.
    profile: the first and the last step of each stage that is traced, and the folder; None: none is.
  """

  def __init__(self, board: pathlib.Path | None = None, profile: tuple[int, int, pathlib.Path] | None = None):
    self.board, self.profile = (board, profile) if is_first() else (None, None)
    self._writers: dict[str, Any] = {}
    self._tracing = False

  def row(self, row: Mapping[str, Any]) -> None:
    """Takes up a row of the log."""
    if self.board is None:
      return
    stage, step = row["stage"], row["step"]
    if stage not in self._writers:
      from tensorboardX import SummaryWriter
      self._writers[stage] = SummaryWriter(str(self.board / stage))
    writer = self._writers[stage]
    values = {name: row[name] for name in SCALARS if name in row}
    values |= {f"terms/{name}": value for name, value in row["terms"].items()}
    if row["seconds"] > 0:
      values["tokens_per_second"] = row["tokens"] / row["seconds"]
    for name, value in values.items():
      if value is not None:  # of runs that have ended
        writer.add_scalar(name, value, step)

  def begin_step(self, stage: str, step: int) -> None:
    """A step is about to be computed."""
    if self.profile and step == self.profile[0]:
      import jax
      jax.profiler.start_trace(self.profile[2] / stage)
      self._tracing = True

  def end_step(self, step: int, wait: Any) -> None:
    """A step has been started; `wait` is an array of its result."""
    if self._tracing and self.profile and step >= self.profile[1]:
      import jax
      jax.block_until_ready(wait)
      self.end_trace()

  def end_trace(self) -> None:
    """Writes the trace that has begun, if any."""
    if self._tracing:
      import jax
      self._tracing = False
      jax.profiler.stop_trace()

  def close(self) -> None:
    """Writes out everything."""
    self.end_trace()
    for writer in self._writers.values():
      writer.close()


_watcher: Watcher | None = None


def watcher() -> Watcher:
  """Whoever looks on now."""
  return _watcher or Watcher()


@contextlib.contextmanager
def watching(board: str | None, steps: str | None, workdir: pathlib.Path) -> Iterator[None]:
  """Looks on at what is trained in the block.

  Args:
    board: folder for TensorBoard, if any.
    steps: FIRST:LAST of each stage to be traced, if any; the traces are in `profile/` of the workdir.
    workdir: of the command.

  Raises:
    InputError: the steps are none, or tensorboardX is not installed.
  """
  global _watcher
  profile = (*_parse(steps), workdir / "profile") if steps else None
  if board is not None:
    try:
      import tensorboardX  # noqa: F401
    except ImportError:
      raise InputError("needs tensorboardX", field="--tensorboard",
                       mend="pip install 'relearn_jax[tensorboard]'") from None
  _watcher = mine = Watcher(pathlib.Path(board) if board else None, profile)
  try:
    yield
  finally:
    _watcher = None
    mine.close()


def _parse(steps: str) -> tuple[int, int]:
  first, colon, last = steps.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise InputError(f"is {steps!r}", field="--profile_steps", mend="expected FIRST:LAST, such as 5:8")
  return int(first), int(last)
