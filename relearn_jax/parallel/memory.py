"""What devices say of their memory, and the host of its own."""

import pathlib

import jax


def told_memory() -> float | None:
  """Bytes that this process's first device may use; None where it does not say, as on CPU."""
  stats = jax.local_devices()[0].memory_stats()
  return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def host_room() -> float:
  """Bytes of the host that are free, or would be once files are forgotten; 0 where it does not say, and on CPU.

  There the devices work in the host's memory, and have been promised it.
  """
  if jax.default_backend() == "cpu":
    return 0.0
  try:
    about = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    free = 1024.0 * int(about["MemAvailable"].split()[0])
  except (OSError, KeyError):
    return 0.0
  try:  # a container's own
    group = pathlib.Path("/sys/fs/cgroup")
    free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
  except (OSError, ValueError):  # none, or "max"
    pass
  return free
