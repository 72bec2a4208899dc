"""What training is told, whatever it trains for: optimizer, batches, adapter, precision."""

import dataclasses
import math
from typing import Any

from relearn_jax.errors import checker
from relearn_jax.models.checkpoint import Checked
from relearn_jax.models.decoder import REMAT
from relearn_jax.models.lora import ALL, LoraConfig
from relearn_jax.models.model import Model, unroll


@dataclasses.dataclass
class AdapterSettings:
  """What is trained.

  Attributes:
    kind: "full" (all parameters) or "lora" (a low-rank adapter on a frozen base).
    rank, alpha, targets: of the adapter; see `models.lora.LoraConfig`.
  """

  kind: str = "full"
  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = (ALL,)

  def lora(self) -> LoraConfig | None:
    """The adapter's form; None where all parameters are trained."""
    return None if self.kind == "full" else LoraConfig(self.rank, self.alpha, tuple(self.targets))


@dataclasses.dataclass
class StepSettings:
  """How a step goes through its rows.

  Attributes:
    batch_size: rows of a step; a batch as large as the data set (in an audit also 0) is all of it in file order, at
      every step.
    num_microbatches: parts in which a step's rows are worked through; more need less memory.
    remat: what a layer keeps for its backward pass: none (all of it), dots, attn or full (nothing).
  """

  batch_size: int = 32
  num_microbatches: int = 1
  remat: str = "none"


SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass
class ScheduleSettings:
  """How the learning rate goes.

  Attributes:
    warmup_steps: steps in which the learning rate rises from 0 to its peak, linearly.
    schedule: of the learning rate after them: constant, or linear or cosine to 0 at the last step.
  """

  warmup_steps: int = 0
  schedule: str = "constant"


def rate_share(settings: ScheduleSettings, steps: int, step: int) -> float:
  """What the learning rate is multiplied with at a step, counted from 0, as transformers' schedulers do it.

  step / warmup_steps during warmup (0 at the very first step); then 1, or with t the share of the steps
  after warmup that are done, 1 - t or (1 + cos(pi t)) / 2.

  Args:
    settings: warmup and schedule.
    steps: of training.
    step: which.
  """
  if step < settings.warmup_steps:
    return step / settings.warmup_steps
  share = (step - settings.warmup_steps) / (steps - settings.warmup_steps)
  return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[settings.schedule]


def check_schedule(settings: ScheduleSettings, steps: int, steps_field: str, where: Any, prefix: str = "") -> None:
  """Refuses a warmup that is no part of the steps, and unknown schedules.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where, prefix)
  need(0 <= settings.warmup_steps < steps, "warmup_steps", settings.warmup_steps, f"expected 0 to below {steps_field}")
  need(settings.schedule in SCHEDULES, "schedule", settings.schedule, f"expected one of {', '.join(SCHEDULES)}")


@dataclasses.dataclass
class TrainSettings(StepSettings):
  """AdamW (0.9, 0.999, 1e-8) on one model, or on an adapter of it."""

  weight_decay: float = 0.0
  adapter: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)


def check_steps(settings: StepSettings, where: Any, prefix: str = "", *, least_batch: int = 0) -> None:
  """Refuses settings that no training can have; `prefix` stands before their names in messages.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where, prefix)
  need(settings.batch_size >= least_batch, "batch_size", settings.batch_size,
       "expected a number of rows" if least_batch else "expected 0 (all rows) or a number of rows")
  need(settings.num_microbatches >= 1, "num_microbatches", settings.num_microbatches, "expected at least 1")
  need(settings.remat in REMAT, "remat", settings.remat, f"expected one of {', '.join(REMAT)}")


def check_train(settings: TrainSettings, where: Any, prefix: str = "") -> None:
  """As `check_steps`, and of the adapter.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  check_steps(settings, where, prefix, least_batch=1)
  check_decay(settings.weight_decay, where, prefix)
  checker(where, prefix)(settings.adapter.kind in ("full", "lora"), "adapter.kind", settings.adapter.kind,
                         "expected full or lora")


def check_decay(weight_decay: float, where: Any, prefix: str = "") -> None:
  """Refuses a weight decay that is negative or not finite."""
  checker(where, prefix)(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "expected a number of at least 0")


def make_model(checked: Checked, settings: TrainSettings, dtype: Any, attention: str) -> Model:
  """The model of a checkpoint as these settings train it."""
  lora = settings.adapter.lora()
  return Model(checked.config, dtype=dtype, unroll=unroll(checked.config), remat=settings.remat,
               lora_scale=lora.scale if lora else 1.0, attention=attention)
