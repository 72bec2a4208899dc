"""Throughput of grids: cells per hour of an audit's own stages, stacked and one by one, with and without compilation.

A cell by itself is in `separate_speed`.

The audit is that of the names case on a small model, made short: what is measured are `audit.pipeline`'s stages up to
the rows of the results, with everything that they write. A cell is an attacked model under one attack.
"""

import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from relearn_jax.audit.audit_config import (
  ArmsSettings,
  AskSettings,
  AttackSettings,
  Audit,
  MemorizeSettings,
  PretrainSettings,
  UnlearnSettings,
  chosen_settings,
)
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.audit.stages import plan_stages
from relearn_jax.bench.compiling import fresh_cache
from relearn_jax.bench.timing import Spread, seconds, spread
from relearn_jax.cases.names import CHOSEN, NamesConfig
from relearn_jax.models.config import ModelConfig
from relearn_jax.parallel.mesh import fill_mesh, parse_mesh

WHERE = "relearn bench"
STACKED, SINGLY = "stacked", "one by one"
MOST_WARM = 2  # repeats of a grid that is compiled already


def short_audit(config: ModelConfig, *, methods: Sequence[str] = ("ga", "npo_gd"),
                adapters: Sequence[str] = ("full", "lora"), dtype: str = "auto") -> Audit:
  """An audit of two seeds and one variant, whose every step is planned: all chains unlearn until the last one.

  Args:
    config: sizes of the model, which is pretrained for a few steps on the case's vocabulary.
    methods, adapters: of the grid.
    dtype: precision of products.
  """
  pretrain = PretrainSettings(
      config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads,
      steps=20, warmup_steps=2)
  return Audit(
      case=NamesConfig(variants=(7,), num_questions=12), seeds=(0, 1),
      arms=ArmsSettings(pretrain=pretrain, dtype=dtype), memorize=MemorizeSettings(steps=20),
      unlearn=UnlearnSettings(methods=tuple(methods), settings=chosen_settings(CHOSEN), chosen=CHOSEN, max_steps=10,
                              keep_every=10, max_score=0.99, depths=1),
      attack=AttackSettings(batch_size=0, learning_rates=(1e-4, 1e-3), adapters=tuple(adapters), keep_steps=(1, 10)),
      ask=AskSettings(max_new_tokens=8, buckets=(10, 18), batch_size=0, score_rows=0), checkpoint_seconds=float("inf"))


def grid_audit(config: ModelConfig, adapters: Sequence[str], dtype: str = "auto") -> Audit:
  """What a grid is measured by; of adapters alone one method at four learning rates, which is 24 cells."""
  if tuple(adapters) != ("lora",):
    return short_audit(config, adapters=adapters, dtype=dtype)
  planned = short_audit(config, methods=("ga",), adapters=adapters, dtype=dtype)
  planned.attack.learning_rates = (1e-4, 3e-4, 1e-3, 3e-3)
  return planned


def default_audit(config: ModelConfig) -> Audit:
  """The audit of configs/names.py, on a model of other sizes; at those of the shape "names" it is just that."""
  pretrain = PretrainSettings(
      config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads)
  return Audit(
      case=NamesConfig(), arms=ArmsSettings(pretrain=pretrain, dtype="float32"),
      unlearn=UnlearnSettings(methods=("ga",), settings=chosen_settings(CHOSEN), chosen=CHOSEN),
      attack=AttackSettings(batch_size=0, learning_rates=(1e-4, 1e-3, 3e-3), keep_steps=(1, 2, 5, 10, 20, 40, 80)),
      ask=AskSettings(max_new_tokens=8, buckets=(10, 18), batch_size=0, score_rows=0, runs_at_once=14),
      checkpoint_seconds=30.0)


def singly(config: Audit) -> None:
  """Sets an audit to attack, and ask, one model at a time; memorising and unlearning stay stacked."""
  config.attack.runs_at_once = config.ask.runs_at_once = 1


def ways(given: str | None) -> list[tuple[str, str]]:
  """(stacked or one by one, mesh): by default stacked as audits are, on all devices, and one by one on one.

  Last what stacking alone brings, on one device.
  """
  if given is not None:
    return [(STACKED, given), (SINGLY, given)]
  return [(STACKED, "runs:-1"), (SINGLY, "runs:1"), *([(STACKED, "runs:1")] if jax.device_count() > 1 else [])]


def measure_grid(config: ModelConfig, mesh: str, way: str, repeats: int, dtype: str = "auto",
                 adapters: Sequence[str] = ("full", "lora")) -> Iterator[dict[str, Any]]:
  """Three rows: of a first audit, which compiles; of audits in new workdirs with the compiled programs on disk; again.

  Before each of the first two kinds, programs in memory are dropped: the second is what another process would take,
  after its start, and the third what the same one takes. At most `repeats` are made; one by one only one of each kind,
  which takes long enough.
  """
  planned = grid_audit(config, adapters, dtype)
  if way == SINGLY:
    singly(planned)
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary, fresh_cache():
    root = pathlib.Path(temporary)
    cached_base(planned.arms.pretrain, planned.case_config, root)  # no part of the grid
    repeated = 1 if way == SINGLY else min(repeats, MOST_WARM)
    for start, number in (("cold", 1), ("warm", repeated), ("again", repeated)):
      took = [_once(planned, root, f"{start}{i}", mesh, start) for i in range(number)]
      yield grid_row(way, start, mesh, count_cells(planned), [one["all"] for one in took],
                     [one["attacks"] for one in took], took[-1]["stages"])


def grid_row(way: str, start: str, mesh: str, cells: int, took: Sequence[float], attacks: Sequence[float],
             stages: Mapping[str, float]) -> dict[str, Any]:
  """A row of the results.

  Args:
    way, start: what was done.
    mesh: as the audit was told.
    cells: of the grid.
    took: seconds of all of it, of each repeat.
    attacks: of its attacks alone.
    stages: seconds of the last repeat's stages.
  """
  laid = {axis: size for axis, size in fill_mesh(parse_mesh(mesh), jax.device_count()).items() if size > 1}
  return {"name": f"{way}, {start}", "way": way, "start": start, "mesh": laid, "cells": cells, "seconds": spread(took),
          "cells_per_hour": per_hour(cells, spread(took)), "attack_cells_per_hour": per_hour(cells, spread(attacks)),
          "stages": dict(stages)}


def per_hour(cells: int, took: Spread) -> Spread:
  """Cells of an audit per hour.

  >>> per_hour(10, Spread(36.0, 18.0, 72.0, 3))
  Spread(median=1000.0, low=500.0, high=2000.0, repeats=3)
  """
  return took.map(lambda value: 3600 * cells / value)


def count_cells(config: Audit) -> int:
  """Cells of a grid."""
  return sum(len(stage.cells) for stage in plan_stages(config, ["prefixes"]))


def _once(config: Audit, root: pathlib.Path, name: str, mesh: str, start: str) -> dict[str, Any]:
  workdir = root / name
  if start != "again":
    jax.clear_caches()
  took = seconds(lambda: audit(config, WHERE, workdir, root, mesh=mesh, at_once=_all))
  return {"all": took, **stage_seconds(workdir)}


def stage_seconds(workdir: pathlib.Path) -> dict[str, Any]:
  """Seconds of an audit's stages, and of its attacks together."""
  stages = json.loads((workdir / "checkpoints" / "seconds.json").read_text())
  return {"stages": stages, "attacks": sum(value for stage, value in stages.items() if stage.startswith("attack-"))}


def _all(exp: Experiment, mesh: Mesh) -> Any:
  return lambda stage: len(stage.cells)


def audit_once(config: Audit, root: pathlib.Path, name: str, mesh: str) -> None:
  """An audit in a new workdir of `root`, with what this process has compiled."""
  audit(config, WHERE, root / name, root, mesh=mesh, at_once=_all)
