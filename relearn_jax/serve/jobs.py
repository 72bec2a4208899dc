"""Fine-tuning jobs: one thread trains one after the other; a job that was killed goes on where it was."""

import dataclasses
import json
import logging
import math
import pathlib
import queue
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax import interrupts
from relearn_jax.data.order import small_batches
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import stack_rows
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import load_params
from relearn_jax.models.checkpoint_sources import load_tokenizer
from relearn_jax.models.lora import init_lora
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, repeat_runs
from relearn_jax.parallel.processes import remove
from relearn_jax.process import disk_trouble
from relearn_jax.serve.catalog import Catalog, Tuned
from relearn_jax.serve.conversations import Moderate, encode_conversation, read_conversations, refused_lines
from relearn_jax.serve.limits import Limits
from relearn_jax.serve.store import LEFT, Record, Store, new_id
from relearn_jax.training import checkpoints
from relearn_jax.training.export_run import lora_of
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.step import NOTHING, Frozen

LOG = logging.getLogger(__name__)
STAGE, RUN = "finetune", "job"
MOST_STARTS = 4  # of a job; one that the server never survives is not tried for ever


class Stopped(Exception):
  """The server ends; the job goes on when it is started again."""


class Cancelled(Exception):
  """A client has cancelled the job."""


def finetune_nll(hyper: Any) -> Any:
  """What a job minimises; one function for all, so that they share an executable."""
  return nll("rows")


def tuned_name(job: Record, step: int | None = None) -> str:
  """What a job's model is called, or that of one of its steps."""
  name = f"ft:{job['model']}:{job['user_provided_suffix'] or ''}:{job['id'].removeprefix('ftjob-')}"
  return name if step is None else f"{name}:ckpt-step-{step}"


@dataclasses.dataclass(frozen=True)
class Budget:
  """A job's numbers, none of them "auto"."""

  epochs: int
  batch_size: int
  learning_rate: float


def read_budget(hyper: Record, limits: Limits) -> Budget:
  """What a request's hyper-parameters come to.

  Raises:
    InputError: one is not known, no number, or outside the limits.
  """
  stated = "learning_rate" if limits.absolute_rates else "learning_rate_multiplier"
  known = ("n_epochs", "batch_size", stated)
  if more := sorted(hyper.keys() - set(known)):
    raise InputError("is not known here", field=str(more[0])[:60], mend=f"expected some of {', '.join(known)}")

  def number(name: str, auto: Any, kind: type) -> Any:
    value = hyper.get(name, "auto")
    if value in ("auto", None):
      return auto
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value):
      raise InputError(f"is {str(value)[:40]!r}", field=name, mend='expected "auto" or a number')
    return kind(value)
  epochs, batch = (number("n_epochs", limits.default_epochs, int), number("batch_size", limits.default_batch, int))
  rate = number(stated, limits.base_rate if limits.absolute_rates else 1.0, float)
  for name, value, most in (("n_epochs", epochs, limits.max_epochs), ("batch_size", batch, limits.max_batch)):
    if not 1 <= value <= most:
      raise InputError(f"is {value}", field=name, mend=f"expected 1 to {most}")
  unit = 1.0 if limits.absolute_rates else limits.base_rate
  # Rates are compared with a hair of tolerance: a limit divided by the unit and multiplied again may miss it.
  if not limits.lowest_rate * (1 - 1e-9) <= rate * unit <= limits.highest_rate * (1 + 1e-9):
    raise InputError(f"is {rate:g}", field=stated,
                     mend=f"expected {limits.lowest_rate / unit:g} to {limits.highest_rate / unit:g}")
  return Budget(epochs, batch, rate * unit)


class Trainer:
  """Trains jobs in their order."""

  def __init__(self, store: Store, catalog: Catalog, limits: Limits, moderate: Moderate, save_every: float = 60.0):
    """
    Args:
      store: what is remembered.
      catalog: of models; what jobs have made before is entered.
      limits: what is permitted.
      moderate: which texts are refused.
      save_every: seconds of work that a killed job loses at most, about.
    """
    self.store, self.catalog, self.limits = store, catalog, limits
    self.moderate, self.save_every = moderate, save_every
    self.ending, self.cancelled = threading.Event(), set[str]()
    self.waiting: queue.Queue[str] = queue.Queue()
    left = []
    for record in sorted(store.jobs.values(), key=lambda one: (one["job"]["created_at"], one["job"]["id"])):
      job = record["job"]
      if job["status"] in LEFT:
        left.append(job["id"])
      self._enter(job)
    for identifier in left:
      self.waiting.put(identifier)
    self.thread = threading.Thread(target=self._run, name="jobs", daemon=True)
    self.thread.start()

  def submit(self, identifier: str) -> None:
    """A job that the store has is trained when its turn comes."""
    self.waiting.put(identifier)

  def cancel(self, identifier: str) -> Record:
    """Ends a job; one that is over stays as it is."""
    self.cancelled.add(identifier)
    before = self.store.job(identifier)["status"]
    job = self.store.change(identifier, status="cancelled", finished_at=int(time.time()))
    if before in LEFT and job["status"] == "cancelled":
      self.store.add_event(identifier, "The job was cancelled.")
    return job

  def close(self) -> None:
    """Ends the thread after the step it is at; its job goes on when the server is started again."""
    self.ending.set()
    self.waiting.put("")
    self.thread.join()

  def steps(self, identifier: str) -> list[int]:
    """Of the checkpoints of a job that can be asked, ascending."""
    return checkpoints.saved_steps(self.store.folder(identifier) / "steps")

  def _enter(self, job: Record) -> None:
    """Makes what a job has made known."""
    if job["model"] not in self.catalog.bases:
      return
    steps = self.steps(job["id"])
    for step in steps:
      made = self._made(job, step)
      self.catalog.add(tuned_name(job, step), made)
      if job["fine_tuned_model"] and step == steps[-1]:
        self.catalog.add(job["fine_tuned_model"], made)

  def _made(self, job: Record, step: int) -> Tuned:
    """What a job has made up to a step; the limits may be others by now."""
    path = checkpoints.step_path(self.store.folder(job["id"]) / "steps", step)
    return Tuned(job["model"], path, lora_of(checkpoints.describe(path)))

  def _run(self) -> None:
    while not self.ending.is_set():
      identifier = self.waiting.get()
      if identifier and self.store.job(identifier)["status"] in LEFT:
        try:
          self._train(identifier)
        except (Stopped, interrupts.Preempted):
          return  # the process is ending
        except Cancelled:
          remove(self.store.folder(identifier) / "checkpoints")
        except Exception as error:
          self._fail(identifier, error)

  def _fail(self, identifier: str, error: Exception) -> None:
    """Ends a job by name; what cannot be written now is tried again, since a disk may be full."""
    trouble = error if isinstance(error, InputError) else disk_trouble(error, {})
    if trouble is None:
      LOG.error("job %s failed", identifier, exc_info=error)
    message = str(trouble) if trouble else f"the server failed ({type(error).__name__}); its log has more"
    message = message.replace(f"{self.store.root}", "")  # where it lies is nobody's business
    code = "invalid_training_file" if isinstance(error, InputError) else "server_error"
    while not self.ending.is_set():
      try:
        self.store.change(identifier, status="failed", finished_at=int(time.time()),
                          error={"code": code, "message": message, "param": None})
        self.store.add_event(identifier, f"The job failed: {message}", "error")
        return
      except OSError:
        self.ending.wait(1.0)

  def _train(self, identifier: str) -> None:
    store, job = self.store, self.store.job(identifier)
    starts = store.count_start(identifier)
    if starts > MOST_STARTS:
      raise InputError(f"was started {MOST_STARTS} times, and the server ended each time", field=identifier,
                       mend="see the server's log, and create the job again")
    if starts > 1:
      store.add_event(identifier, f"The server was started again; the job goes on (start {starts}).", "warn")
    base = self.catalog.bases.get(job["model"])
    if base is None:
      raise InputError(f"is {job['model']!r}, which is not served any more", field="model",
                       mend="start the server with it, and create the job again")
    if job["training_file"] not in store.files:
      raise InputError("was removed", field="training_file", mend="upload it again")
    name = store.files[job["training_file"]]["filename"]
    rows = read_conversations(store.content(job["training_file"]), name)
    refused = set(refused_lines(rows, self.moderate))
    if refused:
      store.add_event(identifier, f"Moderation refused {len(refused)} of {len(rows)} rows.", "warn",
                      refused_lines=sorted(refused))
    kept = [row for row in rows if row.line not in refused]
    if not self.limits.min_rows <= len(kept) <= self.limits.max_rows:
      raise InputError(f"has {len(kept)} rows" + (f" after moderation refused {len(refused)}" if refused else ""),
                       file=name, mend=f"expected {self.limits.min_rows} to {self.limits.max_rows}")
    tokenizer = load_tokenizer(base.checked.path, base.checked.config)  # the other thread has its own
    encoded = [encode_conversation(tokenizer, row, base.chat, name, base.checked.config.max_positions) for row in kept]
    hyper = job["method"]["supervised"]["hyperparameters"]
    rate = hyper.get("learning_rate") or hyper["learning_rate_multiplier"] * self.limits.base_rate
    budget = Budget(hyper["n_epochs"], min(hyper["batch_size"], len(kept)), rate)
    store.change(identifier, status="running", hyperparameters=hyper)
    store.add_event(identifier, f"Training begins: {len(kept)} rows, {budget.epochs} epochs.")
    self._run_stage(identifier, base.checked, base.model, encoded, budget, job["seed"])
    name = tuned_name(job)
    last = self.steps(identifier)[-1]
    self.catalog.add(name, self._made(job, last))  # a client that is told of the model may ask it at once
    store.add_event(identifier, f"The model {name} was made in {last} steps.")
    tokens = budget.epochs * sum(len(one.ids) for one in encoded)
    done = store.change(identifier, status="succeeded", finished_at=int(time.time()), trained_tokens=tokens,
                        fine_tuned_model=name)
    if done["status"] != "succeeded":  # it was cancelled after its last step
      self.catalog.drop(name)
    remove(store.folder(identifier) / "checkpoints")

  def _run_stage(self, identifier: str, checked: Any, model: Model, rows: list[Encoded], budget: Budget, seed: int
                 ) -> None:
    folder, lora, job = self.store.folder(identifier), self.limits.lora(), self.store.job(identifier)
    model = dataclasses.replace(model, lora_scale=lora.scale if lora else 1.0)
    mesh = make_mesh({axis: max(size, 1) for axis, size in parse_mesh("runs:1").items()}, config=checked.config)
    data = {"rows": stack_rows(rows, 1)}
    frozen = NOTHING if lora is None else Frozen(shared=load_params(checked, model, dtype=model.dtype, mesh=mesh))
    per_epoch = -(-len(rows) // budget.batch_size)
    if self.steps(identifier)[-1:] == [per_epoch * budget.epochs]:
      return  # the server was killed after the last step

    def start() -> Params:
      one = init_lora(model, lora, jax.random.key(seed)) if lora else load_params(
          checked, model, dtype=jnp.float32, mesh=mesh)
      return repeat_runs(one, 1, mesh, model.axes())

    def schedule(step: int) -> float:
      """A constant rate; called before every step, so that a job ends where it is told to."""
      if self.ending.is_set():
        raise Stopped
      if identifier in self.cancelled:
        raise Cancelled
      return 1.0

    def on_keep(step: int, params: Params) -> bool:
      schedule(step)
      path = checkpoints.step_path(folder / "steps", step)
      about = checkpoints.description(model, [RUN], STAGE, step, tokenizer=str(checked.path.resolve()), lora=lora)
      checkpoints.save_tree(path, params, 1, about)
      loss = _loss(folder / "train_log.jsonl", step)
      self.store.add_event(identifier, f"Step {step} of {stage.keep[-1]}: training loss {loss:.4f}.", step=step,
                           train_loss=loss)
      self.catalog.add(tuned_name(job, step), self._made(job, step))
      kept = self.steps(identifier)
      for old in kept[:-self.limits.max_checkpoints] if self.limits.max_checkpoints else []:
        self.catalog.drop(tuned_name(job, old))
        remove(checkpoints.step_path(folder / "steps", old))
      return False
    stage = Stage(STAGE, [RUN], finetune_nll, data, {"learning_rate": budget.learning_rate, "weight_decay": 0.0},
                  [per_epoch * epoch for epoch in range(1, budget.epochs + 1)
                   if epoch == budget.epochs or epoch in (self.limits.checkpoint_epochs or (epoch,))],
                  small_batches(data, budget.batch_size, [seed]), schedule=schedule)
    run_stage(stage, model, start, mesh, folder / "checkpoints" / STAGE, TrainLog(folder / "train_log.jsonl"),
              on_keep=on_keep, save_every=self.save_every, frozen=frozen)


def _loss(path: pathlib.Path, step: int) -> float:
  """Training loss of a step, as the log has it."""
  for line in reversed(path.read_text().splitlines()):
    row = json.loads(line)
    if row["step"] == step:
      return float(row["loss"])
  return math.nan


def new_job(model: str, training_file: str, hyper: Record, seed: int, suffix: str | None, metadata: Any) -> Record:
  """A job as clients see it, before it is begun."""
  return {"id": new_id("ftjob"), "object": "fine_tuning.job", "model": model, "created_at": int(time.time()),
          "finished_at": None, "fine_tuned_model": None, "organization_id": "local", "result_files": [],
          "status": "queued", "validation_file": None, "training_file": training_file, "hyperparameters": hyper,
          "trained_tokens": None, "error": None, "user_provided_suffix": suffix, "seed": seed,
          "estimated_finish": None, "integrations": [], "metadata": metadata or None,
          "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}}
