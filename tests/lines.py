"""Runs the command lines on stdin one after the other in this process; writes exit status, stdout and stderr of each.

Without a device (JAX_PLATFORMS names a platform that does not exist) a line that touches one ends with a traceback.
"""

import contextlib
import io
import json
import sys
import traceback

from relearn_jax.cli import main


def run(line: list[str]) -> tuple[int, str, str]:
  """What comes of a command line."""
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
      status = main(line)
    except Exception:
      traceback.print_exc()
      status = 1
  return status, stdout.getvalue(), stderr.getvalue()


if __name__ == "__main__":
  json.dump([run(line) for line in json.load(sys.stdin)], sys.stdout)
