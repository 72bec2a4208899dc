"""Objectives against values worked out elsewhere and by hand, and their gradients against differences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.errors import InputError
from relearn_jax.models.model import Head
from relearn_jax.objectives.core import Objective, Outputs, TokenRows, add, ascend, reduce_tokens, scale
from relearn_jax.objectives.losses import kl_to_reference, nll, npo
from relearn_jax.objectives.methods import METHODS, check_hyper, get_method

from . import golden

HYPER = {"retain_weight": 1.0, "beta": 0.1}


def value(objective: Objective, forward: Any = golden.forward, batch: Any = None) -> tuple[float, dict[str, float]]:
  """Loss and terms."""
  loss, terms, _ = objective.value(forward, golden.batch() if batch is None else batch, objective.init())
  return float(loss), {name: float(term) for name, term in terms.items()}


@pytest.mark.parametrize("objective,expected", [
    (nll("forget"), 2.139302), (nll("retain"), 2.949408), (METHODS["ga"].build(HYPER), -2.139302),
    (METHODS["gd"].build(HYPER), 0.810107), (kl_to_reference("retain"), 0.063197),
    (METHODS["kl"].build(HYPER), 0.063197 - 2.139302), (METHODS["npo"].build(HYPER), 13.892134)])
def test_published_formulas(objective: Objective, expected: float) -> None:
  assert value(objective)[0] == pytest.approx(expected, abs=2e-6 * max(1, abs(expected)))


def one_row(logprobs: list[float], mask: list[float], reference: list[float]) -> tuple[Any, dict[str, TokenRows]]:
  """A model that gives these log-probabilities, and its batch."""
  row = lambda values: jnp.array([values], jnp.float32)
  outputs = Outputs(row(logprobs), jnp.zeros((1, len(mask), 1)), Head(jnp.zeros((1, 1))))
  tokens = jnp.zeros((1, len(mask)), jnp.int32)
  return lambda name: outputs, {"x": TokenRows(tokens, row(mask), {"logprobs": row(reference)})}


def test_values_by_hand() -> None:
  forward, batch = one_row([0.0, -1.0, -2.0, -8.0], [0.0, 1.0, 1.0, 0.0], [0.0, -0.5, -0.5, -9.0])
  assert value(nll("x"), forward, batch)[0] == pytest.approx(1.5)
  assert value(nll("x", "sequence_sum"), forward, batch)[0] == pytest.approx(3.0)
  # s = -3, s_ref = -1: (2 / 0.5) * softplus(0.5 * -2) = 4 * ln(1 + 1/e)
  assert value(npo("x", 0.5), forward, batch)[0] == pytest.approx(4 * math.log(1 + math.exp(-1)))
  assert value(npo("x", 0.5), *one_row([0.0, -1.0], [0.0, 1.0], [0.0, -1.0]))[0] == pytest.approx(4 * math.log(2))


def test_npo_tends_to_gradient_ascent_and_stays_above_zero() -> None:
  def gradient(objective: Objective, logprob: float) -> float:
    def loss(x: jax.Array) -> jax.Array:
      outputs = Outputs(jnp.array([[0.0, 1.0]]) * x, jnp.zeros((1, 2, 1)), jnp.zeros((1, 1)))
      _, batch = one_row([0.0, 0.0], [0.0, 1.0], [0.0, -1.0])
      return objective.value(lambda name: outputs, batch, ())[0]
    return float(jax.grad(loss)(jnp.float32(logprob)))
  assert gradient(npo("x", 1e-4), -5.0) == pytest.approx(gradient(ascend(nll("x")), -5.0), rel=1e-3)
  assert 0 < gradient(npo("x", 1.0), -30.0) < 1e-9  # far below the reference it lets go
  assert value(npo("x", 1.0), *one_row([0.0, -80.0], [0.0, 1.0], [0.0, -1.0]))[0] >= 0


def test_padding_changes_nothing() -> None:
  """Longer rows and rows without counted tokens leave every method's loss as it is."""
  def widen(rows: TokenRows) -> TokenRows:
    pad = lambda x: jnp.pad(x, ((0, 1), (0, 3), *[(0, 0)] * (x.ndim - 2)), constant_values=x.dtype.type(3))
    reference = {key: x if key == "head" else pad(x) for key, x in rows.reference.items()}
    return TokenRows(pad(rows.tokens), jnp.pad(rows.mask, ((0, 1), (0, 3))), reference)

  def wide(name: str) -> Outputs:
    outputs = golden.forward(name)
    rows = TokenRows(jnp.asarray(golden.IDS[name]), outputs.logprobs, {"hidden": outputs.hidden})
    pad = widen(rows)
    logprobs = jnp.pad(outputs.logprobs, ((0, 1), (0, 3)), constant_values=-7.0)
    return Outputs(logprobs, pad.reference["hidden"], outputs.head)

  batch = {name: widen(rows) for name, rows in golden.batch().items()}
  for method in METHODS.values():
    objective = method.build(HYPER)
    assert value(objective, wide, batch)[0] == pytest.approx(value(objective)[0], rel=1e-6)


def test_a_batch_without_counted_tokens_is_no_division_by_zero() -> None:
  forward, batch = one_row([0.0, -1.0], [0.0, 0.0], [0.0, -1.0])
  for objective in (nll("x"), nll("x", "sequence_sum"), npo("x", 0.1)):
    assert value(objective, forward, batch)[0] == 0


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
  objective, batch = METHODS[name].build(HYPER), golden.batch()
  base = {key: jnp.asarray(logits, jnp.float32) for key, logits in golden.LOGITS.items()}

  def loss(logits: dict[str, jax.Array]) -> jax.Array:
    outputs = {key: golden.outputs(logits[key], golden.IDS[key]) for key in logits}  # type: ignore[arg-type]
    return objective.value(outputs.__getitem__, batch, objective.init())[0]

  grads = jax.grad(loss)(base)
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = {key: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for key, x in base.items()}
    move = lambda step, d=direction: loss(jax.tree.map(lambda a, b: a + step * b, base, d))
    want = float(move(1e-2) - move(-1e-2)) / 2e-2
    got = sum(float(jnp.vdot(grads[key], direction[key])) for key in base)
    assert got == pytest.approx(want, rel=2e-3, abs=2e-4)
  if "retain" not in objective.rows:
    assert not np.any(grads["retain"])
  assert np.any(grads["forget"])


def test_the_reference_gets_no_gradient() -> None:
  objective = add(npo("forget", 0.1), kl_to_reference("retain"))

  def loss(batch: dict[str, TokenRows]) -> jax.Array:
    return objective.value(golden.forward, batch, objective.init())[0]

  plain = golden.batch()
  references = {name: rows.reference for name, rows in plain.items()}
  grads = jax.grad(lambda r: loss({name: plain[name]._replace(reference=r[name]) for name in plain}))(references)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_objectives_compose() -> None:
  both = add(ascend(nll("forget")), scale(0.5, nll("retain")))
  loss, terms = value(both)
  assert both.rows == {"forget", "retain"} and set(terms) == {"nll_forget", "nll_retain"}
  assert loss == pytest.approx(-terms["nll_forget"] + 0.5 * terms["nll_retain"])
  assert add(npo("forget", 0.1), kl_to_reference("retain")).needs == {("forget", "logprobs"), ("retain", "hidden")}
  with pytest.raises(ValueError, match="both called"):
    value(add(nll("forget"), nll("forget")))


def test_an_objective_may_carry_state() -> None:
  def counted(forward: Any, batch: Any, state: int) -> Any:
    return jnp.float32(state), {"count": jnp.float32(state)}, state + 1
  both = add(scale(2.0, Objective(lambda: 3, counted, frozenset())), nll("forget"))
  loss, terms, state = both.value(golden.forward, golden.batch(), both.init())
  assert float(loss) == pytest.approx(6 + terms["nll_forget"]) and state == (4, ())


def test_hyper_parameters_may_be_traced() -> None:
  build = METHODS["npo"].build
  loss = jax.jit(lambda beta: build({"beta": beta}).value(golden.forward, golden.batch(), ())[0])
  assert float(loss(0.1)) == pytest.approx(13.892134, rel=1e-6)
  assert float(loss(0.3)) == pytest.approx(value(npo("forget", 0.3))[0], rel=1e-6)


def test_reductions() -> None:
  values, mask = jnp.array([[1.0, 2.0], [4.0, 9.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
  rows = TokenRows(jnp.zeros((2, 2), jnp.int32), mask)
  assert float(reduce_tokens(values, rows, "token_mean")) == pytest.approx(7 / 3)  # not the mean of row means
  assert reduce_tokens(values, rows, "sequence_sum").tolist() == [3.0, 4.0]


def test_unknown_methods_name_the_nearest() -> None:
  with pytest.raises(InputError, match="'nop', which is no unlearning method.*nearest: npo.*one of ga, gd") as got:
    get_method("nop")
  assert got.value.field == "method"


@pytest.mark.parametrize("name,hyper,field", [
    ("npo", {"beta": 0.0}, "m.beta"), ("npo", {"beta": math.nan}, "m.beta"), ("npo", {"beta": math.inf}, "m.beta"),
    ("gd", {"retain_weight": -1.0}, "m.retain_weight"), ("kl", {"retain_weight": math.inf}, "m.retain_weight")])
def test_hyper_parameters_outside_their_domain_are_named(name: str, hyper: dict[str, float], field: str) -> None:
  with pytest.raises(InputError, match="expected a finite number") as caught:
    check_hyper(name, hyper, "m")
  assert caught.value.field == field
  check_hyper("gd", {"retain_weight": 0.0}, "m")
  check_hyper("ga", {}, "m")
