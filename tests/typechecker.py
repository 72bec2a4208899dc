"""Array shapes and types of the numerical rooms, checked at run time in tests; an int serves where a float does."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ["relearn_jax.objectives", "relearn_jax.metrics", "relearn_jax.models", "relearn_jax.generation"]
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
  """Checks whatever is imported from the rooms after this."""
  install_import_hook(ROOMS, f"{__name__}.checked")
