"""Runs that ended because something of theirs was not finite: which, in what stage, at which step.

Stacked runs go on together, whatever becomes of one of them: the arithmetic of a run that has ended is NaN in, NaN
out, and nothing of it is used. What a ledger says depends on the numbers alone, so that a stage that was killed and
resumed ends the same runs at the same steps.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import agree, write_atomically

What = Literal["loss", "gradient", "weights", "answers", "job"]
FILE = "ended.json"


@dataclasses.dataclass(frozen=True)
class Ended:
  """The end of a run.

  Attributes:
    run: its name among the stacked runs.
    stage: in which it ended.
    step: from which on nothing of it is used in this stage, counted from 1; 0: it was so before the first.
    what: was not finite: the loss or the gradient's norm at the step, before its update; the weights after it; or what
      the model then made of questions and scored rows. "job": a provider did not train it to the end.
    why: of a job, in the provider's words.
  """

  run: str
  stage: str
  step: int
  what: What
  why: str = ""

  def __str__(self) -> str:
    if self.what == "job":
      return f"{self.run} ended in stage {self.stage!r}: {self.why}"
    verb = "are" if self.what in ("weights", "answers") else "is"
    what = {"gradient": "norm of its gradient", "answers": "log-probabilities of its answers"}.get(self.what, self.what)
    whose = "its" if self.what in ("loss", "weights") else "the"
    return f"{self.run} ended in stage {self.stage!r} at step {self.step}: {whose} {what} {verb} not finite"


def in_words(ended: Sequence[Ended]) -> str:
  """How the first of several runs ended, and that the others did."""
  others = len(ended) - 1
  more = "" if not others else ", and so did another run" if others == 1 else f", and so did {others} other runs"
  return f"{min(ended, key=lambda one: one.step)}{more}"


class AllEnded(InputError):
  """Every run of a stage has ended; `ended` says how."""

  def __init__(self, ended: Sequence[Ended], field: str, rates: Any):
    self.ended = tuple(ended)
    low, high = float(np.min(rates)), float(np.max(rates))
    rate = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    super().__init__(f"was {rate} when {in_words(self.ended)}: none is left", field=field,
                     mend="lower it, or take fewer steps (train_log.jsonl has the losses), in another --workdir")


class Ledger:
  """Which runs of a stage have ended, kept in a file beside its checkpoints (there is none while none has).

  Attributes:
    ended: name of a run -> how it ended.
  """

  def __init__(self, folder: pathlib.Path, stage: str, runs: Sequence[str], field: str, rates: Any,
               idle: Iterable[str] = ()):
    """
    Args:
      folder: of the stage's checkpoints.
      stage: its name.
      runs: names of the stacked runs.
      field: what the learning rate is called in the configuration, for messages.
      rates: learning rate, of all runs or of each.
      idle: runs that only keep their place; what becomes of them does not matter.
    """
    self.path, self.stage, self.runs, self.field, self.rates = folder / FILE, stage, list(runs), field, rates
    self.idle, self.through = set(idle), set[str]()
    self.ended = read_ended(folder)

  def rewind(self, step: int) -> None:
    """Forgets what came after a step, from which the stage goes on.

    Raises:
      AllEnded: no run had been left by then.
    """
    kept = {run: one for run, one in self.ended.items() if one.step <= step}
    if kept != self.ended:
      self.ended = kept
      self._save()
    self._check()

  def look(self, step: int, what: What, finite: Mapping[str, Any]) -> None:
    """Ends the runs that are not finite.

    Args:
      step: at which.
      what: is looked at.
      finite: name of a run -> whether that is finite; of some of the runs.

    Raises:
      AllEnded: no run is left.
    """
    new = {run: Ended(run, self.stage, step, what) for run, ok in finite.items()
           if not ok and run not in self.ended and run not in self.idle and run not in self.through}
    if new:
      self.ended |= new
      self._save()
    self._check()

  def end(self, run: str, step: int, why: str) -> None:
    """Ends a run whose job a provider did not do.

    Raises:
      AllEnded: no run is left.
    """
    if run not in self.ended:
      self.ended[run] = Ended(run, self.stage, step, "job", why)
      self._save()
    self._check()

  def finish(self, runs: Iterable[str]) -> None:
    """Nothing of these runs is used from here on: what becomes of them does not matter, but they have not ended."""
    self.through |= set(runs) - self.ended.keys()

  def ignore(self, runs: Iterable[str]) -> None:
    """These runs have ended before the stage, and only keep their place in it."""
    self.idle |= set(runs)
    self._check()

  def has_ended(self, run: str, step: int) -> bool:
    """Whether nothing of a run is to be used at a step."""
    return run in self.idle or (run in self.ended and self.ended[run].step <= step)

  def _check(self) -> None:
    watched = [run for run in self.runs if run not in self.idle]
    if watched and all(run in self.ended for run in watched):
      raise AllEnded([self.ended[run] for run in watched], self.field, self.rates)

  def _save(self) -> None:
    rows = [dataclasses.asdict(one) for one in self.ended.values()]
    write_atomically(self.path, json.dumps(rows, indent=1) + "\n")


def read_ended(folder: pathlib.Path) -> dict[str, Ended]:
  """Name of a run -> how it ended, as a stage's ledger kept it."""
  path = folder / FILE
  rows = agree(lambda: json.loads(path.read_text()) if path.exists() else [])
  return {row["run"]: Ended(**row) for row in rows}


@jax.jit
def finite_runs(tree: Any) -> Bool[Array, " runs"]:
  """Whether all of a run's numbers are finite, for stacked arrays `[runs, ...]`."""
  return jnp.stack([jnp.isfinite(leaf).all(range(1, leaf.ndim)) for leaf in jax.tree.leaves(tree)]).all(0)
