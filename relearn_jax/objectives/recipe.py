"""A method with its hyper-parameters and a defence around it; the configurations that hold them; what help says."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from relearn_jax.objectives.combinators import add
from relearn_jax.objectives.core import Objective
from relearn_jax.objectives.methods import (
  DEFENCES,
  METHODS,
  NO_DEFENCE,
  Build,
  Defence,
  Hyper,
  Method,
  get_defence,
  get_method,
)
from relearn_jax.objectives.settings import Settings, check_values, config_class, group_class

MethodSettings = group_class("MethodSettings", {name: config_class(name, m.settings) for name, m in METHODS.items()})
DefenceSettings = group_class("DefenceSettings", {name: config_class(name, d.settings) for name, d in DEFENCES.items()})


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method with its hyper-parameters, and a defence around it.

  Attributes:
    method: key of `METHODS`.
    hyper: every setting of method and defence -> its value, for a whole stage.
    defence: key of `DEFENCES`, or "none".
  """

  method: str
  hyper: Mapping[str, float]
  defence: str = NO_DEFENCE

  @property
  def name(self) -> str:
    """For example "npo" or "npo+sam"."""
    return self.method if self.defence == NO_DEFENCE else f"{self.method}+{self.defence}"

  @property
  def published(self) -> Method:
    """The method as it was published."""
    return get_method(self.method)

  @property
  def settings(self) -> Settings:
    """Of method and defence."""
    defence = get_defence(self.defence)
    return {**self.published.settings, **(defence.settings if defence else {})}

  @property
  def build(self) -> Build:
    """Hyper-parameters -> the objective, with these values in place of the recipe's, but for what is static.

    Of equal recipes one function: programs that have been compiled are found by it.
    """
    return _builder(self.method, tuple(sorted(self.hyper.items())), self.defence)

  @property
  def objective(self) -> Objective:
    """With the recipe's own values."""
    return self.build({})

  @property
  def traced(self) -> dict[str, float]:
    """The values that a compiled step takes as arguments."""
    return {name: self.hyper[name] for name, setting in self.settings.items() if not setting.static}


@functools.lru_cache(maxsize=256)
def _builder(name: str, hyper: tuple[tuple[str, float], ...], defence_name: str) -> Build:
  recipe = Recipe(name, dict(hyper), defence_name)
  method, defence, given = recipe.published, get_defence(defence_name), recipe.traced

  def build(traced: Hyper) -> Objective:
    h = {**recipe.hyper, **{name: traced[name] for name in given if name in traced}}
    objective = method.forget(h)
    if defence and defence.around == "forget":
      objective = defence.wrap(h, objective)
    if method.retain:
      objective = add(objective, method.retain(h))
    objective = method.release(h, objective)
    return defence.wrap(h, objective) if defence and defence.around == "all" else objective
  return build


def make_recipe(method: str, values: Any, defence: str = NO_DEFENCE, defence_values: Any = None, *,
                field: str = "methods", defence_field: str = "defences") -> Recipe:
  """A recipe of dataclasses with the fields of its settings, each in its domain.

  Args:
    method: key of `METHODS`.
    values: its settings, as attributes.
    defence: key of `DEFENCES`, or "none".
    defence_values: of the defence.
    field, defence_field: what messages call the groups of both.

  Raises:
    InputError: an unknown name, or a value outside its domain.
  """
  found = get_method(method)
  hyper: dict[str, float] = {}
  for settings, holder, name in ((found.settings, values, f"{field}.{method}"),
                                 (getattr(get_defence(defence), "settings", {}), defence_values,
                                  f"{defence_field}.{defence}")):
    some = {key: getattr(holder, key) for key in settings}
    check_values(settings, some, name)
    hyper |= some
  return Recipe(method, hyper, defence)


def default_recipe(method: str, defence: str = NO_DEFENCE, **hyper: float) -> Recipe:
  """A recipe with the published defaults, but for what is given."""
  made = Recipe(method, {}, defence)
  return Recipe(method, {name: s.default for name, s in made.settings.items()} | hyper, defence)


def method_help() -> str:
  """For each method and defence: formula, data sets, what is cached, hyper-parameters with defaults, source."""
  def lines(name: str, entry: Method | Defence, facts: list[str]) -> list[str]:
    hyper = [f"      {key} = {s.default:g}: {s.what} ({s.domain.removeprefix('expected ')})"
             for key, s in entry.settings.items()]
    return [f"  {name}", f"      {entry.formula}", *(f"      {fact}" for fact in facts), *hyper,
            f"      source: {entry.source}", ""]
  text = [
      "Unlearning methods (--config.method=NAME, --config.methods.NAME.SETTING=VALUE).",
      "NLL is the mean over counted tokens, s the summed log-probability of a row and n its counted tokens, z logits;",
      "x_ref is the same under the model before unlearning, which is asked once and never kept.", ""]
  for name, method in METHODS.items():
    objective = default_recipe(name).objective
    needs = [f"{need.kind} on {need.rows}" for need in sorted(objective.needs)]
    reads, cached = ", ".join(sorted(objective.rows)), ", ".join(needs) or "nothing"
    text += lines(name, method, [f"reads: {reads}; cached: {cached}"])
  text += ["Defences, around any method (--config.defence=NAME, --config.defences.NAME.SETTING=VALUE).",
           "w are the weights that are trained, g the gradient of what the defence stands around.", ""]
  for name, defence in DEFENCES.items():
    text += lines(name, defence, [])
  return "\n".join(text).rstrip()
