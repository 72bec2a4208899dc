"""The precision of products, by name."""

from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax.errors import InputError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check_dtype(name: str, where: Any, field: str = "dtype") -> None:
  """`InputError` for a name that `compute_dtype` does not know; starts no device."""
  if name not in ("auto", *DTYPES):
    raise InputError(f"is {name!r}", file=where, field=field, mend=f"expected auto, {' or '.join(DTYPES)}")


def compute_dtype(name: str, where: Any, field: str = "dtype") -> Any:
  """The precision of products: "float32", "bfloat16", or "auto": bfloat16 on accelerators, else float32.

  Raises:
    InputError: another name.
  """
  check_dtype(name, where, field)
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return DTYPES[name]
