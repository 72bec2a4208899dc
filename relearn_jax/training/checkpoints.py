"""Orbax checkpoints of stacked states: a folder a kept step, complete or absent.

`<stage>/<step>/` holds the parameters of all runs and a description (model, run names, stage, step);
`<stage>/resume/<step>/` the whole training state of the latest kept step, from which a killed stage goes on.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from relearn_jax.errors import InputError
from relearn_jax.parallel.mesh import to_host

TOKENIZER = "../../base"  # folder of the tokenizer, from a step's folder


def _context() -> ocp.Context:
  context = ocp.Context()
  context.array.saving.use_compression = False  # random-looking fp32: zstd costs seconds and saves 7 %
  return context


def step_path(stage: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step of a stage is kept."""
  return stage / f"{step:06d}"


def save_tree(path: pathlib.Path, tree: Any, num_runs: int, about: dict[str, Any]) -> None:
  """Writes a stacked pytree, without the padding of its runs; a crash leaves nothing `is_saved` accepts.

  Every process calls this with the same global arrays. What is written does not depend on the devices.
  """
  with _context():
    ocp.save(path.absolute(), to_host(tree, num_runs), overwrite=True, custom_metadata=about)


def is_saved(path: pathlib.Path) -> bool:
  """Whether a complete checkpoint is at `path`."""
  # The metadata is looked for by name: Orbax takes an empty folder for a checkpoint.
  return (path / "_CHECKPOINT_METADATA").is_file() and ocp.is_orbax_checkpoint(path.absolute())


def saved_steps(stage: pathlib.Path) -> list[int]:
  """The complete steps of a stage, ascending."""
  if not stage.is_dir():
    return []
  return sorted(int(p.name) for p in stage.iterdir() if p.name.isdigit() and is_saved(p))


def load_tree(path: pathlib.Path, one_run: Any, num_runs: int) -> Any:
  """Restores a stacked pytree to the host, `[num_runs, ...]`.

  Args:
    path: a step's folder.
    one_run: a tree whose leaves have the shape and dtype of one run's.
    num_runs: runs that were saved.
  """
  return ocp.load(path.absolute(), jax.tree.map(lambda leaf: np.empty((num_runs, *leaf.shape), leaf.dtype), one_run))


def describe(path: pathlib.Path) -> dict[str, Any]:
  """What `save_tree` was told about a checkpoint.

  Raises:
    InputError: there is no complete checkpoint of this package at `path`.
  """
  if not is_saved(path):
    raise InputError("is not a complete checkpoint", file=path,
                     mend="give a step folder such as WORKDIR/checkpoints/unlearn/000040")
  about = ocp.metadata(path.absolute()).custom_metadata
  if not about or "model" not in about:
    raise InputError("holds no description of its model", file=path, mend="give a checkpoint that this program wrote")
  return dict(about)


def keep_only(folder: pathlib.Path, step: int) -> None:
  """Removes the other steps of a folder of resume states, once `step` is complete."""
  for path in folder.iterdir():
    if path.name != step_path(folder, step).name:
      shutil.rmtree(path)


def description(model_config: Any, runs: list[str], stage: str, step: int) -> dict[str, Any]:
  """The description of a checkpoint, as JSON-safe values."""
  return {"model": json.loads(json.dumps(dataclasses.asdict(model_config))), "runs": runs, "stage": stage,
          "step": step, "tokenizer": TOKENIZER}
