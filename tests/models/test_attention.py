"""The forms of attention agree, in values and gradients, and each is taken where it is meant to be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.models import attention
from relearn_jax.models.attention import attend_by_jax, attend_by_splash, choose_form, packed_mask, self_attention

LENGTH = 37  # no multiple of anything


def make_inputs(dtype: Any, length: int = LENGTH, rows: int = 2, heads: int = 4) -> tuple[jax.Array, ...]:
  """Queries, keys, values and a gradient of the result; two query heads share a key-value head."""
  return tuple(jax.random.normal(jax.random.key(seed), (rows, length, number, 16)).astype(dtype)
               for seed, number in enumerate((heads, heads // 2, heads // 2, heads)))


def both_ways(form: Callable[..., jax.Array], given: tuple[jax.Array, ...]) -> list[np.ndarray]:
  """The result, and the gradients with respect to queries, keys and values."""
  @jax.jit
  def run(q: jax.Array, k: jax.Array, v: jax.Array, ahead: jax.Array) -> tuple[jax.Array, ...]:
    out, back = jax.vjp(form, q, k, v)
    return out, *back(ahead)
  return [np.asarray(array, np.float32) for array in run(*given)]


@pytest.mark.parametrize("window", [None, 5, LENGTH])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 6e-2)])
def test_jax_s_form_is_the_einsum(dtype: Any, error: float, window: int | None) -> None:
  given = make_inputs(dtype)
  ours = both_ways(lambda q, k, v: self_attention(q, k, v, window), given)
  theirs = both_ways(lambda q, k, v: attend_by_jax(q, k, v, window, "xla"), given)
  for mine, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine, other, atol=error)


@pytest.mark.parametrize("case", ["causal", "window, packed"])
def test_splash_is_the_einsum(case: str) -> None:
  """Interpreted, over more than one block and over rows that are no whole blocks."""
  length = attention.SPLASH_BLOCK + 9
  packed = jnp.repeat(jnp.arange(1, 3), jnp.array([60, length - 60]))[None]
  window, segments = (None, None) if case == "causal" else (20, packed)
  given = make_inputs(jnp.float32, length, rows=1, heads=2)
  ours = both_ways(lambda q, k, v: self_attention(q, k, v, window, segments), given)
  theirs = both_ways(lambda q, k, v: attend_by_splash(q, k, v, window, segments, interpret=True), given)
  for mine, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine, other, atol=1e-5)


def test_the_softmax_s_own_rule_is_its_derivative() -> None:
  """The second one too, which a penalty on gradients takes."""
  given, mask = jax.random.normal(jax.random.key(0), (2, 3, 5)), jnp.tri(3, 5, dtype=bool)
  plain = lambda x: jax.nn.softmax(jnp.where(mask, x, -jnp.inf))
  own = lambda x: attention.softmax(x, mask)
  weight = jax.random.normal(jax.random.key(1), given.shape)
  for order in (lambda f: f, jax.jacrev, lambda f: jax.grad(lambda x: jnp.sum(jax.grad(
      lambda y: jnp.sum(weight * f(y)))(x) ** 2))):
    np.testing.assert_allclose(order(own)(given), order(plain)(given), atol=1e-6)


def test_one_array_of_weights_is_kept() -> None:
  """Of the arrays `[B, K, 2 T, T]` one in fp32, and its copy in the precision of the product."""
  residuals = getattr(jax.ad_checkpoint, "saved_residuals", None) or pytest.importorskip(
      "jax._src.ad_checkpoint").saved_residuals
  for dtype, kept in ((jnp.float32, ["float32"]), (jnp.bfloat16, ["bfloat16", "float32"])):
    q, k, v, _ = make_inputs(dtype)
    found = residuals(lambda q, k, v: jnp.sum(self_attention(q, k, v).astype(jnp.float32)), q, k, v)
    assert sorted(str(one.dtype) for one, _ in found if one.shape[-2:] == (2 * LENGTH, LENGTH)) == kept


def test_rows_that_share_a_sequence_see_themselves() -> None:
  """By hand: a row of three tokens, one of two, and padding; then each token and the one before it."""
  segments = jnp.array([[1, 1, 1, 2, 2, 0]])
  seen = np.array([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                   [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
  np.testing.assert_array_equal(packed_mask(segments, None)[0], seen)
  seen[2, 0] = False
  np.testing.assert_array_equal(packed_mask(segments, 2)[0], seen)


@pytest.mark.parametrize(("changes", "form"), [
    ({}, "cudnn"), ({"kind": "einsum"}, "einsum"), ({"backend": "cpu"}, "einsum"), ({"dtype": jnp.float32}, "einsum"),
    ({"length": attention.FUSED_FROM - 1}, "einsum"), ({"head_dim": 100}, "einsum"), ({"head_dim": 256}, "einsum"),
    ({"packed": True}, "einsum"), ({"shards": 2}, "einsum"), ({"backend": "tpu"}, "splash"),
    ({"backend": "tpu", "packed": True}, "splash"), ({"backend": "tpu", "head_dim": 64}, "einsum")])
def test_where_each_form_is_taken(changes: dict[str, Any], form: str) -> None:
  given = {"kind": "auto", "backend": "gpu", "dtype": jnp.bfloat16, "length": attention.FUSED_FROM, "head_dim": 128,
           "packed": False, "shards": 1} | changes
  backend = given.pop("backend")
  assert choose_form(backend=lambda: backend, **given) == form


def test_the_form_that_is_chosen_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
  q, k, v, _ = make_inputs(jnp.float32)
  taken = []
  monkeypatch.setattr(attention, "attend_by_jax", lambda *given: taken.append(given[3:]) or given[0])
  monkeypatch.setattr(attention, "choose_form", lambda kind, *_, **__: {"auto": "cudnn"}.get(kind, kind))
  assert self_attention(q, k, v, 5) is q and taken == [(5, "cudnn")]
  assert self_attention(q, k, v, 5, kind="einsum").shape == q.shape and len(taken) == 1
