"""Folders of stages, and the weights that later stages start from: on the device while there is room, and on disk."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit.stages import MEMORIZE
from relearn_jax.errors import InputError
from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.beside import Beside
from relearn_jax.parallel.mesh import lay_out, padded_runs, take_runs, weight_shardings
from relearn_jax.parallel.processes import agree, barrier, is_first, remove, remove_at_once, write_atomically
from relearn_jax.training import checkpoints

HELD_BYTES = 2**31  # of weights that stay on the device between stages; what does not fit is read back from disk
RUNS, DONE, ANSWERS = "runs.json", "done", "answers"


@dataclasses.dataclass(frozen=True)
class StageFolder:
  """A stage's folder: weights by step, a resume state, answers by step, which runs ended, and of what it is.

  Attributes:
    path: `checkpoints/<name of the stage>`, numbered where a larger grid has the same stage for other runs.
    keys: name of a run -> content key: what its results depend on.
  """

  path: pathlib.Path
  keys: Mapping[str, str]

  @property
  def name(self) -> str:
    """Of the stage, as it stands in the log."""
    return self.path.name

  @property
  def is_done(self) -> bool:
    """Whether nothing is left to do in it."""
    return agree((self.path / DONE).exists)

  def finish(self) -> None:
    """Marks it so."""
    write_atomically(self.path / DONE, "")

  def answers(self, step: int) -> pathlib.Path:
    """Where the answers after a number of steps are."""
    return self.path / ANSWERS / f"{step:06d}.npz"

  def asked(self) -> list[int]:
    """The steps with answers, ascending."""
    return agree(lambda: sorted(int(path.stem) for path in (self.path / ANSWERS).glob("*.npz")))


def open_folder(root: pathlib.Path, name: str, keys: Mapping[str, str]) -> StageFolder:
  """The folder of a stage with these runs, begun before or now."""
  def find() -> int:
    for number in itertools.count(1):
      file = _numbered(root, name, number) / RUNS
      if not file.exists():
        write_atomically(file, json.dumps(dict(keys), indent=1) + "\n")
      if json.loads(file.read_text()) == dict(keys):
        break
    return number
  return StageFolder(_numbered(root, name, agree(find)), keys)


def _numbered(root: pathlib.Path, name: str, number: int) -> pathlib.Path:
  return root / (name if number == 1 else f"{name}-{number}")


def finished(root: pathlib.Path) -> dict[str, tuple[StageFolder, str]]:
  """Content key -> folder and name of every run of every stage that is done."""
  def look() -> list[tuple[str, dict[str, str]]]:
    folders = [(file.parent, json.loads(file.read_text())) for file in sorted(root.glob(f"*/{RUNS}"))]
    return [(path.name, keys) for path, keys in folders if StageFolder(path, keys).is_done]
  return {key: (StageFolder(root / name, keys), run) for name, keys in agree(look) for run, key in keys.items()}


def saved_runs(path: pathlib.Path) -> list[str]:
  """The runs of a checkpoint; none where it is not there, or damaged."""
  try:
    return list(checkpoints.describe(path)["runs"])
  except checkpoints.Unreadable:
    return []


Place = tuple[pathlib.Path, int, str]  # a stage's folder, a step, a run


@jax.jit
def _fork(trees: Sequence[Params], picked: Sequence[Any], order: Any) -> Params:
  """Some runs of several stacked trees, joined and brought into an order."""
  fork = lambda *leaves: jnp.concatenate([leaf[i] for leaf, i in zip(leaves, picked, strict=True)])[order]
  return jax.tree.map(fork, *trees)


class Shelf:
  """Weights of stacked runs by stage and step."""

  def __init__(self, beside: Beside):
    """Checkpoints are written by `beside`, and complete once it has been waited for."""
    self.beside = beside
    self.held: dict[pathlib.Path, tuple[list[str], Params]] = {}

  def keep(self, folder: pathlib.Path, step: int, params: Params, names: Sequence[str], some: Iterable[str],
           model: Model, stage: str) -> None:
    """Keeps some of stacked runs, on disk and, while there is room, where they are.

    Args:
      folder, step: where.
      params: `[runs, ...]`, possibly padded.
      names: of the runs.
      some: those to keep.
      model: for the checkpoint's description.
      stage: likewise.
    """
    kept = [name for name in names if name in set(some)]
    path = checkpoints.step_path(folder, step)
    if not kept:
      return
    index = np.array([names.index(name) for name in kept])
    tree = params if kept == list(names) else take_runs(params, index)
    if saved_runs(path) != kept:
      self.beside.wait()  # the host holds the copies of one checkpoint at a time
      self.beside.do(checkpoints.begin_save(path, tree, len(kept), checkpoints.description(model, kept, stage, step)))
    if self._held_bytes() + sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) <= HELD_BYTES:
      # A copy: what is trained is donated to the next step.
      self.held[path] = kept, jax.tree.map(jnp.copy, tree) if tree is params else tree

  def _held_bytes(self) -> int:
    return sum(leaf.nbytes for _, tree in self.held.values() for leaf in jax.tree.leaves(tree))

  def has(self, place: Place) -> bool:
    """Whether the weights of a run are there."""
    path = checkpoints.step_path(*place[:2])
    self.beside.wait()
    return path in self.held and place[2] in self.held[path][0] or place[2] in saved_runs(path)

  def take(self, places: Sequence[Place], one_run: Params, mesh: Mesh, axes: Mapping[str, tuple[str, ...]]) -> Params:
    """Weights as `[runs, ...]`, padded and laid out: forked on the device where all of them are held, else from disk.

    Args:
      places: of the runs.
      one_run: a tree whose leaves have the shape and dtype of one run's.
      mesh: where they are to lie.
      axes: see `weight_shardings`.

    Raises:
      Unreadable: what is on disk of a run is damaged. It is removed, and its stage is not done any more.
    """
    size = padded_runs(len(places), mesh)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), one_run)
    shardings = weight_shardings(like, axes, mesh, stacked=True)
    every = [(checkpoints.step_path(*places[i % len(places)][:2]), places[i % len(places)][2]) for i in range(size)]
    if all(path in self.held for path, _ in every):
      return lay_out(self._fork(every), shardings)
    self.beside.wait()
    try:
      names = {path: checkpoints.describe(path)["runs"] for path in dict.fromkeys(path for path, _ in every)}
      return checkpoints.load_runs([(path, names[path].index(run)) for path, run in every], like, shardings)
    except checkpoints.Unreadable as error:
      raise self._undone(pathlib.Path(str(error.file)), error) from error

  def _undone(self, path: pathlib.Path, error: InputError) -> checkpoints.Unreadable:
    """Removes a step that cannot be read, at once for whoever looks, so that its stage is done again, and says so."""
    self.held.pop(path, None)
    remove_at_once(path)
    if is_first():
      # Who memorised looks for the weights, too; and which of its runs ended is still known.
      if not path.parent.name.startswith(MEMORIZE):
        (path.parent / DONE).unlink(missing_ok=True)
    return checkpoints.Unreadable(
        error.problem, file=path, mend=f"run the same command again: {path.parent.name} is done again"
        if is_first() else "remove it, and `done` beside it, and run the same command again")

  def _fork(self, every: Sequence[tuple[pathlib.Path, str]]) -> Params:
    """Held weights, in an order."""
    paths, order, start = list(dict.fromkeys(path for path, _ in every)), np.empty(len(every), np.int64), 0
    picked: list[np.ndarray] = []
    for path in paths:
      here = [i for i, (other, _) in enumerate(every) if other == path]
      order[here] = start + np.arange(len(here))
      start += len(here)
      picked.append(np.array([self.held[path][0].index(every[i][1]) for i in here]))
    return _fork([self.held[path][1] for path in paths], picked, order)

  def folders(self) -> list[pathlib.Path]:
    """The stages of which something is held."""
    return list({path.parent for path in self.held})

  def forget(self, *folders: pathlib.Path) -> None:
    """Lets go of what is held of some stages; what is on disk stays there."""
    for path in [path for path in self.held if path.parent in folders]:
      del self.held[path]

  def narrow(self, folder: pathlib.Path, step: int, some: Iterable[str], model: Model, stage: str, one_run: Any
             ) -> None:
    """Removes other runs than some from a checkpoint."""
    path = checkpoints.step_path(folder, step)
    names = saved_runs(path)
    kept = [name for name in names if name in set(some)]
    if not kept:
      remove(path)
    elif kept != names:
      index = np.array([names.index(name) for name in kept])
      try:
        tree = jax.tree.map(lambda leaf: leaf[index], checkpoints.load_tree(path, one_run, len(names)))
      except checkpoints.Unreadable as error:
        raise self._undone(path, error) from error
      barrier()  # what is replaced has been read
      checkpoints.save_tree(path, tree, len(kept), checkpoints.description(model, kept, stage, step))
