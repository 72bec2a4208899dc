"""Peak memory while something runs: what devices count themselves, on CPU the process's anonymous memory.

RssAnon of /proc/self/status is memory that the process has for itself: pages of mapped files (a checkpoint that is
read, libraries) are not in it, since the kernel takes them back whenever it needs room.
"""

import contextlib
import gc
import pathlib
import threading
from collections.abc import Iterator

import jax

from relearn_jax import host_memory

INTERVAL = 0.002  # seconds between two readings
STATUS = pathlib.Path("/proc/self/status")


class Peak:
  """What was seen.

  Attributes:
    bytes: the peak on the device that had most; on CPU above what the process held before. None: nothing tells, or no
      more was used than an earlier part of this process had used, whose peak the device still reports.
    source: what says so.
  """

  def __init__(self, source: str):
    self.bytes: int | None = None
    self.source = source


def anonymous() -> int | None:
  """Bytes that this process holds now; None where the system does not tell."""
  if not STATUS.exists():
    return None
  line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
  return int(line.split()[1]) * 1024


def let_go() -> None:
  """Gives back what nothing refers to any more, so that it does not hide what comes next."""
  gc.collect()
  if jax.default_backend() == "cpu":
    host_memory.let_go()


def _device_peak() -> int | None:
  stats = [device.memory_stats() for device in jax.local_devices()]
  return max((one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one), default=None)


@contextlib.contextmanager
def peak_memory(before: int | None = None) -> Iterator[Peak]:
  """Watches the block; what it gives is filled in at its end.

  Args:
    before: on CPU, what the process held before the arrays of interest were made, from `anonymous`; by default now.
  """
  if (reported := _device_peak()) is not None:
    seen = Peak("memory_stats of the device, peak_bytes_in_use")
    yield seen
    after = _device_peak()
    seen.bytes = after if after is not None and after > reported else None
    return
  seen, start = Peak(f"RssAnon of the process, read every {INTERVAL * 1e3:.0f} ms"), anonymous()
  if start is None:
    yield Peak("nothing tells on this system")
    return
  done, most = threading.Event(), [start]

  def watch() -> None:
    while not done.wait(INTERVAL):
      most[0] = max(most[0], anonymous() or 0)
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield seen
  finally:
    done.set()
    thread.join()
  seen.bytes = max(most[0], anonymous() or 0) - (start if before is None else before)
