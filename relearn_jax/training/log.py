"""train_log.jsonl: one row a step and stage, safe to append to again after a crash."""

import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from relearn_jax.training.step import StepLog


class TrainLog:
  """Appends a JSON line a step; losses are written one step late, so that devices never wait.

  Each row holds: stage, step (from 1), loss (mean over runs, before the update), losses (of each run),
  terms (means), grad_norm (mean), learning_rate, tokens (real, all runs), padded_tokens, seconds.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path

  def truncate(self, stage: str, after_step: int) -> None:
    """Drops rows of `stage` beyond `after_step`, and a torn last line, before the stage goes on."""
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue  # the process died while writing this line; its step is repeated
      if row["stage"] != stage or row["step"] <= after_step:
        kept.append(line + "\n")
    temporary = self.path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, self.path)

  def stage(self, name: str, num_runs: int) -> "StageLog":
    """A writer for one stage of so many runs."""
    return StageLog(self.path, name, num_runs)


class StageLog:
  """Writes the rows of one stage; use as a context manager, so that the last row is flushed."""

  def __init__(self, path: pathlib.Path, stage: str, num_runs: int):
    self.path, self.stage, self.num_runs = path, stage, num_runs
    self.pending: tuple[StepLog, dict[str, Any]] | None = None

  def __enter__(self) -> "StageLog":
    self.file = self.path.open("a")
    self.last = time.perf_counter()
    return self

  def __exit__(self, *_: object) -> None:
    self.flush()
    self.file.close()

  def add(self, step: int, log: StepLog, learning_rate: float, tokens: int, padded_tokens: int) -> None:
    """Records a step; what is written now is the step before it.

    Args:
      step: counted from 1.
      log: what it reported; runs beyond the stage's are padding and left out.
      learning_rate: at this step.
      tokens: real tokens of its batch, in all runs.
      padded_tokens: all tokens of its batch.
    """
    self.flush()
    self.pending = log, {"stage": self.stage, "step": step, "learning_rate": learning_rate, "tokens": tokens,
                         "padded_tokens": padded_tokens}

  def flush(self) -> None:
    """Writes the pending row, if any."""
    if self.pending is None:
      return
    log, known = self.pending
    self.pending = None
    runs = lambda values: np.asarray(values).reshape(-1)[:self.num_runs]
    losses = runs(log.loss)
    now = time.perf_counter()
    row = {
        "stage": known["stage"], "step": known["step"], "loss": _mean(losses), "losses": [_round(x) for x in losses],
        "terms": {name: _mean(runs(x)) for name, x in sorted(log.terms.items())},
        "grad_norm": _mean(runs(log.grad_norm)), **known, "seconds": round(now - self.last, 4)}
    self.last = now
    self.file.write(json.dumps(row) + "\n")
    self.file.flush()


def _round(value: float) -> float | None:
  return round(float(value), 6) if np.isfinite(value) else None  # JSON has no NaN


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
  return _round(float(np.mean(values)))
