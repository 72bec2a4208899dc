"""The published unlearning methods, each in a line or two, by the name a configuration uses.

To add one, add a row: a builder from hyper-parameters (which may be traced) to an `Objective`, the
formula that `--help` prints, and the hyper-parameters with their domain. Everything else - the data
sets, the reference cache, the jitted step - follows from what the objective declares.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping

from jaxtyping import Array, Float

from relearn_jax.errors import InputError
from relearn_jax.objectives.core import Objective, add, ascend, scale
from relearn_jax.objectives.losses import kl_to_reference, nll, npo

Hyper = Mapping[str, Float[Array, ""] | float]


@dataclasses.dataclass(frozen=True)
class Method:
  """A published method: how it is built, and what a person should know of it.

  Attributes:
    build: hyper-parameters -> objective.
    formula: the loss, in one line.
    positive: hyper-parameters that must be above zero; others must not be negative.
    hyper: names of the hyper-parameters it takes.
  """

  build: Callable[[Hyper], Objective]
  formula: str
  hyper: tuple[str, ...] = ()
  positive: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "ga": Method(lambda h: ascend(nll("forget")), "gradient ascent: -NLL(forget)"),
    "gd": Method(lambda h: add(ascend(nll("forget")), scale(h["retain_weight"], nll("retain"))),
                 "gradient difference: -NLL(forget) + retain_weight * NLL(retain)", ("retain_weight",)),
    "kl": Method(lambda h: add(ascend(nll("forget")), scale(h["retain_weight"], kl_to_reference("retain"))),
                 "-NLL(forget) + retain_weight * KL(reference || model on retain)", ("retain_weight",)),
    "npo": Method(lambda h: npo("forget", h["beta"]),
                  "negative preference optimisation: (2/beta) softplus(beta (log p - log p_ref)) on forget",
                  ("beta",), ("beta",)),
}


def get_method(name: str, field: str = "method") -> Method:
  """The method called `name`; `InputError` lists the nearest names otherwise."""
  if name not in METHODS:
    near = difflib.get_close_matches(name.lower(), METHODS, 2, 0.3)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise InputError(f"is {name!r}, which is no unlearning method{hint}", field=field,
                     mend=f"expected one of {', '.join(METHODS)}")
  return METHODS[name]


def check_hyper(name: str, hyper: Mapping[str, float], field: str) -> None:
  """Refuses hyper-parameters outside their domain, naming them as `field`.<name>."""
  method = get_method(name)
  for key in method.hyper:
    value = hyper[key]
    low_ok = value > 0 if key in method.positive else value >= 0
    if not low_ok or value != value or value == float("inf"):
      raise InputError(f"is {value!r}", field=f"{field}.{key}",
                       mend="expected a finite number " + ("above 0" if key in method.positive else "of at least 0"))


def method_help() -> str:
  """A line or two for each method: its formula, the data sets it reads, hyper-parameters, and what it caches."""
  lines = ["Unlearning methods (--config.method=NAME); NLL is the mean over counted tokens.", ""]
  for name, method in METHODS.items():
    objective = method.build(dict.fromkeys(method.hyper, 1.0))
    needs = [f"{need.kind} of the reference on {need.rows}" for need in sorted(objective.needs)]
    lines += [f"  {name:<6}{method.formula}",
              f"        reads: {', '.join(sorted(objective.rows))}; hyper: {', '.join(method.hyper) or 'none'}; "
              f"cached: {', '.join(needs) or 'nothing'}"]
  return "\n".join(lines)
