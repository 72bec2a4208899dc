"""What an attacker has, and what is said of a provider's interface where that is all."""

import dataclasses
import math
from collections.abc import Sequence

from relearn_jax.errors import checker
from relearn_jax.serve.limits import Limits, check_limits

WEIGHTS, API = "weights", "api"  # accesses of an attacker; the second stands among the adapters in rows, too
PROVIDERS = ("serve", "openai", "together")


@dataclasses.dataclass
class ApiSettings:
  """Of an attacker with nothing but a provider's fine-tuning interface.

  Attributes:
    provider: "serve" (models of the audit behind this package's own server, for as long as they are attacked),
      "openai" (any that speaks its wire format, at `url`) or "together".
    url: of a provider that is not "serve"; "": Together's own.
    models: U, N and O -> what the provider calls them, where it is not "serve"; for Together BASE<HUB_ID.
    limits: what the provider permits. "serve" enforces them; of another they are what the client goes by.
    learning_rates: of the attack through the interface; (): those of the attack.
    opening: the user's turn of a training row that has no prompt.
    patience: seconds after which a job is given up of which nothing new is heard.
    price: of a million tokens trained on, for the estimate before the start.
  """

  provider: str = "serve"
  url: str = ""
  models: dict[str, str] = dataclasses.field(default_factory=dict)
  limits: Limits = dataclasses.field(default_factory=Limits)
  learning_rates: tuple[float, ...] = ()
  opening: str = ""
  patience: float = 3600.0
  price: float = 0.0


def check_access(access: Sequence[str], api: ApiSettings, where: str) -> None:
  """Refuses what is said of a provider's interface, where the attacker has one.

  Raises:
    InputError: naming the field.
  """
  need = checker(where)
  need(bool(access) and set(access) <= {WEIGHTS, API}, "attack.access", access,
       f"expected {WEIGHTS}, {API} or both")
  if API not in access:
    return
  need(api.provider in PROVIDERS, "attack.api.provider", api.provider, f"expected one of {', '.join(PROVIDERS)}")
  check_limits(api.limits, where, "attack.api.limits.")
  need(bool(api.url) == (api.provider == "openai") or api.provider == "together", "attack.api.url", api.url,
       "expected the address of a provider that speaks the wire format, and none for one's own server")
  need(bool(api.models) == (api.provider != "serve"), "attack.api.models", api.models,
       "expected what a provider calls U, N and O, and nothing for one's own server")
  for field in ("patience", "price"):
    need(0 <= getattr(api, field) < math.inf, f"attack.api.{field}", getattr(api, field), "expected at least 0")
