"""Ctrl-C and SIGTERM, from the first import on: a message and an exit code. Nothing heavy is imported here.

Ctrl-C is a person's: exit code 130. SIGTERM is a scheduler's, before it takes a machine away: what is being trained is
saved after the step at hand, and the exit code is 75, for which the same command is to be started again.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 and the number of SIGINT
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h

# Where an exception is lost, or aborts the process: libraries in C++ that are being imported, and JAX's part in the
# collection of garbage.
_IMPORTS, _COLLECTION = "<frozen importlib", "_xla_gc_callback"


class Preempted(BaseException):
  """SIGTERM; as `KeyboardInterrupt`, no error that anything could handle and go on."""


_asked: BaseException | None = None  # what is raised at the next place that is fit for it
_deferred = False


def handle_interrupts(message: str) -> None:
  """From here on, an interrupt raises `KeyboardInterrupt` in this process; where that would be lost, it ends at once.

  SIGTERM raises `Preempted`, but not within `deferred`, which has to look at `asked`.

  Args:
    message: what it says then.
  """
  def is_fit(frame: FrameType | None) -> bool:
    while frame is not None:
      if frame.f_code.co_filename.startswith(_IMPORTS) or frame.f_code.co_name == _COLLECTION:
        return False
      frame = frame.f_back
    return True

  def handle(number: int, frame: FrameType | None) -> None:
    if not is_fit(frame):
      end_interrupted(message)
    raise KeyboardInterrupt

  def handle_preemption(number: int, frame: FrameType | None) -> None:
    ask(Preempted())
    if not _deferred:
      if not is_fit(frame):
        end_interrupted(message, PREEMPTED)
      raise Preempted
  signal.signal(signal.SIGINT, handle)
  signal.signal(signal.SIGTERM, handle_preemption)


def ask(reason: BaseException | None) -> None:
  """Asks what is being trained to save its state and to raise this; None takes it back."""
  global _asked
  _asked = reason


def asked() -> BaseException | None:
  """What this process was asked to raise."""
  return _asked


@contextlib.contextmanager
def deferred(defer: bool = True) -> Iterator[None]:
  """Within the block SIGTERM is left to who looks at `asked`; or, within such a block, is not."""
  global _deferred
  before, _deferred = _deferred, defer
  try:
    if not defer and isinstance(_asked, Preempted):
      raise Preempted
    yield
  finally:
    _deferred = before
  if not _deferred and isinstance(_asked, Preempted):
    raise Preempted


def end_interrupted(message: str, status: int = INTERRUPTED) -> NoReturn:
  """Ends the process now; what was printed is written out, as far as it can be."""
  for write in (sys.stdout.flush, sys.stderr.flush, lambda: os.write(2, f"\n{message}\n".encode())):
    try:
      write()
    except (OSError, RuntimeError):  # a pipe is closed; or the interrupt came while that stream was written
      pass
  os._exit(status)
