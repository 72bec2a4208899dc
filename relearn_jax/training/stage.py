"""Running a stage of training: steps, kept checkpoints, and going on after a kill."""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.core import Batch, Objective, TokenRows
from relearn_jax.parallel.mesh import padded_runs, runs_sharding, shard_runs
from relearn_jax.progress import progress
from relearn_jax.training import checkpoints
from relearn_jax.training.log import TrainLog
from relearn_jax.training.step import Build, TrainState, add_references, init_state, make_step

# Called at each kept step with (step, state); returning True ends the stage there.
OnKeep = Callable[[int, TrainState], bool]


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage does, apart from the weights it starts from.

  Attributes:
    name: as it stands in the log and in the checkpoints' path.
    runs: names of the stacked runs.
    build: hyper-parameters -> objective.
    batch: data set name -> token rows `[runs, B, T]` on the host; every step uses all of them.
    hyper: "learning_rate", "weight_decay" and the objective's own; the same for every run.
    keep: ascending steps at which `on_keep` is called; the last one ends the stage.
  """

  name: str
  runs: Sequence[str]
  build: Build
  batch: Mapping[str, TokenRows]
  hyper: Mapping[str, float]
  keep: Sequence[int]


def run_stage(stage: Stage, model: Model, start: Callable[[], Params], mesh: Mesh, folder: pathlib.Path,
              log: TrainLog, *, on_keep: OnKeep, save_every: float) -> None:
  """Trains stacked runs to the last kept step, or until `on_keep` ends it.

  A state is saved at the first kept step after every `save_every` seconds, after `on_keep` has
  returned; a stage that is run again goes on from there and repeats the steps since, to the same
  numbers, so `on_keep` sees a step twice and must not mind.

  Args:
    stage: what to do.
    model: architecture.
    start: gives the parameters `[runs, ...]` at step 0, padded and laid out over `mesh`.
    mesh: where the runs lie.
    folder: the stage's checkpoints.
    log: a row a step is appended.
    on_keep: see `OnKeep`.
    save_every: seconds.
  """
  objective: Objective = stage.build(stage.hyper)
  size = padded_runs(len(stage.runs), mesh)
  sharding = runs_sharding(mesh)
  batch: Batch = {name: shard_runs(rows, mesh) for name, rows in stage.batch.items() if name in objective.rows}
  hyper = jax.device_put({key: np.full(size, value, np.float32) for key, value in stage.hyper.items()}, sharding)
  begin = jax.jit(jax.vmap(lambda params: init_state(params, objective)), out_shardings=sharding)

  resume = folder / "resume"
  first = max(checkpoints.saved_steps(resume), default=0)
  params = start()
  batch = add_references(model, params, batch, objective.needs, mesh)  # the reference is the model at step 0
  state = begin(params)
  del params
  if first:
    one_run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    state = shard_runs(checkpoints.load_tree(checkpoints.step_path(resume, first), one_run, len(stage.runs)), mesh)
  log.truncate(stage.name, first)
  step_fn = make_step(model, stage.build, mesh)
  real, padded = count_tokens([stage.batch[name] for name in sorted(objective.rows)])

  saved = time.monotonic()
  with (log.stage(stage.name, len(stage.runs)) as rows,
        progress(stage.keep[-1], stage.name) as bar):
    bar.update(first)
    for step in range(first + 1, stage.keep[-1] + 1):
      state, report = step_fn(state, batch, hyper)
      rows.add(step, report, stage.hyper["learning_rate"], real, padded)
      bar.update(1)
      if step not in stage.keep:
        continue
      if on_keep(step, state):
        bar.total = step  # all that was to do
        bar.refresh()
        break
      if time.monotonic() - saved > save_every and step != stage.keep[-1]:
        rows.flush()
        about = checkpoints.description(model.config, list(stage.runs), stage.name, step)
        checkpoints.save_tree(checkpoints.step_path(resume, step), state, len(stage.runs), about)
        checkpoints.keep_only(resume, step)
        saved = time.monotonic()
  shutil.rmtree(resume, ignore_errors=True)  # the stage's results are kept; nothing goes on from here


def count_tokens(batches: Collection[TokenRows]) -> tuple[int, int]:
  """Real and padded tokens of all runs in a step."""
  # Every token but a row's first counts; rows without counted tokens are padding.
  real = sum(int(rows.mask.sum() + (rows.mask.sum(-1) > 0).sum()) for rows in batches)
  return real, sum(int(np.prod(rows.tokens.shape)) for rows in batches)
