"""The states that a stage of training goes on from: written in the background, one at a time, the last one kept."""

import contextlib
import pathlib
import textwrap
import time
from collections.abc import Callable
from typing import Any

import jax

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import is_first, remove
from relearn_jax.process import disk_trouble
from relearn_jax.training import checkpoints


class States:
  """Of one stage; use as a context manager, so that nothing is still being written behind it."""

  def __init__(self, folder: pathlib.Path, num_runs: int):
    self.folder, self.num_runs = folder, num_runs
    self._pending: tuple[int, Callable[[], None]] | None = None

  def __enter__(self) -> "States":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self.finish()
    else:
      with contextlib.suppress(Exception):  # what ends the stage is said; the state before is still there
        self.finish()

  def last(self) -> int:
    """The last step of which there is a state; 0: none."""
    return max(checkpoints.saved_steps(self.folder), default=0)

  def save(self, step: int, state: Any, about: dict[str, Any]) -> float:
    """Begins to write a state, once the one before it is complete; returns the seconds that the next step waits."""
    begin = time.perf_counter()
    self.finish()
    self._pending = step, checkpoints.begin_save(checkpoints.step_path(self.folder, step), state, self.num_runs, about)
    return time.perf_counter() - begin

  def finish(self) -> None:
    """Waits until what was begun is complete; what was before it goes."""
    if self._pending:
      step, wait = self._pending
      self._pending = None
      wait()
      checkpoints.keep_only(self.folder, step)

  def remove(self) -> None:
    """Removes them all."""
    remove(self.folder)

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, int]]:
    """A state, and the positions in the rows; one that is damaged is removed: the next time the stage begins anew."""
    path = checkpoints.step_path(self.folder, step)
    try:
      state = checkpoints.restore(path, like, self.num_runs)
      return jax.block_until_ready(state), checkpoints.describe(path)[checkpoints.POSITIONS]
    except Exception as error:
      if disk_trouble(error, {}):
        raise
      self.remove()
      first = textwrap.shorten(str(error) or type(error).__name__, 100)
      raise InputError(f"cannot be read ({first})", file=path, field="resume", mend="run the same command again: the "
                       "stage begins anew" if is_first() else "remove it, and run the same command again") from error
