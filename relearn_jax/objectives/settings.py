"""Hyper-parameters: their defaults, their domains, and configurations made of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from relearn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Setting:
  """A hyper-parameter.

  Attributes:
    default: where nothing else is said.
    what: what it does, in a few words.
    low: the smallest value that is allowed.
    high: the largest.
    above: whether `low` itself is refused.
    whole: an integer.
    static: fixed when a step is compiled; all others are traced, so that one executable serves all values.
  """

  default: float
  what: str
  low: float = 0.0
  high: float = math.inf
  above: bool = False
  whole: bool = False
  static: bool = False

  @property
  def domain(self) -> str:
    """For messages."""
    kind = "an integer" if self.whole else "a finite number"
    low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
    return f"expected {kind} {low}" + ("" if math.isinf(self.high) else f" and at most {self.high:g}")

  def allows(self, value: float) -> bool:
    """Whether a value is in the domain."""
    low = value > self.low if self.above else value >= self.low
    return low and value <= self.high and math.isfinite(value) and (not self.whole or value == int(value))


Settings = Mapping[str, Setting]


def positive(default: float, what: str, **more: Any) -> Setting:
  """A hyper-parameter that must be above zero."""
  return Setting(default, what, above=True, **more)


def check_values(settings: Settings, values: Mapping[str, float], field: str) -> None:
  """Refuses values outside their domain, naming them as `field`.<name>.

  Raises:
    InputError: for the first of them.
  """
  for name, setting in settings.items():
    if not setting.allows(values[name]):
      raise InputError(f"is {values[name]!r}", field=f"{field}.{name}", mend=setting.domain)


def config_class(name: str, settings: Settings, *first: tuple[str, type, Any]) -> type:
  """A dataclass with a field for each setting, after the fields `(name, type, default)` that are given."""
  rest = [(key, int if s.whole else float, int(s.default) if s.whole else float(s.default))
          for key, s in settings.items()]
  return dataclasses.make_dataclass(
      name, [(key, kind, dataclasses.field(default=value)) for key, kind, value in (*first, *rest)])


def group_class(name: str, members: Mapping[str, type], defaults: Mapping[str, Mapping[str, Any]] | None = None
                ) -> type:
  """A dataclass whose fields are configurations of their own, with other defaults where given."""
  def make(key: str, kind: type) -> Callable[[], Any]:
    return lambda: kind(**(defaults or {}).get(key, {}))
  return dataclasses.make_dataclass(name, [
      (key, kind, dataclasses.field(default_factory=make(key, kind))) for key, kind in members.items()])
