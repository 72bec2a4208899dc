"""How long commands that share a grid by --claim are at it, and what they keep on disk, by arithmetic."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from relearn_jax.audit.acquire import every
from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.claims import is_ready
from relearn_jax.audit.stages import PRETRAIN, Planned
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work, adapter_leaves, count, leaves


class Disk(NamedTuple):
  """Bytes on disk.

  Attributes:
    kept: weights that are kept, at most at a time.
    left: of these, at the end.
    state: of the largest state that a command goes on from; two of them while it writes one.
    export: a run as a Hugging Face folder, in float32.
  """

  kept: int
  left: int
  state: int
  export: int


class Grid(NamedTuple):
  """An audit's stages beside their works.

  Attributes:
    stages: as planned; their works come first, in the same order, then those of all interviews.
    calls: of each stage, how often its interviews ask a block of models.
  """

  stages: Sequence[Planned]
  calls: Sequence[int]

  @property
  def cells(self) -> int:
    """Models under attacks."""
    return sum(len(stage.cells) for stage in self.stages)

  def stage_seconds(self, steps: Sequence[float]) -> list[float]:
    """Of each stage with its interviews, from the seconds of each work with all its steps."""
    number = len(self.stages)
    asking, calls = sum(steps[number:]), sum(self.calls)
    return [own + asking * mine / calls for own, mine in zip(steps[:number], self.calls, strict=True)]


def makespan(stages: Sequence[Planned], seconds: Sequence[float], commands: int) -> float:
  """Seconds from the first stage to the end of the last, if each command that is free claims the first that is ready.

  The model that is pretrained is there before: everybody waits for it.
  """
  takes = {stage.name: own for stage, own in zip(stages, seconds, strict=True)}
  now = sum(takes[stage.name] for stage in stages if stage.kind == PRETRAIN)
  left = [stage for stage in stages if stage.kind != PRETRAIN]
  running: list[tuple[float, str]] = []
  while left:
    claimed = {name for _, name in running}
    free = (stage for stage in left if stage.name not in claimed and is_ready(stage, left))
    for stage in free if len(running) < commands else ():
      heapq.heappush(running, (now + takes[stage.name], stage.name))
      if len(running) == commands:
        break
    now, done = heapq.heappop(running)
    left = [stage for stage in left if stage.name != done]
  return now


def state_bytes(work: Work) -> int:
  """A state of all runs, fp32: what is trained and two moments, 12 P, and at most 4 P for each copy of an objective."""
  return work.runs * (12 + 4 * work.copies) * estimate(work, {}).num_trained if work.kind == "train" else 0


def audit_disk(config: Audit, stages: Sequence[Planned], works: Sequence[Work]) -> Disk:
  """What an audit keeps, fp32, 4 bytes a number of a model.

  Every chain once it has memorised; a second model of each, where a method reinforces; of unlearning each chain and its
  control at each of `unlearn.depths` points (all steps with `keep_weights`); relearned weights with `keep_weights`
  alone. At the end the memorised controls and second models are gone. Models that were given to begin with count
  as memorised until then. What does not fit on a command's device is read from here.
  """
  model = 4 * count(leaves(works[0].config))
  given = 2 * model if config.arms.memorized else 0
  kept = left = given
  left -= given if not config.keep_weights else 0
  for stage in stages:
    if stage.kind in ("memorize", "reinforce"):
      kept += model * len(stage.chains)
      stays = stage.chains if config.keep_weights else [
          chain for chain in stage.chains if stage.kind == "memorize" and chain.arm == "U"]
      left += model * len(stays)
    elif stage.kind == "unlearn":
      points = len(every(stage.steps, config.unlearn.keep_every)) if config.keep_weights else config.unlearn.depths
      kept, left = (total + model * points * len(stage.chains) for total in (kept, left))
    elif stage.kind == "attack" and config.keep_weights:
      lora = config.attack.adapter(stage.attack.adapter)
      one = 4 * count(adapter_leaves(works[0].config, lora.rank, lora.targets)) if lora else model
      kept, left = kept + one * len(stage.cells), left + one * len(stage.cells)
  return Disk(kept, left, max(map(state_bytes, works)), model)


def job_disk(works: Sequence[Work], keep_every: int) -> Disk:
  """What an unlearning job keeps, fp32: what it trains, each `keep_every` steps and at the last, and a second model."""
  kept = 0
  for work in works:
    if work.kind == "train":
      steps = every(work.steps, keep_every) if keep_every else []
      times = len(steps) if work.name == "unlearn" else 1
      kept += 4 * times * estimate(work, {}).num_trained
  return Disk(kept, kept, max(map(state_bytes, works)), 4 * estimate(works[-1], {}).num_params)
