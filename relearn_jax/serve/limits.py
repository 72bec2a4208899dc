"""What a provider of fine-tuning permits: the settings of `relearn serve`, and of an audit through an interface."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from relearn_jax.errors import InputError, checker
from relearn_jax.models.lora import ALL, LoraConfig

KINDS = ("lora", "full")


@dataclasses.dataclass
class Limits:
  """What may be asked of a server, and how it trains.

  Attributes:
    adapter: what a job trains: "lora" (a low-rank adapter, as providers do) or "full" (all parameters).
    rank, alpha: of the adapter, on all linear layers.
    base_rate: the learning rate that a multiplier of 1 stands for.
    absolute_rates: jobs state a `learning_rate` in place of a `learning_rate_multiplier`.
    lowest_rate, highest_rate: learning rates that a job may have, whichever way it states them.
    default_epochs, default_batch: of a job that leaves them "auto".
    max_epochs, max_batch: at most.
    min_rows, max_rows: of a training file, once moderation has taken out what it refuses.
    max_upload: bytes of a file.
    blocked_words: rows in which one of them stands as whole words, in any spelling of case and marks, are refused.
    checkpoint_epochs: epochs of a job after which its model is kept, as it is after the last; (): every one.
    max_checkpoints: of a job that can be asked, its last ones; 0: all.
    logprobs: whether log-probabilities are given.
    max_waiting: requests, and jobs, that wait at a time; more are refused until there is room.
    max_prompts: of one request.
  """

  adapter: str = "lora"
  rank: int = 16
  alpha: float = 32.0
  base_rate: float = 1e-4
  absolute_rates: bool = False
  lowest_rate: float = 1e-6
  highest_rate: float = 1e-2
  default_epochs: int = 3
  default_batch: int = 16
  max_epochs: int = 50
  max_batch: int = 256
  min_rows: int = 10
  max_rows: int = 50_000
  max_upload: int = 100 * 1024**2
  blocked_words: tuple[str, ...] = ()
  checkpoint_epochs: tuple[int, ...] = ()
  max_checkpoints: int = 3
  logprobs: bool = True
  max_waiting: int = 256
  max_prompts: int = 256

  def lora(self) -> LoraConfig | None:
    """The adapter's form; None where all parameters are trained."""
    return LoraConfig(self.rank, self.alpha, (ALL,)) if self.adapter == "lora" else None


def check_limits(limits: Limits, where: Any, prefix: str = "") -> None:
  """Refuses limits outside their domain.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where, prefix)
  need(limits.adapter in KINDS, "adapter", limits.adapter, f"expected {' or '.join(KINDS)}")
  for field in ("rank", "default_epochs", "default_batch", "max_epochs", "max_batch", "min_rows", "max_rows",
                "max_upload", "max_waiting", "max_prompts"):
    need(getattr(limits, field) >= 1, field, getattr(limits, field), "expected at least 1")
  for field in ("alpha", "base_rate", "lowest_rate", "highest_rate"):
    need(0 < getattr(limits, field) < math.inf, field, getattr(limits, field), "expected a positive number")
  need(limits.lowest_rate <= limits.highest_rate, "lowest_rate", limits.lowest_rate, "expected at most highest_rate")
  need(limits.default_epochs <= limits.max_epochs, "default_epochs", limits.default_epochs,
       "expected at most max_epochs")
  need(limits.default_batch <= limits.max_batch, "default_batch", limits.default_batch, "expected at most max_batch")
  need(limits.max_checkpoints >= 0, "max_checkpoints", limits.max_checkpoints, "expected 0 (all) or a number")
  epochs = limits.checkpoint_epochs
  need(all(type(epoch) is int and epoch > 0 for epoch in epochs), "checkpoint_epochs", epochs,
       "expected numbers from 1")
  words = limits.blocked_words
  need(not isinstance(words, str) and all(isinstance(word, str) and word.strip() for word in words), "blocked_words",
       words, "expected words that are not empty")


def parse_limits(settings: Sequence[str], flag: str = "--limit") -> Limits:
  """Limits from `FIELD=VALUE`; fields that hold several values may be given several times, one each time.

  >>> parse_limits(["min_rows=1", "absolute_rates=true", "blocked_words=Anthony Mark"]).blocked_words
  ('Anthony Mark',)

  Raises:
    InputError: no such field, or a value of another kind.
  """
  fields = {field.name: type(getattr(Limits(), field.name)) for field in dataclasses.fields(Limits)}
  values: dict[str, Any] = {}
  for setting in settings:
    name, given, text = setting.partition("=")
    if name not in fields or not given:
      raise InputError(f"is {setting!r}", field=flag, mend=f"expected FIELD=VALUE with one of {', '.join(fields)}")
    kind = fields[name]
    try:
      if kind is bool:
        values[name] = {"true": True, "false": False}[text.lower()]
      else:
        one = int(text) if name == "checkpoint_epochs" else text
        values[name] = (*values.get(name, ()), one) if kind is tuple else kind(text)
    except (KeyError, ValueError):
      wanted = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "an integer")
      raise InputError(f"has {text!r} for {name}", field=flag, mend=f"expected {wanted}") from None
  limits = Limits(**values)
  check_limits(limits, None, f"{flag}=")
  return limits
