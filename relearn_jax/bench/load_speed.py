"""Loading a checkpoint as the commands do: GiB/s from disk and from the system's page cache, and the host's memory."""

import os
import pathlib
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh

from relearn_jax.bench.peak_memory import anonymous, let_go, peak_memory
from relearn_jax.bench.shapes import random_params
from relearn_jax.bench.timing import Spread, seconds, spread
from relearn_jax.models.checkpoint import Checked, check_checkpoint, load_params
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import to_host

GIB = 2**30


def measure_loading(config: ModelConfig, folder: pathlib.Path | None, dtype: Any, mesh: Mesh, repeats: int
                    ) -> dict[str, Any]:
  """One row of the results.

  Args:
    config: of the model.
    folder: its checkpoint; None: a random one of `dtype` is written to a temporary folder, and removed.
    dtype: of the parameters in memory.
    mesh: that they are loaded to.
    repeats: of each of the two ways.
  """
  if folder is not None:
    return _measure(check_checkpoint(folder), dtype, mesh, repeats)
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary:
    model, written = Model(config), pathlib.Path(temporary) / "checkpoint"
    export(to_host(random_params(model, dtype, mesh)), model, written)
    return _measure(check_checkpoint(written), dtype, mesh, repeats)


def _measure(checked: Checked, dtype: Any, mesh: Mesh, repeats: int) -> dict[str, Any]:
  files = sorted({*checked.files.values()})
  size = sum(file.stat().st_size for file in files)
  model = Model(checked.config, dtype=dtype)
  load = lambda: load_params(checked, model, dtype=dtype, mesh=mesh)
  rate = lambda took: took.map(lambda value: size / GIB / value)
  cold: Spread | None = None
  if hasattr(os, "posix_fadvise"):
    cold = spread([_after(files, load) for _ in range(repeats)])
  warm = spread([seconds(load) for _ in range(repeats)])
  let_go()
  before = anonymous()
  with peak_memory() as peak:
    params = jax.block_until_ready(load())
    loaded = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
  here = jax.default_backend() == "cpu"
  return {
      "name": "checkpoint", "files": len(files), "bytes": size, "loaded_bytes": loaded,
      "mesh": {axis: number for axis, number in mesh.shape.items() if number > 1},
      "gib_per_second_disk": None if cold is None else rate(cold), "gib_per_second_page_cache": rate(warm),
      "memory": {"loaded": loaded, "peak": peak.bytes, "source": peak.source,
                 # On CPU the loaded arrays are the process's own.
                 "beside": peak.bytes - loaded if here and before is not None and peak.bytes is not None else None}}


def _after(files: list[pathlib.Path], load: Any) -> float:
  """Seconds of loading once the system has been told that it need not keep the files' pages, which it may ignore."""
  for file in files:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)
  return seconds(load)
