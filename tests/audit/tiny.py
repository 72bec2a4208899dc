"""The tiny audit's command line, and the processes that run it."""

import os
import pathlib
from typing import Any

from ..command import CONFIG, TINY, environment


def audit_flags(workdir: pathlib.Path, *more: str) -> list[str]:
  """The tiny audit, with `more` in place of its own settings of the same name."""
  settings = {flag.split("=")[0]: flag for flag in (*TINY, *more)}
  return ["audit", f"--config={CONFIG}", f"--workdir={workdir}", *settings.values()]


def compiled_alike(cache: pathlib.Path, **more: Any) -> dict[str, str]:
  """The environment of a process whose programs are those of this one, so that its numbers are equal to the bit."""
  return environment(cache, XLA_FLAGS=os.environ.get("XLA_FLAGS", ""), **more)
