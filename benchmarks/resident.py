"""Memory of a child process, as the benchmarks measure it: its anonymous pages, read from outside while it works.

RssAnon of /proc/PID/status: memory that the process has for itself. Pages of mapped files (a checkpoint that is read,
libraries) are not in it: the kernel takes them back whenever it needs room. Linux only.
"""

import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
from typing import Any

INTERVAL = 0.002  # seconds between two readings


@dataclasses.dataclass(frozen=True)
class Watched:
  """What was seen of a child; bytes.

  Attributes:
    before: anonymous memory at `mark("before")`.
    peak: the highest reading between `mark("start")` and `mark("end")`.
    after: at `mark("end")`.
    peak_with_files: the kernel's own high-water mark of all resident pages, those of files too, from start to end.
    before_with_files: all resident pages at `mark("before")`.
    result: what the child gave to `finish`.
  """

  before: int
  peak: int
  after: int
  peak_with_files: int
  before_with_files: int
  result: dict[str, Any]


def status(pid: int) -> dict[str, int]:
  """The fields of /proc/PID/status that are sizes, in bytes."""
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
          if value.endswith(" kB")}


def mark(name: str) -> None:
  """Says to the parent how far this process is, and waits until it has looked."""
  print(f"#{name}", flush=True)
  sys.stdin.readline()


def finish(result: dict[str, Any]) -> None:
  """The child's last word to `watch`."""
  print("#" + json.dumps(result), flush=True)


def watch(arguments: list[str], **environment: str) -> Watched:
  """Runs a Python program that calls `mark` with "before", "start" and "end", then `finish`.

  Raises:
    SystemExit: it failed; what it wrote to its standard error is above.
  """
  child = subprocess.Popen([sys.executable, *arguments], env=os.environ | environment, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert child.stdin is not None and child.stdout is not None
  readings: dict[str, dict[str, int]] = {}
  peak, sampling, result = 0, False, None
  while True:
    if sampling and not select.select([child.stdout], [], [], INTERVAL)[0]:
      peak = max(peak, status(child.pid)["RssAnon"])
      continue
    line = child.stdout.readline()
    if not line:
      break
    if line.startswith("#{"):
      result = json.loads(line[1:])
    elif line.startswith("#"):
      name = line[1:].strip()
      if name == "start":
        pathlib.Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # the high-water mark starts anew
      readings[name] = status(child.pid)
      sampling = name == "start"
      child.stdin.write("\n")
      child.stdin.flush()
  if child.wait() or result is None:
    raise SystemExit(f"{' '.join(arguments)} failed with status {child.returncode}")
  before, after = readings["before"], readings["end"]
  return Watched(before["RssAnon"], max(peak, after["RssAnon"]), after["RssAnon"], after["VmHWM"], before["VmRSS"],
                 result)


def table(head: list[str], rows: list[list[str]]) -> str:
  """A Markdown table."""
  line = lambda cells: "| " + " | ".join(cells) + " |"
  return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
