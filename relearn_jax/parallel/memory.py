"""What devices say of their memory."""

import jax


def told_memory() -> float | None:
  """Bytes that this process's first device may use; None where it does not say, as on CPU."""
  stats = jax.local_devices()[0].memory_stats()
  return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None
