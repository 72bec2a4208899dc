"""A grid without a grid: each of its cells by a `relearn audit` of its own, and for comparison all by one.

Commands are run as a user would: each starts Python, compiles everything, asks, attacks, asks again, and renders its
report. Only some cells are run; the rows say how many, and their seconds are of as many as the grid has.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.bench.grid_speed import count_cells, grid_audit, grid_row, stage_seconds
from relearn_jax.bench.timing import seconds
from relearn_jax.models.config import ModelConfig

SAMPLE = 2  # cells that are run
SEPARATELY, TOGETHER = "separate commands", "one command"
CONFIG = """\
from relearn_jax.bench.{module} import {function}
from relearn_jax.models.config import ModelConfig


def get_config():
  return {function}({config!r}, {adapters!r}, {dtype!r})
"""


def cell_audit(config: ModelConfig, adapters: tuple[str, ...], dtype: str) -> Audit:
  """One cell of a grid: a model that somebody has unlearned (`arms.unlearned`), one learning rate, one seed."""
  audit = grid_audit(config, adapters, dtype)
  audit.seeds, audit.attack.learning_rates = audit.seeds[:1], audit.attack.learning_rates[-1:]
  return audit


def measure_commands(config: ModelConfig, mesh: str, adapters: tuple[str, ...], dtype: str) -> Iterator[dict[str, Any]]:
  """Two rows: of cells by commands of their own, each with an empty cache of programs, and of all cells by one.

  Separate commands are not told how to make the unlearned models, which one command does besides: they are given one
  of the same size. Each uses one device, and all of its cores.

  Args:
    config: sizes of the model.
    mesh: of the one command.
    adapters, dtype: of the grid.
  """
  planned = grid_audit(config, adapters, dtype)
  cells, known = count_cells(planned), {"config": config, "adapters": tuple(adapters), "dtype": dtype}
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary:
    root = pathlib.Path(temporary)
    base = cached_base(planned.arms.pretrain, planned.case_config, root)
    grid, cell = root / "grid.py", root / "cell.py"
    grid.write_text(CONFIG.format(module="grid_speed", function="grid_audit", **known))
    cell.write_text(CONFIG.format(module="separate_speed", function="cell_audit", **known))
    took, attacks = [], []
    for number in range(SAMPLE):
      workdir = root / f"cell{number}"
      took.append(cells * seconds(lambda to=workdir: _audit(cell, to, root / "base", "runs:1",  # type: ignore[misc]
                                                            f"--config.arms.unlearned={base}")))
      found = stage_seconds(workdir)
      attacks.append(cells * found["attacks"])
    row = grid_row(SEPARATELY, "cold", "runs:1", cells, took, attacks, found["stages"])
    yield row | {"name": f"{row['name']} ({SAMPLE} of {cells} run, times {cells})", "run": SAMPLE}
    took = [seconds(lambda: _audit(grid, root / "grid", root / "base", mesh))]
    found = stage_seconds(root / "grid")
    yield grid_row(TOGETHER, "cold", mesh, cells, took, [found["attacks"]], found["stages"])


def _audit(config: pathlib.Path, workdir: pathlib.Path, base: pathlib.Path, mesh: str, *flags: str) -> None:
  """`relearn audit` with the pretrained model in its cache, and no program.

  Raises:
    RuntimeError: it failed.
  """
  cache = workdir.with_suffix(".cache")
  shutil.copytree(base, cache / "base")
  environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  done = subprocess.run(
      [sys.executable, "-m", "relearn_jax", "audit", f"--config={config}", f"--workdir={workdir}", f"--mesh={mesh}",
       *flags], env=environment | {"RELEARN_CACHE": str(cache)}, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"relearn audit: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
