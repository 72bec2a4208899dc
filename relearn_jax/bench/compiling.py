"""Seconds of compilation: cold, and again with the program in JAX's persistent cache."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

HIT = "/jax/compilation_cache/cache_hits"
_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": 0}


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
  """A persistent cache of compiled programs that is empty, and removed at the end; nothing compiled before counts."""
  names = ("jax_compilation_cache_dir", *_SETTINGS)
  before = {name: jax.config.values[name] for name in names}
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as folder:
    for name, value in {"jax_compilation_cache_dir": folder, **_SETTINGS}.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    try:
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


def compile_twice(lower: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
  """The compiled program, and seconds of tracing, of compiling, and of taking it from the persistent cache.

  To be called in `fresh_cache`. The second time everything that the process holds in memory is dropped before, so that
  it is what another process would wait for, after its start.

  Args:
    lower: traces the program: `jitted.lower(...)`.
  """
  hits: list[str] = []
  listen = lambda event, **_: hits.append(event) if event == HIT else None
  begin = time.perf_counter()
  lowered = lower()
  traced = time.perf_counter()
  compiled = lowered.compile()
  cold = time.perf_counter()
  jax.clear_caches()
  again = lower()
  jax.monitoring.register_event_listener(listen)
  try:
    start = time.perf_counter()
    again.compile()
    cached = time.perf_counter() - start
  finally:
    jax.monitoring.unregister_event_listener(listen)
  return compiled, {"trace_seconds": traced - begin, "compile_seconds_cold": cold - traced,
                    "compile_seconds_cached": cached, "cache_hit": bool(hits)}
