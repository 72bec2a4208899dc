"""Everything that can be wrong with an audit's settings, before a file is read or a device is used."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from relearn_jax.audit.api_settings import API, check_access
from relearn_jax.audit.audit_config import PRETRAINING, ArmsSettings, AttackSettings, Audit, unlearn_method
from relearn_jax.audit.search import MIN_SEEDS
from relearn_jax.audit.thresholds import VerdictSettings
from relearn_jax.cases.control_sets import KINDS
from relearn_jax.data.chat import ChatSettings, check_chat
from relearn_jax.errors import InputError, checker
from relearn_jax.metrics.scores import get_metric
from relearn_jax.models.attention import check_attention
from relearn_jax.models.precision import check_dtype
from relearn_jax.training.train_settings import check_decay, check_schedule, check_steps

Need = Callable[[bool, str, Any, str], None]


def check_audit(config: Audit, where: str) -> None:
  """Refuses settings that cannot work.

  Args:
    config: the configuration, overrides applied.
    where: the file it came from, for messages.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where)
  config.case_config.check(where)
  seeds = config.seeds
  need(bool(seeds) and len(set(seeds)) == len(seeds) and all(type(s) is int and 0 <= s < 2**31 for s in seeds), "seeds",
       seeds, "expected distinct integers from 0 to 2147483647")
  check_dtype(config.arms.dtype, where, "arms.dtype")
  check_attention(config.arms.attention, where, "arms.attention")
  if not config.arms.loaded:
    _check_trained(config, where, need)
  need(bool(config.arms.unlearned) or not config.arms.loaded, "arms.unlearned", config.arms.unlearned,
       "give the model in question, a Hugging Face folder or a hub id; or an original and a control, to unlearn here")
  need(not (config.arms.start and config.arms.memorized), "arms.start", config.arms.start,
       "leave it out, or arms.original and arms.control, of which models begin instead")
  need(not config.arms.loaded or len(config.case_config.versions()) == 1, "case", config.case_config.versions(),
       "expected a single variant where models are loaded")
  _named(where, lambda: check_attack(config.attack, where))
  api = config.attack.api
  need(not api.models or set(config.arms.loaded) <= set(api.models), "attack.api.models", api.models,
       "expected what the provider calls each of the models that are given; what is trained here it does not have")
  need(not api.models or bool(config.arms.loaded), "attack.api.provider", api.provider,
       "expected serve: no other provider has models that are trained here")
  need(not config.attack.search.trials or len(seeds) >= MIN_SEEDS, "seeds", seeds,
       f"expected at least {MIN_SEEDS}: attacks are chosen on one half of them and reported on the other")
  _check_ask(config, where, need)
  need(all(type(line) is int and line > 0 for line in config.allowed_lines), "allowed_lines", config.allowed_lines,
       "expected numbers of lines, from 1")
  check_verdict(config.verdict, where)
  need(config.checkpoint_seconds >= 0, "checkpoint_seconds", config.checkpoint_seconds, "expected seconds, at least 0")


def _named(where: str, check: Callable[[], Any]) -> None:
  """Names the file in errors of what knows no file."""
  try:
    check()
  except InputError as error:
    raise InputError(error.problem, file=where, field=error.field, mend=error.mend) from None


def _positive(need: Need, holder: Any, section: str, *fields: str) -> None:
  for field in fields:
    value = getattr(holder, field)
    need(0 < value < math.inf, f"{section}.{field}", value, "expected a positive number")


def _check_trained(config: Audit, where: str, need: Need) -> None:
  """Of models that are trained here."""
  memorize, unlearn = config.memorize, config.unlearn
  check_steps(memorize, where, "memorize.")
  check_decay(memorize.weight_decay, where, "memorize.")
  check_steps(unlearn, where, "unlearn.")
  _positive(need, memorize, "memorize", "steps", "learning_rate")
  _positive(need, unlearn, "unlearn", "max_steps", "keep_every", "depths")
  for name, held, steps in (("memorize", memorize, "steps"), ("unlearn", unlearn, "max_steps")):
    check_schedule(held, getattr(held, steps), f"{name}.{steps}", where, f"{name}.")
    need(held.runs_at_once >= 0, f"{name}.runs_at_once", held.runs_at_once, "expected 0 (all) or a number of models")
  need(0 <= unlearn.max_score < 1, "unlearn.max_score", unlearn.max_score, "expected 0 to below 1")
  names = unlearn.methods
  need(bool(names) and len(set(names)) == len(names), "unlearn.methods", names, "expected distinct names of methods")
  for name in names:
    _named(where, lambda name=name: unlearn_method(unlearn, name))  # type: ignore[misc]
    found = unlearn_method(unlearn, name)
    field = f"unlearn.settings.{found.recipe.method}"
    need(0 < found.learning_rate < math.inf, f"{field}.learning_rate", found.learning_rate,
         "expected a positive number")
    need(0 <= found.weight_decay < math.inf, f"{field}.weight_decay", found.weight_decay,
         "expected a number of at least 0")
    need(found.recipe.objective.divisible or unlearn.num_microbatches == 1, "unlearn.num_microbatches",
         unlearn.num_microbatches, f"expected 1: {name} takes a step's gradient as a whole")
  if not config.arms.start and not config.arms.memorized:
    _named(where, config.case_config.vocabulary)
    _check_pretrained(config.arms, need)


def _check_pretrained(arms: ArmsSettings, need: Need) -> None:
  base = arms.pretrain
  _positive(need, base, "arms.pretrain", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "max_positions", "steps", "batch_size", "learning_rate")
  need(base.hidden_size % (2 * base.num_heads) == 0, "arms.pretrain.hidden_size", base.hidden_size,
       "expected an even multiple of arms.pretrain.num_heads")
  need(base.num_heads % base.num_kv_heads == 0, "arms.pretrain.num_kv_heads", base.num_kv_heads,
       "expected a divisor of arms.pretrain.num_heads")
  need(0 <= base.seed < 2**32, "arms.pretrain.seed", base.seed, "expected 0 to 4294967295")
  need(0 <= base.warmup_steps < base.steps, "arms.pretrain.warmup_steps", base.warmup_steps,
       "expected less than arms.pretrain.steps")


def check_attack(attack: AttackSettings, where: str) -> None:
  """Refuses attacks that cannot be made.

  Raises:
    InputError: naming the field.
  """
  need = checker(where)
  check_steps(attack, where, "attack.")
  check_decay(attack.weight_decay, where, "attack.")
  check_rates(attack.learning_rates, need, "attack.learning_rates")
  if attack.lora.learning_rates:
    check_rates(attack.lora.learning_rates, need, "attack.lora.learning_rates")
  check_keep_steps(attack.keep_steps, need, "attack.keep_steps")
  need(len(set(attack.controls)) == len(attack.controls) and set(attack.controls) <= set(KINDS), "attack.controls",
       attack.controls, f"expected distinct ones of {', '.join(KINDS)}")
  names, search = attack.adapters, attack.search
  need(bool(names) and len(set(names)) == len(names), "attack.adapters", names, "expected distinct adapters")
  for field, adapters in (("attack.adapters", names), ("attack.search.adapters", search.adapters)):
    for name in adapters:
      attack.adapter(name, field)
  check_access(attack.access, attack.api, where)
  if attack.api.learning_rates:
    check_rates(attack.api.learning_rates, need, "attack.api.learning_rates")
  need(attack.lora.rank >= 1, "attack.lora.rank", attack.lora.rank, "expected at least 1")
  need(attack.runs_at_once >= 0, "attack.runs_at_once", attack.runs_at_once,
       "expected 0 (as many as fit) or a number of models")
  need(search.trials >= 0, "attack.search.trials", search.trials, "expected 0 (none) or a number of attacks")
  need(0 < search.lowest_rate <= search.highest_rate < math.inf, "attack.search.lowest_rate", search.lowest_rate,
       "expected a positive number up to attack.search.highest_rate")
  need(bool(search.adapters) and bool(search.batch_sizes), "attack.search.adapters", search.adapters,
       "expected at least one, and one of attack.search.batch_sizes")
  need(all(type(size) is int and size >= 0 for size in search.batch_sizes), "attack.search.batch_sizes",
       search.batch_sizes, "expected numbers of rows, or 0 (all)")
  need(search.seed >= 0, "attack.search.seed", search.seed, "expected a number of at least 0")


def _check_ask(config: Audit, where: str, need: Need) -> None:
  ask = config.ask
  _positive(need, ask, "ask", "max_new_tokens")
  for field in ("batch_size", "score_rows", "runs_at_once"):
    need(getattr(ask, field) >= 0, f"ask.{field}", getattr(ask, field), "expected 0 (all), or a number")
  buckets = ask.buckets
  need(list(buckets) == sorted(set(buckets)) and all(type(b) is int and b > 0 for b in buckets), "ask.buckets", buckets,
       "expected ascending lengths in tokens")
  stop = ask.stop
  need(not isinstance(stop, str) and all(isinstance(string, str) and string for string in stop), "ask.stop", stop,
       'expected strings that are not empty, such as ("Question:",)')
  for name in ask.metrics:
    _named(where, lambda name=name: get_metric(name, "ask.metrics"))  # type: ignore[misc]
  need(ask.generic != PRETRAINING or not (config.arms.loaded or config.arms.memorized or config.arms.start),
       "ask.generic", ask.generic, "expected a source of text: no model is pretrained here")
  check_chat(ask.chat, ask.chat_template, where, "ask.chat.")
  if API in config.attack.access:
    for field in ("name", "date", "arguments"):
      need(getattr(ask.chat, field) == getattr(ChatSettings(), field), f"ask.chat.{field}", getattr(ask.chat, field),
           "leave it out: a provider renders conversations itself")


def check_keep_steps(steps: Sequence[int], need: Need, field: str) -> None:
  """Refuses steps that do not ascend from above 0."""
  need(bool(steps) and list(steps) == sorted(set(steps)) and all(type(s) is int and s > 0 for s in steps), field, steps,
       "expected ascending steps above 0 (step 0 is always kept)")


def check_rates(rates: Sequence[float], need: Need, field: str) -> None:
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
  for field in ("delta", "min_original", "min_retain_ratio", "min_original_kept", "min_loss_fall", "max_likelier"):
    need(0 <= getattr(settings, field) <= 1, field, getattr(settings, field), "expected 0 to 1")
