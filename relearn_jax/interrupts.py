"""Ctrl-C, from the first import on: a message and exit code 130. Nothing heavy is imported here."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 and the number of SIGINT

# Where an exception is lost, or aborts the process: libraries in C++ that are being imported, and JAX's part in the
# collection of garbage.
_IMPORTS, _COLLECTION = "<frozen importlib", "_xla_gc_callback"


def handle_interrupts(message: str) -> None:
  """From here on, an interrupt raises `KeyboardInterrupt` in this process; where that would be lost, it ends at once.

  Args:
    message: what it says then.
  """
  def handle(number: int, frame: FrameType | None) -> None:
    while frame is not None:
      if frame.f_code.co_filename.startswith(_IMPORTS) or frame.f_code.co_name == _COLLECTION:
        end_interrupted(message)
      frame = frame.f_back
    raise KeyboardInterrupt
  signal.signal(signal.SIGINT, handle)


def end_interrupted(message: str) -> NoReturn:
  """Ends the process now, with `INTERRUPTED`; what was printed is written out, as far as it can be."""
  for write in (sys.stdout.flush, sys.stderr.flush, lambda: os.write(2, f"\n{message}\n".encode())):
    try:
      write()
    except (OSError, RuntimeError):  # a pipe is closed; or the interrupt came while that stream was written
      pass
  os._exit(INTERRUPTED)
