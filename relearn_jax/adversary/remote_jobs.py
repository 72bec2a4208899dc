"""One job at a provider, from rows to models that can be asked: begun once, whatever is killed on the way."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from relearn_jax import interrupts
from relearn_jax.adversary.chat_rows import write_rows
from relearn_jax.adversary.interface import OVER, Adversary, JobBudget, JobState, Limited, Refused, Unreachable
from relearn_jax.parallel.processes import write_atomically

RECORD, ROWS = "job.json", "rows.jsonl"


@dataclasses.dataclass(frozen=True)
class Patience:
  """How a job is waited for.

  Attributes:
    seconds: after which a job is given up, and cancelled, of which nothing new is heard; and a provider that is not.
    poll: seconds between looks at most; the first ones follow faster.
    clock, sleep: of the waiting.
  """

  seconds: float
  poll: float = 1.0
  clock: Callable[[], float] = time.monotonic
  sleep: Callable[[float], None] = time.sleep

  def insist(self, call: Callable[[], Any]) -> Any:
    """Calls until the provider is heard.

    Raises:
      Unreachable: it is not, for too long.
    """
    until, pause = self.clock() + self.seconds, min(0.5, self.poll)
    while True:
      try:
        return call()
      except Unreachable:
        if self.clock() >= until:
          raise
        self.sleep(pause)
        pause = min(2 * pause, 30.0)


def finetune(adversary: Adversary, folder: pathlib.Path, name: str, model: str, rows: Sequence[dict[str, Any]],
             budget: JobBudget, patience: Patience, max_price: float | None = None) -> JobState:
  """Trains at a provider, and waits for the end; what became of it is kept in `folder`, and found there again.

  Before a job is begun its name is written down, and its identifier before it is first looked at. A run that was killed
  goes on with the job of that identifier, or, killed between the two, with the one that the provider knows by the name.

  Args:
    adversary: the provider.
    folder: of this job alone.
    name: of it, unlike that of every other.
    model: to begin from.
    rows: conversations.
    budget: what the job is told.
    patience: of the waiting.
    max_price: a job that the provider itself prices higher is not begun; None: any.

  Returns:
    A state that is over: nothing raises for what the provider does.
  """
  path = folder / RECORD
  known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
  if known.get("state"):
    state = known["state"]
    return JobState(**state | {"models": {int(step): one for step, one in state["models"].items()},
                               "refused": tuple(state["refused"])})

  def keep(**more: Any) -> None:
    known.update(more)
    write_atomically(path, json.dumps(known) + "\n")
  try:
    if "id" not in known:
      began = patience.insist(lambda: adversary.find(name)) if known else None
      keep(name=name)
      keep(id=began or _begin(adversary, folder, model, rows, budget, name, patience, max_price))
    state = _wait(adversary, known["id"], patience)
  except Limited as error:
    state = JobState(known.get("id", ""), "limited", message=str(error))
  except Refused as error:
    state = JobState(known.get("id", ""), "failed", message=str(error))
  except Unreachable as error:
    state = JobState(known.get("id", ""), "hung",
                     message=f"the provider was not heard for {patience.seconds:g} s ({error})")
  if state.status != "hung":  # it may be heard of when this is run again
    keep(state={"id": state.id, "status": state.status, "models": dict(state.models), "message": state.message,
                "tokens": state.tokens, "refused": list(state.refused)})
  return state


def _begin(adversary: Adversary, folder: pathlib.Path, model: str, rows: Sequence[dict[str, Any]], budget: JobBudget,
           name: str, patience: Patience, max_price: float | None) -> str:
  """Uploads the rows and begins a job; its identifier."""
  write_rows(folder / ROWS, rows)
  file = patience.insist(lambda: adversary.upload(folder / ROWS))
  price = None if max_price is None else adversary.estimate(model, file, budget)
  if price is not None and max_price is not None and price > max_price:
    raise Limited(f"would cost {price:.2f} by the provider's estimate, and {max_price:.2f} is left")
  try:
    return adversary.create(model, file, budget, name)
  except Unreachable:  # the request may have begun the job all the same
    found: str | None = patience.insist(lambda: adversary.find(name))
    return found or adversary.create(model, file, budget, name)


def _wait(adversary: Adversary, job: str, patience: Patience) -> JobState:
  """The job once it is over."""
  news, since, pause = "", patience.clock(), min(0.05, patience.poll)
  while True:
    state: JobState = patience.insist(lambda: adversary.look(job))
    if state.status in OVER:
      return state
    if state.news != news:
      news, since = state.news, patience.clock()
    if patience.clock() - since > patience.seconds:
      with contextlib.suppress(Refused, Unreachable):
        adversary.cancel(job)
      return JobState(job, "hung", message=f"nothing was heard of it for {patience.seconds:g} s; it was cancelled")
    patience.sleep(pause)
    if reason := interrupts.asked():  # of a signal that was left to what is being trained in this process
      raise reason
    pause = min(1.5 * pause, patience.poll)
