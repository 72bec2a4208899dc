"""What the result of a run depends on, in one string: the same run is found again by it in a larger grid."""

import dataclasses
from typing import Any

from relearn_jax.audit.api_settings import API
from relearn_jax.audit.audit_config import FULL, Audit, UnlearnMethod
from relearn_jax.audit.grid import Cell, Chain, content_key
from relearn_jax.cases.base import Case
from relearn_jax.cases.control_sets import PREFIX


def memorized_key(config: Audit, chain: Chain, case: Case, start: Any) -> str:
  """Of the model of a chain that has memorised its case.

  Args:
    config: of the audit.
    chain: of the grid.
    case: of the chain.
    start: digests of the model that was given, or with which it begins; or how that is pretrained.
  """
  # Control sets are attacked with, and learned by none.
  own = tuple(one for one in case.relearn_sets if not one.name.startswith(PREFIX))
  about = dataclasses.asdict(dataclasses.replace(case, files={}, relearn_sets=own))
  del about["choices"]
  if config.arms.memorized:
    return content_key("given", chain, about, start, config.arms.arithmetic)
  memorize = dataclasses.asdict(dataclasses.replace(config.memorize, runs_at_once=0))
  return content_key("memorize", chain, about, start, config.arms.arithmetic, memorize)


def unlearned_key(config: Audit, memorized: str, method: UnlearnMethod, kind: str) -> str:
  """Of the unlearning by a method of a model with some key, or (kind "reinforce") of its reinforcement before that."""
  unlearn = dataclasses.asdict(config.unlearn)
  stop = {key: unlearn[key] for key in ("max_steps", "keep_every", "max_score", "depths", "batch_size",
                                        "warmup_steps", "schedule")}
  return content_key(kind, memorized, method.name, dict(method.recipe.hyper), method.learning_rate,
                     method.weight_decay, stop)


def attacked_key(config: Audit, cell: Cell, case: Case, model: Any) -> str:
  """Of an attacked point, whose unlearn step is known; `model` is what stands for its weights."""
  attack = {key: getattr(config.attack, key) for key in ("batch_size", "weight_decay", "keep_steps")}
  scale = dataclasses.replace(config.attack.lora, learning_rates=())  # the rate is the cell's
  lora: Any = dataclasses.asdict(scale) if cell.attack.adapter != FULL else None
  if cell.attack.adapter == API:
    lora = {"limits": dataclasses.asdict(config.attack.api.limits), "opening": config.attack.api.opening,
            "provider": config.attack.api.provider}
  asked: list[Any] = [*case.relearn_set(cell.attack.relearn_set).rows, *case.questions]  # JSON by `content_key`
  ask = dataclasses.asdict(dataclasses.replace(config.ask, runs_at_once=0, metrics=()))
  return content_key("attack", model, cell.point, cell.attack, lora, attack, asked, ask, config.arms.arithmetic)
