"""Memory of the host that steps use and let go of: kept by the process, where the CPU computes.

Each step allocates what it works with anew. Above a size glibc asks the system for it, and gives it back after the
step, so that every page of it is cleared and mapped again in the next one: a fourth of a small model's step.
"""

import ctypes
import importlib.util
import os

KEPT = 2**31 - 1  # bytes that are free at the end of the heap and stay; the largest number that glibc takes
BACKED = KEPT - 2**22  # bytes of the heap that may lie on huge pages: fewer, so that they stay
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin", "libtpu")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _HUGE = -1, -4, -8, 14  # of malloc.h and mman.h
_HUGE_PAGE = 2**21
_keeps = False  # whether this process does


def keep_memory() -> bool:
  """Has glibc keep memory that is let go of, and lets the heap lie on huge pages; call it before much is allocated.

  Nothing happens where an accelerator may compute, with another C library, or where the environment tells glibc
  already (MALLOC_... or GLIBC_TUNABLES). What is free at the end of the heap beyond `KEPT` is still given back; what is
  free between other things is by `malloc_trim` alone.

  Returns:
    Whether it does.
  """
  global _keeps
  told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
  on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
  if told or not on_cpu or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
    return False
  # One arena: those of other threads have parts of 64 MB, in which nothing large is found again.
  if not (libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, KEPT) and libc.mallopt(_ARENA_MAX, 1)):
    return False
  _keeps = True
  _back(libc)
  return True


def let_go() -> None:
  """Gives free memory back to the system; what the heap grows by again may lie on huge pages, as by `keep_memory`."""
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):  # glibc
    libc.malloc_trim(0)
    if _keeps:
      _back(libc)


def _back(libc: ctypes.CDLL) -> None:
  """Lets the end of the heap lie on huge pages; pages that are given back, and asked for again, do not otherwise."""
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  if start := libc.malloc(BACKED):  # only addresses: none of it is touched
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (start + BACKED - first) // _HUGE_PAGE * _HUGE_PAGE, _HUGE)
    libc.free(start)
