"""Process start-up: how many devices, and where compiled programs are kept."""

import contextlib
import os
import pathlib

import jax

from relearn_jax.host_memory import keep_memory
from relearn_jax.parallel.processes import is_alone

MAX_CPU_DEVICES = 8


def cache_dir() -> pathlib.Path:
  """Where models and compiled programs are cached: $RELEARN_CACHE, or the user's cache folder."""
  if given := os.environ.get("RELEARN_CACHE"):
    return pathlib.Path(given).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "relearn_jax"


def num_cores() -> int:
  """Cores that this process may use, which a scheduler or a container may have limited; all, where no limit is told."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start() -> None:
  """Configures JAX; to be called before the first use of a device.

  On CPU the cores become devices of their own (unless JAX_NUM_CPU_DEVICES or XLA_FLAGS says how
  many), since stacked runs spread over devices better than one run's small products over threads.
  Of several processes each has one: with more, exchanges between them hang at times (jaxlib 0.10.2, Gloo).
  Where a device is in use already, their number stays as it is. Memory of the host is kept; see `host_memory`.
  """
  keep_memory()
  told = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform" in os.environ.get("XLA_FLAGS", "")
  if not told:
    with contextlib.suppress(RuntimeError):  # raised where a device is in use
      jax.config.update("jax_num_cpu_devices", min(num_cores(), MAX_CPU_DEVICES) if is_alone() else 1)
  if not jax.config.values["jax_compilation_cache_dir"]:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
