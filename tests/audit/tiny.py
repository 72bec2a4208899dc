"""The tiny audit's command line, and the processes that run it."""

import pathlib

from ..command import CONFIG, TINY


def audit_flags(workdir: pathlib.Path, *more: str) -> list[str]:
  """The tiny audit, with `more` in place of its own settings of the same name."""
  settings = {flag.split("=")[0]: flag for flag in (*TINY, *more)}
  return ["audit", f"--config={CONFIG}", f"--workdir={workdir}", *settings.values()]
