"""Combinators: what they do to values, gradients, states and the weights that are released."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.objectives.combinators import (
  add,
  alternate,
  ascend,
  gradient_penalty,
  random_smoothing,
  scale,
  sharpness_aware,
  task_vector,
  weight_average,
)
from relearn_jax.objectives.core import Objective, stateless
from relearn_jax.objectives.losses import kl_to_reference, nll, npo

from . import golden
from .test_objectives import value

NO_MODEL: Any = lambda params, rows: pytest.fail("the model was asked")
W = {"w": jnp.array([1.0, -2.0]), "v": jnp.array(0.5)}


def bowl(name: str = "bowl", curvature: float = 1.0) -> Objective:
  """curvature / 2 * |w|^2 over all weights, whose gradient is curvature * w."""
  def loss(forward: Any, params: Any, batch: Any) -> Any:
    total = curvature / 2 * sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(params))
    return total, {name: total}
  return stateless(loss, "forget")


def at(objective: Objective, params: Any = W, state: Any = None) -> tuple[float, Any]:
  """Value and gradient."""
  state = objective.init(params) if state is None else state
  loss, grads = jax.value_and_grad(lambda p: objective.value(NO_MODEL, p, {}, state)[0])(params)
  return float(loss), grads


def steps(objective: Objective, number: int, params: Any = W) -> list[Any]:
  """The states before each of so many updates with the same terms."""
  state, found = objective.init(params), []
  for _ in range(number):
    found.append(state)
    _, terms = objective.value(NO_MODEL, params, {}, state)
    state = objective.update(state, terms, params)
  return found


def test_sums() -> None:
  both = add(ascend(nll("forget")), scale(0.5, nll("retain")))
  loss, terms = value(both)
  assert both.rows == {"forget", "retain"} and set(terms) == {"nll_forget", "nll_retain"}
  assert loss == pytest.approx(-terms["nll_forget"] + 0.5 * terms["nll_retain"])
  needs = add(npo("forget", 0.1), kl_to_reference("retain")).needs
  assert {need[:2] for need in needs} == {("forget", "logprobs"), ("retain", "hidden")}
  with pytest.raises(ValueError, match="both called"):
    value(add(nll("forget"), nll("forget")))


def test_an_objective_may_carry_state() -> None:
  counted = dataclasses.replace(
      bowl(), init=lambda params: 3, value=lambda forward, params, batch, state: (jnp.float32(state), {}),
      update=lambda state, terms, params: state + 1)
  both = add(scale(2.0, counted), bowl())
  assert at(both)[0] == pytest.approx(6 + at(bowl())[0])
  assert both.update(both.init(W), {}, W) == (4, ())


def test_phases_alternate_and_then_the_second_stays() -> None:
  first, second = bowl("first"), bowl("second", 10.0)
  objective = alternate(first, second, period=2, phases=2)
  low, high = at(first)[0], at(second)[0]
  found = [at(objective, state=state)[0] for state in steps(objective, 12)]
  assert found == pytest.approx([low, low, high, high, low, low, *[high] * 6])
  assert float(at(objective)[1]["v"]) == pytest.approx(0.5)  # the one that rests has no gradient
  assert set(objective.value(NO_MODEL, W, {}, objective.init(W))[1]) == {"first", "second"}


def test_the_state_of_a_phase_that_rests_waits() -> None:
  counting = lambda name: dataclasses.replace(
      bowl(name), init=lambda params: jnp.zeros(()), update=lambda state, terms, params: state + 1,
      value=lambda forward, params, batch, state: bowl(name).value(forward, params, batch, ()))
  found = steps(alternate(counting("a"), counting("b"), period=1, phases=2), 7)
  assert [float(state[1]) for state in found] == [0, 1, 1, 2, 2, 2, 2]
  assert [float(state[2]) for state in found] == [0, 0, 1, 1, 2, 3, 4]
  with pytest.raises(ValueError, match="cannot release"):
    alternate(task_vector(bowl(), 1.0), bowl(), 1, 1)


def test_sharpness_aware_is_the_gradient_at_the_worst_place_near_by() -> None:
  norm = float(jnp.sqrt(sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(W))))
  loss, grads = at(sharpness_aware(bowl(), rho=0.3))
  assert loss == pytest.approx((norm + 0.3) ** 2 / 2)  # uphill is away from the middle
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w * (1 + 0.3 / norm), rtol=1e-6), grads, W)
  only = add(sharpness_aware(bowl("forget"), rho=0.3), bowl("retain"))  # the other term stays where it is
  assert at(only)[0] == pytest.approx((norm + 0.3) ** 2 / 2 + norm ** 2 / 2)
  assert not only.divisible and np.isfinite(at(sharpness_aware(bowl(), 0.3), jax.tree.map(jnp.zeros_like, W))[0])


def test_the_penalty_has_a_gradient() -> None:
  """(1/2 + weight) |w|^2 for the bowl, so its gradient is (1 + 2 weight) w."""
  loss, grads = at(gradient_penalty(bowl(), 0.7))
  assert loss == pytest.approx(1.2 * 2 * at(bowl())[0])
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, 2.4 * w, rtol=1e-6), grads, W)


def test_smoothing_is_the_mean_over_draws_of_their_own() -> None:
  objective = random_smoothing(bowl(), radius=0.1, draws=3, seed=5)
  first, second = (at(objective, state=state) for state in steps(objective, 2))
  assert first[0] != second[0] and first[0] == at(objective)[0]  # drawn anew each step, and again the same
  assert at(random_smoothing(bowl(), 0.1, 3, seed=6))[0] != first[0]
  assert at(random_smoothing(bowl(), 0.0, 3))[0] == pytest.approx(at(bowl())[0])
  many = at(random_smoothing(bowl(), 0.1, 4000))
  assert many[0] == pytest.approx(at(bowl())[0] + 0.01 * 3 / 2, abs=0.01)  # E |w + n|^2 = |w|^2 + 3 radius^2
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=0.01), many[1], W)


def test_the_mean_of_the_weights_is_released() -> None:
  objective = weight_average(bowl(), start=2, every=3)
  state, values = objective.init(W), [jax.tree.map(lambda leaf, k=k: leaf + k, W) for k in range(9)]
  released = []
  for params in values:
    state = objective.update(state, {}, params)
    assert objective.readout is not None
    released.append(float(objective.readout(params, state)["v"]))
  # Steps 2, 5 and 8 count; before the first of them, the weights as they are.
  assert released == pytest.approx([0.5, 1.5, 1.5, 1.5, 3.0, 3.0, 3.0, 4.5, 4.5])


def test_the_task_vector_goes_the_other_way() -> None:
  objective = task_vector(bowl(), alpha=2.0)
  after = jax.tree.map(lambda leaf: leaf + 1, W)
  assert objective.readout is not None
  released = objective.readout(after, objective.init(W))
  jax.tree.map(lambda r, w: np.testing.assert_allclose(r, w - 2.0), released, W)
  adapter = {"layers": {"q": {"a": jnp.ones(2), "b": jnp.zeros(2)}}}
  trained = {"layers": {"q": {"a": jnp.full(2, 3.0), "b": jnp.full(2, 0.25)}}}
  turned = objective.readout(trained, objective.init(adapter))["layers"]["q"]
  np.testing.assert_allclose(turned["a"] * turned["b"], -2.0 * 3.0 * 0.25)  # -alpha times what was learned


def test_combinators_go_into_each_other() -> None:
  objective = weight_average(add(random_smoothing(sharpness_aware(bowl("a"), 0.1), 0.1, 2), bowl("b")), 1, 1)
  run = jax.jit(jax.vmap(lambda p: jax.grad(lambda q: objective.value(NO_MODEL, q, {}, objective.init(p))[0])(p)))
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), W)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(stacked)))
  assert golden.B == 2
