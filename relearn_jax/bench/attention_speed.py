"""Attention as the package takes it, beside every form that it could take: forward, and forward and backward."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax.bench.rates import Rates
from relearn_jax.bench.timing import in_turns, ratio, spread
from relearn_jax.models.attention import attend_by_jax, attend_by_splash, form_of, self_attention
from relearn_jax.models.config import ModelConfig

LENGTHS = (128, 512, 2048)
OWN = "relearn_jax"  # what training takes
TOKENS = 8192  # of all rows together, on accelerators

Form = Callable[..., jax.Array]


def forms() -> dict[str, Form]:
  """Name -> causal attention over (q, k, v) `[B, T, heads, H]`."""
  theirs = lambda name: functools.partial(attend_by_jax, window=None, implementation=name)
  found: dict[str, Form] = {
      OWN: self_attention, "einsum": functools.partial(self_attention, kind="einsum"), "jax.nn, xla": theirs("xla")}
  if jax.default_backend() == "gpu":
    found["jax.nn, cudnn"] = theirs("cudnn")
  if jax.default_backend() == "tpu":
    found["splash"] = functools.partial(attend_by_splash, window=None)
  return found


def measure_attention(config: ModelConfig, dtype: Any, rates: Rates, repeats: int) -> Iterator[dict[str, Any]]:
  """A row for each length that the model has positions for, and form, timed in turns; a form that fails says why."""
  tokens = TOKENS if jax.default_backend() != "cpu" else TOKENS // 16
  for length in [length for length in LENGTHS if length <= config.max_positions]:
    batch = max(1, tokens // length)
    given = tuple(
        jax.random.normal(jax.random.key(seed), (batch, length, heads, config.head_dim)).astype(dtype)
        for seed, heads in enumerate((config.num_heads, config.num_kv_heads, config.num_kv_heads)))
    for name, measured in _measure(given, config, rates, repeats).items():
      yield {"name": name, "length": length, "rows": batch, "heads": config.num_heads,
             "kv_heads": config.num_kv_heads, "head_size": config.head_dim,
             **({"form": form_of(given[0])} if name == OWN else {}), **measured}


def _measure(given: tuple[jax.Array, ...], config: ModelConfig, rates: Rates, repeats: int
             ) -> dict[str, dict[str, Any]]:
  batch, length = given[0].shape[:2]
  flops = 4 * config.num_heads * config.head_dim * batch * length * length / 2  # half of the square is seen
  found: dict[str, dict[str, Any]] = {}
  forward, both = {}, {}
  for name, form in forms().items():
    backward = jax.grad(lambda q, k, v, form=form: jnp.sum(form(q, k, v).astype(jnp.float32)), argnums=(0, 1, 2))
    first, second = (functools.partial(jax.jit(function), *given) for function in (form, backward))
    try:
      jax.block_until_ready((first(), second()))
    except (NotImplementedError, ValueError, RuntimeError) as error:  # a form refuses what it was not made for
      found[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    else:
      forward[name], both[name], found[name] = first, second, {}
  ahead_s, back_s = (in_turns(calls, repeats) for calls in (forward, both))
  share = rates.matmul.median * rates.share(1)
  for name in forward:
    ahead, back = spread(ahead_s[name]), spread(back_s[name])
    found[name] = {
        "forward_seconds": ahead, "with_backward_seconds": back, "forward_share": flops / ahead.median / share,
        "with_backward_share": 3 * flops / back.median / share,
        **({"with_backward_of_ours": ratio(back_s[name], back_s[OWN])} if OWN in forward else {})}
  return found
