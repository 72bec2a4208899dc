"""Orbax checkpoints of stacked states: a folder a kept step, complete or absent.

`<stage>/<step>/` holds the parameters of all runs and a description (model, run names, stage, step);
`<stage>/resume/<step>/` the whole training state of a late step, from which a killed stage goes on.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from relearn_jax.errors import InputError
from relearn_jax.models.lora import LoraConfig
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import pad_runs, to_host
from relearn_jax.parallel.parts import place_parts
from relearn_jax.parallel.processes import agree, is_alone, is_first
from relearn_jax.process import disk_trouble

TOKENIZER = "../../base"  # folder of the tokenizer, from a step's folder
POSITIONS = "row_positions"  # of a resume state: data set -> rows taken so far


class Unreadable(InputError):
  """A checkpoint that is not complete, or of which a file was damaged: what made it has to be done again."""


@contextmanager
def _read_from(path: pathlib.Path) -> Iterator[None]:
  """Raises `Unreadable` in place of what a library says of a damaged file; trouble of the disk is left as it is."""
  try:
    yield
  except Exception as error:
    if isinstance(error, Unreadable) or disk_trouble(error, {}):
      raise
    first = textwrap.shorten(str(error) or type(error).__name__, 100)
    raise Unreadable(f"cannot be read ({first})", file=path, mend="remove it: what made it does so again") from error


def _context() -> ocp.Context:
  context = ocp.Context()
  context.array.saving.use_compression = False  # random-looking fp32: zstd costs seconds and saves 7 %
  return context


@contextmanager
def _raised_alone() -> Iterator[None]:
  """Orbax logs what fails in its threads, with a traceback, before it raises the same: once is enough."""
  logger, told = logging.getLogger("absl"), lambda record: not record.exc_info
  logger.addFilter(told)
  try:
    yield
  finally:
    logger.removeFilter(told)


def step_path(stage: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step of a stage is kept."""
  return stage / f"{step:06d}"


def save_tree(path: pathlib.Path, tree: Any, num_runs: int, about: dict[str, Any]) -> None:
  """Writes a stacked pytree, without the padding of its runs; a crash leaves nothing `is_saved` accepts.

  Every process calls this with the same global arrays. What can be read back does not depend on the
  devices; each writes its own part, unless runs are padded, which are gathered on the host first.
  """
  whole = all(isinstance(leaf, jax.Array) and leaf.shape[0] == num_runs for leaf in jax.tree.leaves(tree))
  with _context(), _raised_alone():
    ocp.save(path.absolute(), tree if whole else to_host(tree, num_runs), overwrite=True, custom_metadata=about)


def begin_save(path: pathlib.Path, tree: Any, num_runs: int, about: dict[str, Any]) -> Callable[[], None]:
  """As `save_tree`, but writes in the background what it has copied to the host; returns what waits for its end.

  Of several processes each waits at once: who writes what they settle by exchanges, which must not meet those of steps.
  """
  if not is_alone():
    save_tree(path, tree, num_runs, about)
    return lambda: None
  whole = all(isinstance(leaf, jax.Array) and leaf.shape[0] == num_runs for leaf in jax.tree.leaves(tree))
  with _context(), _raised_alone():
    response = ocp.save_async(path.absolute(), tree if whole else to_host(tree, num_runs), overwrite=True,
                              custom_metadata=about)

  def wait() -> None:
    with _raised_alone():
      response.result()
  return wait


def is_saved(path: pathlib.Path) -> bool:
  """Whether a complete checkpoint is at `path`; of its files, what describes it alone is read."""
  # The metadata is looked for by name: Orbax takes an empty folder for a checkpoint, and one whose metadata is damaged.
  def look() -> bool:
    try:
      return bool(json.loads((path / "_CHECKPOINT_METADATA").read_text())) and ocp.is_orbax_checkpoint(path.absolute())
    except (FileNotFoundError, NotADirectoryError, ValueError):
      return False
  return agree(look)


def saved_steps(stage: pathlib.Path) -> list[int]:
  """The complete steps of a stage, ascending."""
  def look() -> list[int]:
    return sorted(int(p.name) for p in stage.iterdir() if p.name.isdigit() and is_saved(p)) if stage.is_dir() else []
  return agree(look)


def load_tree(path: pathlib.Path, one_run: Any, num_runs: int) -> Any:
  """Restores a stacked pytree to the host, `[num_runs, ...]`.

  Args:
    path: a step's folder.
    one_run: a tree whose leaves have the shape and dtype of one run's.
    num_runs: runs that were saved.

  Raises:
    Unreadable: a file of it is damaged.
  """
  with _read_from(path), _raised_alone():
    return ocp.load(path.absolute(), jax.tree.map(lambda leaf: np.empty((num_runs, *leaf.shape), leaf.dtype), one_run))


def load_runs(runs: Sequence[tuple[pathlib.Path, int]], like: Any, shardings: Any) -> Any:
  """Runs of several checkpoints as one stacked tree, of which each process reads what its devices hold.

  Orbax restores an array as it was saved; which runs are wanted, and in what order, TensorStore is told itself.

  Args:
    runs: a step's folder and the place in it of each run.
    like: nested dicts of shapes and dtypes, `[runs, ...]`.
    shardings: of the leaves.

  Raises:
    Unreadable: a file of one of them is damaged; on each process that reads it.
  """
  context = tensorstore.Context()

  def leaf(keys: Any, shape: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    name, opened = ".".join(key.key for key in keys), dict[pathlib.Path, Any]()

    def part(index: tuple[slice, ...]) -> np.ndarray:
      read = []
      for path, place in runs[index[0]]:
        if path not in opened:
          base = {"driver": "file", "path": f"{path.absolute()}/state/"}
          stored = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                    "fill_missing_data_reads": False}  # what is missing is an error, not zeros
          with _read_from(path):
            opened[path] = tensorstore.open(stored, open=True, context=context).result()
        read.append((path, opened[path][(place, *index[1:])].read()))
      parts = []
      for path, one in read:
        with _read_from(path):
          parts.append(one.result())
      return np.stack(parts)
    return place_parts(shape.shape, sharding, part, shape.dtype)
  return jax.tree_util.tree_map_with_path(leaf, like, shardings)


def restore(path: pathlib.Path, like: Any, num_runs: int) -> Any:
  """Restores a stacked pytree onto a mesh, whatever mesh it was saved from.

  Args:
    path: a step's folder.
    like: shapes, dtypes and shardings of the stacked leaves, padded.
    num_runs: runs that were saved; where fewer than `like` has, padding repeats the first ones.
  """
  size, context = jax.tree.leaves(like)[0].shape[0], _context()
  context.array.loading.enable_padding_and_truncation = size != num_runs
  with context, _raised_alone():
    found = ocp.load(path.absolute(), like)  # each device reads its own part
  if size == num_runs:
    return found
  repeat = lambda tree: pad_runs(jax.tree.map(lambda leaf: leaf[:num_runs], tree), size)
  return jax.jit(repeat, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like), donate_argnums=0)(found)


def describe(path: pathlib.Path) -> dict[str, Any]:
  """What `save_tree` was told about a checkpoint.

  Raises:
    InputError: there is no complete checkpoint of this package at `path`; `Unreadable` where none is complete.
  """
  if not is_saved(path):
    raise Unreadable("is not a complete checkpoint", file=path,
                     mend="give a step folder such as WORKDIR/checkpoints/unlearn/000040")
  with _read_from(path):  # another command may have removed it just now
    about = agree(lambda: ocp.metadata(path.absolute()).custom_metadata)
  if not about or "model" not in about:
    raise InputError("holds no description of its model", file=path, mend="give a checkpoint that this program wrote")
  return dict(about)


def keep_only(folder: pathlib.Path, step: int) -> None:
  """Removes the other steps of a folder of resume states, once `step` is complete.

  It may be gone: another command took the stage over while this one was asleep, and is through with it.
  """
  for path in list(folder.iterdir()) if is_first() and folder.is_dir() else ():
    if path.name != step_path(folder, step).name:
      shutil.rmtree(path, ignore_errors=True)


def remove_resumes(folder: pathlib.Path) -> None:
  """Removes the resume states of stages that were killed after their last result, from which nothing goes on."""
  for left in folder.glob("*/resume") if is_first() else ():
    shutil.rmtree(left)


def description(model: Model, runs: list[str], stage: str, step: int, *, tokenizer: str = TOKENIZER,
                lora: LoraConfig | None = None, positions: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The description of a checkpoint, as JSON-safe values.

  Args:
    model: its architecture.
    runs: names of the stacked runs.
    stage: which stage it belongs to.
    step: of that stage.
    tokenizer: folder of the base, with its tokenizer, from the step's folder.
    lora: of the adapters, where those are what is kept.
    positions: of a resume state: data set -> rows taken so far, over all devices and processes.
  """
  plain = lambda value: json.loads(json.dumps(dataclasses.asdict(value)))
  return {"model": plain(model.config), "runs": runs, "stage": stage, "step": step, "tokenizer": tokenizer,
          **({"lora": plain(lora)} if lora else {}), **({} if positions is None else {POSITIONS: dict(positions)})}
