"""Objectives against values worked out elsewhere and by hand, and their gradients against differences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.models.model import Head
from relearn_jax.objectives import losses
from relearn_jax.objectives.combinators import add, ascend, scale
from relearn_jax.objectives.core import Objective, Outputs, TokenRows, reduce_tokens, remember
from relearn_jax.objectives.losses import kl_to_reference, nll, npo
from relearn_jax.objectives.methods import METHODS
from relearn_jax.objectives.recipe import default_recipe

from . import golden

RMU = {"depth": 0.5}


def value(objective: Objective, params: Any = golden.PARAMS, batch: Any = None, forward: Any = golden.forward
          ) -> tuple[float, dict[str, float]]:
  """Loss and terms."""
  batch = golden.batch() if batch is None else batch
  loss, terms = objective.value(forward, params, batch, objective.init(params))
  return float(loss), {name: float(term) for name, term in terms.items()}


def build(name: str, **hyper: float) -> Objective:
  return default_recipe(name, **((RMU if name == "rmu" else {}) | hyper)).objective


@pytest.mark.parametrize("objective,expected", [
    (nll("forget"), 2.139302), (nll("retain"), 2.949408), (build("ga"), -2.139302), (build("gd"), 0.810107),
    (kl_to_reference("retain"), 0.063197), (build("kl"), 0.063197 - 2.139302), (build("npo"), 13.892134),
    (build("npo_gd"), 13.892134 + 2.949408), (build("npo_kl"), 13.892134 + 0.063197),
    (losses.simnpo("forget", 4.5), 9.6e-5), (losses.dpo("idk", "forget", 0.1), 14.134218),
    (build("idk_dpo"), 14.134218 + 2.949408), (build("wga"), -0.258767 + 2.949408),
    (ascend(losses.weighted_nll("forget", lambda p: p ** 5 * (1 - p))), -0.002634),
    (build("undial"), 1.622826), (build("ceu"), 1.500521)])
def test_published_formulas(objective: Objective, expected: float) -> None:
  assert value(objective)[0] == pytest.approx(expected, abs=2e-6 * max(1, abs(expected)))


def test_published_formulas_that_count_other_places() -> None:
  """SCRUB's over all positions, and PDU's at the tokens' own, are ours on rows whose masks are made to say so."""
  def moved(mask: np.ndarray, name: str = "forget") -> dict[str, TokenRows]:
    """A position more at the end, so that every position can be counted where the next token is predicted."""
    data = golden.batch()[name]
    longer = lambda x: jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))
    reference = dict(data.reference) | {"hidden": longer(data.reference["hidden"])}
    return {name: TokenRows(longer(data.tokens), jnp.asarray(mask, jnp.float32), reference)}
  after = lambda mask: np.pad(mask, ((0, 0), (1, 0)))
  params = {name: jnp.pad(logits, ((0, 0), (0, 1), (0, 0))) for name, logits in golden.PARAMS.items()}
  every = moved(after(np.ones((golden.B, golden.T))))
  assert value(ascend(kl_to_reference("forget", 4.0)), params, every)[0] == pytest.approx(-0.150925, abs=2e-6)
  own = moved(after(golden.MASK["forget"]))
  assert value(losses.logit_margin("forget"), params, own)[0] == pytest.approx(3.425711, abs=4e-6)
  everywhere = moved(after(np.ones((golden.B, golden.T))), "retain")
  assert value(kl_to_reference("retain"), params, everywhere)[0] == pytest.approx(0.058358, abs=2e-6)


def one_row(logprobs: list[float], mask: list[float], reference: list[float]) -> tuple[Any, dict[str, TokenRows]]:
  """A model that gives these log-probabilities, and its batch."""
  row = lambda values: jnp.array([values], jnp.float32)
  outputs = Outputs(row(logprobs), jnp.zeros((1, len(mask), 1)), Head(jnp.zeros((1, 1))))
  tokens = jnp.zeros((1, len(mask)), jnp.int32)
  return lambda params, rows: outputs, {"x": TokenRows(tokens, row(mask), {"logprobs": row(reference)})}


def of_row(objective: Objective, *row: list[float]) -> float:
  forward, batch = one_row(*row)
  return value(objective, {}, batch, forward)[0]


def test_values_by_hand() -> None:
  row = [0.0, -1.0, -2.0, -8.0], [0.0, 1.0, 1.0, 0.0], [0.0, -0.5, -0.5, -9.0]
  assert of_row(nll("x"), *row) == pytest.approx(1.5)
  assert of_row(nll("x", "sequence_sum"), *row) == pytest.approx(3.0)
  # s = -3, s_ref = -1: (2 / 0.5) * softplus(0.5 * -2) = 4 * ln(1 + 1/e)
  assert of_row(npo("x", 0.5), *row) == pytest.approx(4 * math.log(1 + math.exp(-1)))
  assert of_row(npo("x", 0.5), [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]) == pytest.approx(4 * math.log(2))
  # s / n = -1.5: (2 / 2) * softplus(2 * (-1.5 + 0.5)) = ln(1 + e^-2)
  assert of_row(losses.simnpo("x", 2.0, 0.5), *row) == pytest.approx(math.log(1 + math.exp(-2)))
  # (e^-1 * 1 + e^-2 * 2) / 2
  assert of_row(losses.weighted_nll("x", lambda p: p), *row) == pytest.approx((math.exp(-1) + 2 * math.exp(-2)) / 2)


def of_logits(objective: Objective, logits: list[float], token: int, reference: list[float]) -> float:
  """A row of two tokens, the second of which counts, under these logits."""
  params = {"x": jnp.array([[logits, [0.0] * len(logits)]])}
  head = Head(jnp.eye(len(logits)))
  frozen = jnp.array([[reference, [0.0] * len(logits)]])
  rows = TokenRows(jnp.array([[0, token]]), jnp.array([[0.0, 1.0]]), {"hidden": frozen, "head": head, "layer": frozen})
  forward = lambda p, rows: golden.outputs(p["x"], rows.tokens if rows.labels is None else rows.labels, head)
  return value(objective, params, {"x": rows}, forward)[0]


def test_values_over_the_vocabulary_by_hand() -> None:
  ln = math.log
  # p = (1/2, 1/4, 1/4), reference (1/4, 1/2, 1/4): KL = 1/4 ln(1/2) + 1/2 ln 2 + 0
  p, q = [ln(2), 0.0, 0.0], [0.0, ln(2), 0.0]
  assert of_logits(kl_to_reference("x"), p, 0, q) == pytest.approx(0.25 * ln(2))
  # Without the token at p = 1/2 the others are equal: -ln(1/4)
  assert of_logits(losses.ce_u("x", 0.0), p, 0, q) == pytest.approx(ln(4))
  assert of_logits(losses.ce_u("x", 1.0), p, 0, q) == 0  # the only counted token is the first, and left out
  # The reference's token lowered by ln 2 is as likely as the others: mean of -ln p over (1/2, 1/4, 1/4)
  assert of_logits(losses.undial("x", ln(2)), p, 1, q) == pytest.approx((ln(2) + 2 * ln(4)) / 3)
  assert of_logits(losses.logit_margin("x"), [3.0, 0.0, 0.0], 1, q) == pytest.approx(4.0)
  # h = depth * z at the token's own place, which is zero here: mean_d (steering u)^2 = steering^2 / D
  assert of_logits(losses.misdirect("x", 1.0, 6.0), p, 0, q) == pytest.approx(12.0, rel=1e-5)
  assert of_logits(losses.preserve("x", 1.0), p, 0, q) == 0


def test_generic_logits_lower_what_was_reinforced() -> None:
  base, reinforced = jnp.array([3.0, 2.0, 1.0]), jnp.array([4.0, 1.0, 1.0])
  np.testing.assert_allclose(losses.generic_logits(base, reinforced, 5.0), [-2.0, 2.0, 1.0])
  np.testing.assert_allclose(losses.generic_logits(base, reinforced, 0.0), base)


def test_relabelled_rows_predict_their_labels() -> None:
  data = golden.batch()["forget"]
  other = jnp.asarray((golden.IDS["forget"] + 1) % golden.V)
  logp = jax.nn.log_softmax(golden.PARAMS["forget"])[:, :-1]
  chosen = jnp.take_along_axis(logp, other[:, 1:, None], -1)[..., 0]
  want = -float(jnp.sum(chosen * data.mask[:, 1:]) / jnp.sum(data.mask))
  assert value(nll("forget"), batch={"forget": data._replace(labels=other)})[0] == pytest.approx(want, rel=1e-6)
  generic = data._replace(reference={**data.reference, "generic": other})
  loss, terms = value(losses.generic_nll("forget", 5.0), batch={"forget": generic})
  assert loss == pytest.approx(want, rel=1e-6) and terms["unchanged"] == 0


def test_npo_tends_to_gradient_ascent_and_stays_above_zero() -> None:
  def gradient(objective: Objective, logprob: float) -> float:
    def loss(x: jax.Array) -> jax.Array:
      outputs = Outputs(jnp.array([[0.0, 1.0]]) * x, jnp.zeros((1, 2, 1)), Head(jnp.zeros((1, 1))))
      _, batch = one_row([0.0, 0.0], [0.0, 1.0], [0.0, -1.0])
      return objective.value(lambda params, rows: outputs, {}, batch, ())[0]
    return float(jax.grad(loss)(jnp.float32(logprob)))
  assert gradient(npo("x", 1e-4), -5.0) == pytest.approx(gradient(ascend(nll("x")), -5.0), rel=1e-3)
  assert 0 < gradient(npo("x", 1.0), -30.0) < 1e-9  # far below the reference it lets go
  assert of_row(npo("x", 1.0), [0.0, -80.0], [0.0, 1.0], [0.0, -1.0]) >= 0


@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing(name: str) -> None:
  """Longer rows and rows without counted tokens leave every method's loss as it is."""
  pad = lambda x, fill=3: jnp.pad(x, ((0, 1), (0, 3), *[(0, 0)] * (x.ndim - 2)), constant_values=x.dtype.type(fill))

  def widen(rows: TokenRows) -> TokenRows:
    reference = {key: x if key in ("head", "name") else pad(x) for key, x in rows.reference.items()}
    return TokenRows(pad(rows.tokens), pad(rows.mask, 0), reference)
  batch = {key: widen(rows) for key, rows in golden.batch().items()}
  params = {key: pad(logits, -7) for key, logits in golden.PARAMS.items()}
  assert value(build(name), params, batch)[0] == pytest.approx(value(build(name))[0], rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_counted_tokens_is_no_division_by_zero(name: str) -> None:
  batch = {key: rows._replace(mask=jnp.zeros_like(rows.mask)) for key, rows in golden.batch().items()}
  assert abs(value(build(name), batch=batch)[0]) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
  """Of weights without a gradient (wga, satimp, ceu), the differences are taken with the weights held fixed."""
  objective, batch = build(name), golden.batch()
  held = {"wga": lambda: losses.weighted_nll("forget", lambda p: _fixed(p)),
          "satimp": lambda: losses.weighted_nll("forget", lambda p: _fixed(p) ** 5 * (1 - _fixed(p)))}
  probabilities = jnp.exp(golden.outputs(golden.LOGITS["forget"], golden.IDS["forget"]).logprobs)

  def _fixed(_: Any) -> jax.Array:
    return probabilities

  def loss(params: Any, objective: Objective = objective) -> jax.Array:
    return objective.value(golden.forward, params, batch, objective.init(params))[0]
  grads = jax.grad(loss)(golden.PARAMS)
  if name in held:
    weight = -0.1 if name == "satimp" else -1.0
    objective = add(scale(weight, held[name]()), nll("retain"))
  if name == "ceu":
    return test_the_target_of_ceu_is_fixed(grads)
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = {key: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for key, x in golden.PARAMS.items()}
    move = lambda step, d=direction: loss(jax.tree.map(lambda a, b: a + step * b, golden.PARAMS, d), objective)
    want = float(move(1e-2) - move(-1e-2)) / 2e-2
    got = sum(float(jnp.vdot(grads[key], direction[key])) for key in golden.PARAMS)
    assert got == pytest.approx(want, rel=4e-3, abs=4e-4)
  used = {golden.plain(row) for row in objective.rows}
  if name not in ("scrub", "undial"):  # of which a phase rests, and a weight is 0
    assert all(np.any(grads[key]) == (key in used) for key in grads)


def test_the_target_of_ceu_is_fixed(grads: Any = None) -> None:
  """d/dz of CE(q, softmax(z)) with q fixed is softmax(z) - q, divided by the number of counted tokens."""
  if grads is None:
    objective = build("ceu")
    grads = jax.grad(lambda p: objective.value(golden.forward, p, golden.batch(), ())[0])(golden.PARAMS)
  z, mask = golden.PARAMS["forget"], golden.MASK["forget"]
  later = mask * (np.cumsum(mask, -1) > 1)
  for row, place in np.argwhere(later):
    at = z[row, place - 1]
    q = jax.nn.softmax(at.at[int(golden.IDS["forget"][row, place])].set(-jnp.inf))
    np.testing.assert_allclose(grads["forget"][row, place - 1], (jax.nn.softmax(at) - q) / later.sum(), atol=1e-6)


def test_references_get_no_gradient() -> None:
  objective = add(npo("forget", 0.1), kl_to_reference("retain"), losses.undial("forget", 1.0),
                  losses.preserve("retain", 0.5))
  plain = golden.batch()
  numbers = lambda rows: {key: x for key, x in rows.reference.items() if key not in ("name", "generic")}

  def loss(references: Any) -> jax.Array:
    batch = {name: plain[name]._replace(reference={**plain[name].reference, **references[name]}) for name in plain}
    return objective.value(golden.forward, golden.PARAMS, batch, objective.init({}))[0]
  grads = jax.grad(loss)({name: numbers(rows) for name, rows in plain.items()})
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_hyper_parameters_may_be_traced() -> None:
  recipe = default_recipe("npo")
  loss = jax.jit(lambda beta: recipe.build({"beta": beta}).value(golden.forward, golden.PARAMS, golden.batch(), ())[0])
  assert float(loss(0.1)) == pytest.approx(13.892134, rel=1e-6)
  assert float(loss(0.3)) == pytest.approx(value(npo("forget", 0.3))[0], rel=1e-6)


def test_the_dual_variable_follows_the_constraint() -> None:
  objective = losses.retain_constraint("retain", epsilon=2.0, initial=3.0, rate=0.5, warmup=1)
  state, excess = objective.init({}), 2.949408 - 2.0
  loss, terms = objective.value(golden.forward, golden.PARAMS, golden.batch(), state)
  assert float(loss) == pytest.approx(3 * excess, rel=1e-5) and float(terms["dual"]) == 3
  state = objective.update(state, terms, {})
  assert float(state[1]) == 3  # before the warm-up is over
  state = objective.update(state, terms, {})
  assert float(state[1]) == pytest.approx(3 + 0.5 * excess, rel=1e-5)
  kept = objective.update(state, {"nll_retain": jnp.float32(-1e6)}, {})
  assert float(kept[1]) == 0  # never below


def test_a_forward_pass_is_made_once() -> None:
  calls = []

  def forward(params: Any, rows: TokenRows) -> Outputs:
    calls.append(rows.reference["name"])
    return golden.forward(params, rows)
  value(add(nll("retain"), kl_to_reference("retain")), forward=remember(forward))
  assert calls == ["retain"]


def test_reductions() -> None:
  values, mask = jnp.array([[1.0, 2.0], [4.0, 9.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
  rows = TokenRows(jnp.zeros((2, 2), jnp.int32), mask)
  assert float(reduce_tokens(values, rows, "token_mean")) == pytest.approx(7 / 3)  # not the mean of row means
  assert reduce_tokens(values, rows, "sequence_sum").tolist() == [3.0, 4.0]
