"""What an audit is told: one typed value, from a file in configs/ and `--config.some.field=value`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from relearn_jax.audit.thresholds import VerdictSettings
from relearn_jax.cases.names import COUPLED, NamesConfig, check_names_config, repetitions
from relearn_jax.errors import InputError, checker
from relearn_jax.objectives.methods import METHODS, get_defence, get_method
from relearn_jax.objectives.recipe import DefenceSettings, Recipe, make_recipe
from relearn_jax.objectives.settings import config_class, group_class


@dataclasses.dataclass
class BaseConfig:
  """The small Llama that the names case starts from, trained once and cached by content.

  Attributes:
    couples: couples of names that usually stand together in the pretraining text.
    attachment: probability that the second of a couple follows the first.
    max_names: names in a pretraining sequence, at most.
    steps, batch_size, learning_rate, warmup_steps: AdamW with warmup and cosine decay to zero.
  """

  hidden_size: int = 128
  intermediate_size: int = 256
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  max_positions: int = 128
  couples: int = 60
  attachment: float = 0.7
  max_names: int = 26
  steps: int = 600
  batch_size: int = 32
  learning_rate: float = 1e-3
  warmup_steps: int = 30
  seed: int = 0


@dataclasses.dataclass
class MemorizeConfig:
  """How the sequences are learned: AdamW, every step on all of them."""

  steps: int = 200
  learning_rate: float = 5e-4
  weight_decay: float = 0.0


# Of each method on the names case, with or without a defence; what is not here is the published default. Chosen by
# configs/sweep.py on seeds 100 and 101, by unlearned models alone; all that was tried is in benchmarks/methods.md.
# But gradient ascent keeps the rate of the default audit (benchmarks/names.md), where the sweep takes 1e-4.
CHOSEN: dict[str, dict[str, float]] = {
    "ga": {"learning_rate": 5e-05},
    "gd": {"learning_rate": 5e-05, "retain_weight": 5.0},
    "kl": {"learning_rate": 0.0001, "retain_weight": 5.0},
    "npo": {"learning_rate": 0.0001, "beta": 0.02},
    "npo_gd": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0},
    "npo_kl": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 10.0},
    "simnpo": {"learning_rate": 0.0005, "beta": 0.5},
    "scrub": {"learning_rate": 5e-05, "period": 5, "max_phases": 10, "retain_weight": 1.0},
    "whp_relabel": {"learning_rate": 0.0001},
    "whp_logits": {"learning_rate": 0.0001, "alpha": 20.0, "reinforce_learning_rate": 0.0005},
    "rmu": {"learning_rate": 0.0002, "depth": 0.5, "retain_weight": 100.0},
    "idk_nll": {"learning_rate": 0.0001},
    "idk_dpo": {"learning_rate": 0.0005, "beta": 0.05, "retain_weight": 10.0},
    "altpo": {"learning_rate": 0.0001, "beta": 0.1},
    "undial": {"learning_rate": 0.0005, "beta": 10.0, "retain_weight": 1.0},
    "wga": {"learning_rate": 0.0001, "beta": 1.0},
    "satimp": {"learning_rate": 0.0002, "beta1": 5.0, "forget_weight": 1.0},
    "ceu": {"learning_rate": 0.0005, "skip_first": 0.0},
    "pdu": {"learning_rate": 0.0005, "dual": 10.0, "dual_warmup": 20},
    "task_vector": {"learning_rate": 0.0001, "alpha": 5.0},
    "npo_gd+sam": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "rho": 0.01},
    "npo_gd+smoothing": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "radius": 0.0001},
    "npo_gd+gradient_penalty": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "penalty": 0.001},
    "npo_gd+averaging": {"learning_rate": 5e-05, "beta": 0.02, "retain_weight": 10.0, "average_from": 5},
}

# Learning rate, weight decay and hyper-parameters of every method; an audit reads those of its own.
Methods = group_class("Methods", {
    name: config_class(name, method.settings, ("learning_rate", float, 5e-5), ("weight_decay", float, 0.0))
    for name, method in METHODS.items()}, CHOSEN)


@dataclasses.dataclass
class UnlearnConfig:
  """The unlearning trajectory.

  Attributes:
    max_steps: no run goes further, unlearned or not.
    keep_every: steps between checkpoints that are kept and asked, of which step 0 is the first.
    max_asr: a run counts as unlearned from its first kept step (after 0) with attack success of at
      most this; that is its depth 0.
    depths: number of points that are attacked, each one kept step deeper than the one before.
  """

  max_steps: int = 200
  keep_every: int = 5
  max_asr: float = 0.01
  depths: int = 3


@dataclasses.dataclass
class RelearnConfig:
  """The attack, the same for every arm: full-batch AdamW on the relearn set.

  Attributes:
    learning_rates: each is an attack of its own, on the same models. One alone finds what it finds; ERASED wants
      rates a factor of ten apart, up to one that begins to destroy the original.
    keep_steps: steps after which the models are asked.
  """

  learning_rates: tuple[float, ...] = (1e-4,)
  weight_decay: float = 0.0
  keep_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80)


@dataclasses.dataclass
class EvaluateConfig:
  """How the questions are asked: greedy decoding.

  Attributes:
    max_new_tokens: tokens generated after each prompt, whatever its length.
    buckets: prompt lengths (in tokens) that are padded to; one executable each.
    runs_per_call: models that answer side by side; more need more memory.
  """

  max_new_tokens: int = 8
  buckets: tuple[int, ...] = (10, 18)
  runs_per_call: int = 14


@dataclasses.dataclass
class AuditConfig:
  """One audit.

  Attributes:
    method: unlearning method; one of the fields of `methods`.
    defence: what is put around it, one of the fields of `defences`; "none".
    checkpoint_seconds: a stage that is killed loses at most about so much work.
  """

  method: str = "ga"
  defence: str = "none"
  case: NamesConfig = dataclasses.field(default_factory=NamesConfig)
  base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
  memorize: MemorizeConfig = dataclasses.field(default_factory=MemorizeConfig)
  methods: Any = dataclasses.field(default_factory=Methods)
  defences: Any = dataclasses.field(default_factory=DefenceSettings)
  unlearn: UnlearnConfig = dataclasses.field(default_factory=UnlearnConfig)
  relearn: RelearnConfig = dataclasses.field(default_factory=RelearnConfig)
  evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
  verdict: VerdictSettings = dataclasses.field(default_factory=VerdictSettings)
  checkpoint_seconds: float = 30.0

  @property
  def method_config(self) -> Any:
    """The settings of the method in use."""
    return getattr(self.methods, self.method)

  @property
  def recipe(self) -> Recipe:
    """The method in use, with its settings and defence."""
    return make_recipe(self.method, self.method_config, self.defence, getattr(self.defences, self.defence, None))


def check_config(config: AuditConfig, where: str) -> None:
  """Refuses settings that cannot work, before any device work.

  Args:
    config: the configuration, overrides applied.
    where: the file it came from, for messages.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where)

  try:
    get_method(config.method)
    get_defence(config.defence)
    _ = config.recipe
  except InputError as error:
    raise InputError(error.problem, file=where, field=error.field, mend=error.mend) from None
  check_names_config(config.case, where)

  positive = {
      "base": ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "max_positions",
               "max_names", "steps", "batch_size", "learning_rate"),
      "memorize": ("steps", "learning_rate"), f"methods.{config.method}": ("learning_rate",),
      "unlearn": ("max_steps", "keep_every", "depths"),
      "evaluate": ("max_new_tokens", "runs_per_call")}
  for section, fields in positive.items():
    holder = config.method_config if section.startswith("methods.") else getattr(config, section)
    for field in fields:
      value = getattr(holder, field)
      need(0 < value < float("inf"), f"{section}.{field}", value, "expected a positive number")
  for section, holder in (("memorize", config.memorize), ("relearn", config.relearn),
                          (f"methods.{config.method}", config.method_config)):
    need(0 <= holder.weight_decay < float("inf"), f"{section}.weight_decay", holder.weight_decay,
         "expected a number of at least 0")

  base, steps = config.base, config.relearn.keep_steps
  need(base.hidden_size % (2 * base.num_heads) == 0, "base.hidden_size", base.hidden_size,
       "expected an even multiple of base.num_heads")
  need(base.num_heads % base.num_kv_heads == 0, "base.num_kv_heads", base.num_kv_heads,
       "expected a divisor of base.num_heads")
  need(0 <= base.couples <= len(COUPLED) // 2, "base.couples", base.couples, f"expected 0 to {len(COUPLED) // 2}")
  need(0 <= base.seed < 2**32, "base.seed", base.seed, "expected 0 to 4294967295")
  need(0 <= base.attachment <= 1, "base.attachment", base.attachment, "expected a probability")
  need(0 <= base.warmup_steps < base.steps, "base.warmup_steps", base.warmup_steps, "expected less than base.steps")
  check_rates(config.relearn.learning_rates, need, "relearn.learning_rates")
  need(bool(steps) and list(steps) == sorted(set(steps)) and all(isinstance(s, int) and s > 0 for s in steps),
       "relearn.keep_steps", steps, "expected ascending steps above 0 (step 0 is always kept)")
  need(0 <= config.unlearn.max_asr < 1, "unlearn.max_asr", config.unlearn.max_asr, "expected 0 to below 1")
  buckets = config.evaluate.buckets
  need(bool(buckets) and list(buckets) == sorted(set(buckets)) and all(isinstance(b, int) and b > 0 for b in buckets),
       "evaluate.buckets", buckets,
       "expected ascending lengths in tokens")
  case = config.case
  longest = max(config.base.max_names + 2, case.sequence_length + 2 * max(repetitions(max(case.variants))) + 2,
                case.max_prompt_names + 2 + config.evaluate.max_new_tokens)
  need(base.max_positions >= longest, "base.max_positions", base.max_positions,
       f"expected at least {longest}, the tokens of the longest sequence, or of the longest prompt with its new tokens")
  check_verdict(config.verdict, where)
  need(config.checkpoint_seconds >= 0, "checkpoint_seconds", config.checkpoint_seconds, "expected seconds, at least 0")


def check_rates(rates: Sequence[float], need: Callable[[bool, str, Any, str], None], field: str) -> None:
  """Refuses learning rates of an attack that are not ascending positive numbers."""
  need(bool(rates) and list(rates) == sorted(set(rates)) and all(0 < rate < math.inf for rate in rates), field, rates,
       "expected ascending positive numbers")


def check_verdict(settings: VerdictSettings, where: str) -> None:
  """Refuses thresholds outside their domain.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where, "verdict.")
  need(0 < settings.alpha < 1, "alpha", settings.alpha, "expected a probability between 0 and 1")
  need(settings.draws >= 1, "draws", settings.draws, "expected at least 1")
  need(settings.seed >= 0, "seed", settings.seed, "expected a number of at least 0")
  need(settings.min_rate_ratio >= 1, "min_rate_ratio", settings.min_rate_ratio, "expected at least 1")
  for field, least in (("min_questions", 1), ("min_clusters", 2), ("min_seeds", 2)):
    need(getattr(settings, field) >= least, field, getattr(settings, field), f"expected at least {least}")
  for field in ("delta", "min_original", "min_retain_ratio", "min_original_kept", "min_loss_fall"):
    need(0 <= getattr(settings, field) <= 1, field, getattr(settings, field), "expected 0 to 1")
