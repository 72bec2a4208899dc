"""train_log.jsonl: one row a step and stage, safe to append to again after a crash."""

import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from relearn_jax.parallel.mesh import to_host
from relearn_jax.parallel.processes import is_first, write_atomically
from relearn_jax.training.ended import AllEnded, Ledger
from relearn_jax.training.step import StepLog
from relearn_jax.training.watching import watcher


class TrainLog:
  """Appends a JSON line a step; losses are written one step late, so that devices never wait.

  Each row holds: stage, step (from 1), loss (mean over runs, before the update), losses (of each run, null where it
  is not finite), terms (means), grad_norm (mean), left_out (names of the runs that no mean counts: those that have
  ended, or only keep their place), learning_rate, tokens (real, all runs), padded_tokens, seconds (of the first step
  with its compilation); save_seconds, of seconds, where the step waited for a state to be saved; mfu, of real tokens,
  where the peak of the devices is known (`full_speed`).
  """

  def __init__(self, path: pathlib.Path):
    self.path = path

  def truncate(self, stage: str, after_step: int) -> None:
    """Drops rows of `stage` beyond `after_step`, and a torn last line, before the stage goes on."""
    if not is_first() or not self.path.exists():
      return
    kept, text = [], self.path.read_text()
    for line in text.splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue  # the process died while writing this line; its step is repeated
      if row["stage"] != stage or row["step"] <= after_step:
        kept.append(line + "\n")
    if "".join(kept) != text:
      write_atomically(self.path, "".join(kept))

  def stage(self, name: str, ledger: Ledger, full_speed: float | None = None) -> "StageLog":
    """A writer for one stage, whose runs end in `ledger`; `full_speed` in real tokens per second, where it is known."""
    return StageLog(self.path, name, ledger, full_speed)


class StageLog:
  """Writes the rows of one stage; use as a context manager, so that the last row is flushed."""

  def __init__(self, path: pathlib.Path, stage: str, ledger: Ledger, full_speed: float | None = None):
    self.path, self.stage, self.ledger, self.full_speed = path, stage, ledger, full_speed
    self.pending: tuple[StepLog, dict[str, Any]] | None = None
    self.saving: float | None = None  # seconds that the step to come has waited for a state

  def __enter__(self) -> "StageLog":
    self.file = self.path.open("a") if is_first() else None
    self.last = time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    try:
      self.flush()
    finally:
      if self.file:
        self.file.close()

  def add(self, step: int, log: StepLog, learning_rate: float, tokens: int | jax.Array, padded_tokens: int) -> None:
    """Records a step; what is written now is the step before it.

    Args:
      step: counted from 1.
      log: what it reported; runs beyond the stage's are padding and left out.
      learning_rate: at this step.
      tokens: real tokens of its batch, in all runs; fetched when they are written.
      padded_tokens: all tokens of its batch.

    Raises:
      AllEnded: in the step before it no run was left.
    """
    self.flush()
    self.pending = log, {"stage": self.stage, "step": step, "learning_rate": learning_rate, "tokens": tokens,
                         "padded_tokens": padded_tokens}
    if self.saving is not None:
      self.pending[1]["save_seconds"], self.saving = round(self.saving, 4), None

  def waited(self, seconds: float) -> None:
    """The step to come has waited until a state was copied, or an earlier one written."""
    self.saving = seconds

  def flush(self) -> None:
    """Writes the pending row, if any, and ends the runs whose loss or gradient in it is not finite.

    Raises:
      AllEnded: no run is left; the row is written.
    """
    if self.pending is None:
      return
    log, known = self.pending
    self.pending = None
    names = self.ledger.runs
    log, known["tokens"] = to_host(log), int(to_host(known["tokens"]))
    runs = lambda values: values.reshape(-1)[:len(names)]
    losses, norms, step = runs(log.loss), runs(log.grad_norm), known["step"]
    gone: AllEnded | None = None
    try:
      self.ledger.look(step, "loss", dict(zip(names, np.isfinite(losses), strict=True)))
      self.ledger.look(step, "gradient", dict(zip(names, np.isfinite(norms), strict=True)))
    except AllEnded as error:
      gone = error
    # Runs that nothing is used of any more may be anything, and are in no mean either.
    counted = [i for i, name in enumerate(names) if not self.ledger.has_ended(name, step)
               and (name not in self.ledger.through or np.isfinite(losses[i]) and np.isfinite(norms[i]))]
    mean = lambda values: _round(float(np.mean(runs(values)[counted]))) if counted else None
    now = time.perf_counter()
    row = {
        "stage": known["stage"], "step": step, "loss": mean(losses), "losses": [_round(x) for x in losses],
        "terms": {name: mean(x) for name, x in sorted(log.terms.items())}, "grad_norm": mean(norms),
        "left_out": [name for i, name in enumerate(names) if i not in counted], **known,
        "seconds": round(now - self.last, 4)}
    if self.full_speed:
      row["mfu"] = round(row["tokens"] / (now - self.last) / self.full_speed, 4)
    self.last = now
    watcher().row(row)
    if self.file:
      self.file.write(json.dumps(row) + "\n")
      self.file.flush()
    if gone:
      raise gone


def _round(value: float) -> float | None:
  return round(float(value), 6) if np.isfinite(value) else None  # JSON has no NaN; whose it is stands in `left_out`
