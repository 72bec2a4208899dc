"""Running a stage of training: steps, kept checkpoints, runs that end, and going on after a kill."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax import host_memory, interrupts
from relearn_jax.data.order import Order
from relearn_jax.data.prepared import PreparedRows
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.core import Batch, Objective, TokenRows
from relearn_jax.parallel.mesh import (
  lay_out,
  pad_runs,
  padded_runs,
  row_shards,
  rows_sharding,
  runs_sharding,
  shard_rows,
  to_host,
)
from relearn_jax.parallel.processes import agree, everyone, is_alone
from relearn_jax.progress import progress
from relearn_jax.training import checkpoints
from relearn_jax.training.ended import Ledger, finite_runs
from relearn_jax.training.full_speed import full_speed
from relearn_jax.training.log import TrainLog
from relearn_jax.training.references import ReferenceCache, references
from relearn_jax.training.states import States
from relearn_jax.training.step import NOTHING, Build, Frozen, TrainState, make_begin, make_readout, make_step
from relearn_jax.training.streams import Stream
from relearn_jax.training.watching import watcher

# Called at each kept step with (step, the parameters that the method releases); returning True ends the stage there.
OnKeep = Callable[[int, Params], bool]
LOOK_EVERY = 1.0  # seconds, after which several processes ask each other whether one was told to stop


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage does, apart from the weights it starts from.

  Attributes:
    name: as it stands in the log and in the checkpoints' path.
    runs: names of the stacked runs.
    build: hyper-parameters -> objective.
    batch: data set name -> token rows `[runs, rows, T]` on the host; or rows that are read as they are needed, of which
      no statistics are wanted.
    hyper: "learning_rate", "weight_decay" and the objective's own; a value for all runs, or one for each.
    keep: ascending steps at which `on_keep` is called; the last one ends the stage.
    order: data set name -> an order of its rows for each run, all with batches of one size; the others, none of which
      is read as it is needed, are seen whole at every step.
    num_microbatches: parts in which a step's rows are worked through; more need less memory.
    schedule: step, counted from 0 -> what its learning rate is multiplied with.
  """

  name: str
  runs: Sequence[str]
  build: Build
  batch: Mapping[str, TokenRows | PreparedRows]
  hyper: Mapping[str, float | np.ndarray]
  keep: Sequence[int]
  order: Mapping[str, Sequence[Order]] = dataclasses.field(default_factory=dict)
  num_microbatches: int = 1
  schedule: Callable[[int], float] = lambda step: 1.0


def run_stage(stage: Stage, model: Model, start: Callable[[], Params], mesh: Mesh, folder: pathlib.Path,
              log: TrainLog, *, on_keep: OnKeep, save_every: float, frozen: Frozen = NOTHING,
              reinforced: Callable[[], Params] | None = None, cache: ReferenceCache | None = None,
              ledger: Ledger | None = None, settle: Callable[[], None] = lambda: None) -> None:
  """Trains stacked runs to the last kept step, or until `on_keep` ends it.

  A run whose loss, gradient or (at a kept step) weights are not finite ends there, in the ledger, which knows of
  everything up to a step before `on_keep` is called for it. The others go on as if it were not there.

  A state is saved at the first step, kept or not, after every `save_every` seconds; at a kept one after
  `on_keep` has returned. A stage that is run again goes on from there and repeats the steps since, to the same
  numbers, so `on_keep` sees a step twice and must not mind. After SIGTERM a state is saved behind the step at hand, or,
  of one process alone, in place of what `on_keep` was doing. How far each data set has come stands in the state as a
  position in its rows, which does not depend on devices and processes.

  Args:
    stage: what to do.
    model: architecture.
    start: gives what is trained, `[runs, ...]`, at step 0, padded and laid out over `mesh`.
    mesh: where the runs lie.
    folder: the stage's checkpoints.
    log: a row a step is appended.
    on_keep: see `OnKeep`.
    save_every: seconds.
    frozen: what is not trained, laid out over `mesh`.
    reinforced: gives the second frozen model of an objective that wants one, laid out as what is trained.
    cache: statistics of the frozen models are taken from here, and kept here.
    ledger: of runs that end; one of the stage's own by default.
    settle: waits for what `on_keep` has left to be done; a state says that nothing of a step before it is missing.

  Raises:
    AllEnded: no run is left.
  """
  ledger = ledger or Ledger(folder, stage.name, stage.runs, "learning_rate", stage.hyper["learning_rate"])
  objective: Objective = stage.build(stage.hyper)
  size = padded_runs(len(stage.runs), mesh)
  rows = _Rows(stage, sorted(objective.rows), mesh)
  each = lambda value: np.broadcast_to(np.asarray(value, np.float32), len(stage.runs))
  spread = lambda value: lay_out(pad_runs(each(value), size), runs_sharding(mesh))
  hyper = {key: spread(value) for key, value in stage.hyper.items()}
  states = States(folder / "resume", len(stage.runs))

  def refer(params: Params) -> Batch:
    return references(model, params, rows.data, objective.needs, mesh, frozen, rows.parts, rows.sizes,
                      reinforced=reinforced, cache=cache)
  batch, first, state, position = _begin(start, refer, lambda params: make_begin(
      stage.build, model.axes(), mesh)(params, hyper), states)
  rows.position |= position
  log.truncate(stage.name, first)
  ledger.rewind(first)
  step_fn = make_step(model, stage.build, mesh, stage.num_microbatches)
  read = make_readout(model, stage.build, mesh) if objective.readout else lambda state, _: state.params

  watch = _Watch(save_every)

  def save(step: int) -> float:
    settle()
    about = checkpoints.description(model, list(stage.runs), stage.name, step, positions=rows.position)
    return states.save(step, state, about)

  def release(step: int) -> bool:
    out = read(state, hyper)
    finite = to_host(finite_runs((state.params, out) if objective.readout else out), len(stage.runs))
    ledger.look(step, "weights", dict(zip(stage.runs, finite, strict=True)))
    try:
      with interrupts.deferred(not is_alone()):  # several cannot tell where each of them was stopped
        return on_keep(step, out)
    except interrupts.Preempted:
      if watch.resumes:
        save(step)
        states.finish()
      raise

  most = full_speed(model, state.params, any(one is not None for one in frozen), rows.longest,
                    mesh.devices.flat[0].device_kind, mesh.size)
  with (interrupts.deferred(), rows, states, log.stage(stage.name, ledger, most) as writer,
        progress(stage.keep[-1], stage.name) as bar):
    bar.update(first)
    step, ended = first, first in stage.keep and release(first)  # which a signal may have kept from its end
    while not ended and step < stage.keep[-1]:
      step += 1
      rate = stage.hyper["learning_rate"] * stage.schedule(step - 1)
      index, streamed = rows.take()
      watcher().begin_step(stage.name, step)
      state, report = step_fn(state, {**batch, **streamed}, hyper | {"learning_rate": spread(rate)}, rows.spread(index),
                              frozen)
      watcher().end_step(step, report.loss)
      writer.add(step, report, float(np.mean(rate)), *rows.count_tokens(index, streamed))
      bar.update(1)
      if step in stage.keep:
        writer.flush()
        ended = release(step)
        host_memory.tidy()
        if ended:
          bar.total = step  # all that was to do
          bar.refresh()
          break
      is_due, stop = watch.look()
      if step != stage.keep[-1] and (is_due or (isinstance(stop, interrupts.Preempted) and watch.resumes)):
        writer.flush()  # the log, and the ledger, know of all steps that are not repeated
        writer.waited(save(step))
        watch.saved = time.monotonic()
      if stop and step != stage.keep[-1]:
        states.finish()
        raise stop
  watcher().end_trace()
  states.remove()  # the stage's results are kept; nothing goes on from here


def _begin(start: Callable[[], Params], refer: Callable[[Params], Batch], begin: Callable[[Params], TrainState],
           states: States) -> tuple[Batch, int, TrainState, dict[str, int]]:
  """The data sets of a stage, the step from which it goes on, the state at that, and the positions in the rows."""
  first, params = states.last(), start()
  batch = refer(params)  # to the model at step 0
  state = begin(params)
  del params
  if not first:
    return batch, 0, state, {}
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  del state
  return batch, first, *states.restore(first, like)


class _Watch:
  """When a state is to be saved, and whether the stage is to stop.

  Attributes:
    resumes: whether a stage that is stopped goes on from a state.
    saved: when the last one was saved, or the stage began.
  """

  def __init__(self, save_every: float):
    self.save_every, self.resumes = save_every, np.isfinite(save_every)
    self.saved = self.looked = time.monotonic()

  def look(self) -> tuple[bool, BaseException | None]:
    """Whether a state is due, and what all processes are to raise where one of them was told to stop."""
    now = time.monotonic
    if is_alone():
      return now() - self.saved > self.save_every, interrupts.asked()
    is_due, is_late = agree(lambda: [now() - self.saved > self.save_every, now() - self.looked > LOOK_EVERY])
    if not is_late:
      return is_due, None
    self.looked = now()
    stop = any(everyone(interrupts.asked() is not None))
    return is_due, (interrupts.asked() or interrupts.Preempted()) if stop else None


class _Rows:
  """The data sets of a stage on the mesh, and which of their rows each step sees.

  Attributes:
    position: of each data set that is not seen whole: rows that the steps before this one have taken.
    data: the data sets that are held, laid out.
    longest: tokens of a row with its padding, of the data set where that is most.
  """

  def __init__(self, stage: Stage, names: Sequence[str], mesh: Mesh):
    self.mesh = mesh
    self.position = {name: 0 for name in names if name in stage.order}
    self.unit = row_shards(mesh) * stage.num_microbatches
    self.streams = {name: Stream(rows, stage.order[name], mesh, self.unit, stage.keep[-1]) for name in names
                    if isinstance(rows := stage.batch[name], PreparedRows)}
    self.host = {name: rows for name in names if isinstance(rows := stage.batch[name], TokenRows)}
    self.longest = max([rows.tokens.shape[-1] for rows in self.host.values()]
                       + [rows.about.counts.longest for rows in stage.batch.values() if isinstance(rows, PreparedRows)])
    self.order = {name: stage.order[name] for name in self.host if name in stage.order}
    self.parts = stage.num_microbatches
    self.sizes = {name: (len(stage.runs), rows.tokens.shape[1]) for name, rows in self.host.items()}
    # One empty row more, for a step to be filled up with.
    lengthen = lambda leaf: np.pad(leaf, ((0, 0), (0, 1), *((0, 0),) * (leaf.ndim - 2)))
    for name, orders in self.order.items():
      self.host[name] = jax.tree.map(lengthen, self.host[name])
      lengths = {order.batch_size for order in orders}
      assert len(lengths) == 1, f"runs see {lengths} rows of {name} a step"
    self.data: Batch = {name: shard_rows(rows, mesh, stage.num_microbatches) for name, rows in self.host.items()}
    self.totals = {name: _tokens(rows) for name, rows in self.host.items() if name not in self.order}

  def __enter__(self) -> None:
    pass

  def __exit__(self, *_: object) -> None:
    for stream in self.streams.values():
      stream.close()

  def take(self) -> tuple[dict[str, np.ndarray], Batch]:
    """Of the next step: data set that is held -> places `[runs, B]`, filled up with an empty row; others -> rows."""
    found = {}
    for name, orders in self.order.items():
      distinct = {order: order.places(self.position[name]) for order in orders}  # seeds are shared by arms
      places = np.stack([distinct[order] for order in orders])
      self.position[name] += places.shape[1]
      fill = -places.shape[1] % self.unit
      found[name] = np.pad(places, ((0, 0), (0, fill)), constant_values=self.host[name].tokens.shape[1] - 1)
    streamed = {}
    for name, stream in self.streams.items():
      streamed[name] = stream.take(self.position[name])
      self.position[name] += stream.size
    return found, streamed

  def spread(self, index: Mapping[str, np.ndarray]) -> Any:
    """The places on the mesh; None where every step sees everything."""
    if not index:
      return None
    return {name: lay_out(pad_runs(places.astype(np.int32), padded_runs(len(places), self.mesh)),
                          rows_sharding(self.mesh)) for name, places in index.items()}

  def count_tokens(self, index: Mapping[str, np.ndarray], streamed: Batch) -> tuple[Any, int]:
    """Real and padded tokens of all runs in a step; the real ones on the mesh, where no process has all rows."""
    counts: list[tuple[Any, int]] = [*self.totals.values(), *(_tokens(jax.tree.map(
        lambda leaf, at=places: np.take_along_axis(leaf, at[..., None], 1), self.host[name]))
        for name, places in index.items()),
        *(self.streams[name].count_tokens(rows) for name, rows in streamed.items())]
    return sum(real for real, _ in counts), sum(padded for _, padded in counts)


def _tokens(rows: TokenRows) -> tuple[int, int]:
  """Real and padded tokens of rows `[runs, B, T]` on the host."""
  # A row's tokens end with the last that counts; rows without one are padding.
  ends = np.max(np.where(np.asarray(rows.mask) > 0, np.arange(1, rows.mask.shape[-1] + 1), 0), -1)
  return int(ends.sum()), int(np.prod(rows.tokens.shape))
