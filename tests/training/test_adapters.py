"""The step with adapters, in parts, and at low precision."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.order import Order
from relearn_jax.metrics import likelihood
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Head, Params
from relearn_jax.objectives.core import Objective, TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.objectives.recipe import default_recipe
from relearn_jax.parallel.mesh import runs_mesh, shard_runs
from relearn_jax.training.references import add_references
from relearn_jax.training.step import (
  Frozen,
  init_state,
  make_begin,
  make_step,
  split_rows,
  take_rows,
  train_step,
)

from .test_step import DATA, arrays, model_and_params

LORA = LoraConfig(rank=3, alpha=6.0)
HYPER = {"learning_rate": 1e-3, "weight_decay": 0.1, "retain_weight": 0.5, "beta": 0.1}
BASE, PARAMS = model_and_params()
MODEL = dataclasses.replace(BASE, lora_scale=LORA.scale)


def build_of(method: str) -> Any:
  return default_recipe(method).build


def adapter(seed: int) -> Params:
  draw = lambda leaf: jnp.asarray(0.05 * np.random.default_rng([seed, leaf.size]).normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, init_lora(MODEL, LORA, jax.random.key(seed)))


@pytest.mark.parametrize("method,shared", [("kl", True), ("npo", False)])
def test_stacked_adapters_equal_separate_ones(method: str, shared: bool) -> None:
  """Two adapters on one base, with learning rates of their own, against two runs of one."""
  mesh, num_runs, build = runs_mesh(1), 2, build_of(method)
  rates = np.array([1e-3, 2e-3], np.float32)
  stack = lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves])
  objective = build(HYPER)

  def run(seeds: list[int]) -> tuple[Any, Any]:
    starts = shard_runs(jax.tree.map(stack, *(adapter(seed) for seed in seeds)), mesh)
    each = lambda leaf: np.repeat(np.asarray(leaf)[None], len(seeds), 0)
    frozen = Frozen(shared=PARAMS) if shared else Frozen(own=jax.tree.map(each, PARAMS))
    data = {name: shard_runs(jax.tree.map(each, DATA[name]), mesh) for name in objective.rows}
    data = dict(add_references(MODEL, starts, data, objective.needs, mesh, frozen))
    hyper = {name: np.full(len(seeds), value, np.float32) for name, value in HYPER.items()}
    hyper = shard_runs(hyper | {"learning_rate": rates[seeds]}, mesh)
    state, step = make_begin(build, MODEL.axes(), mesh)(starts, hyper), make_step(MODEL, build, mesh)
    losses = []
    for _ in range(3):
      state, log = step(state, data, hyper, None, frozen)
      losses.append(np.asarray(log.loss))
    return state, np.array(losses)

  together, losses = run(list(range(num_runs)))
  assert not np.allclose(losses[-1, 0], losses[-1, 1], atol=1e-4)
  for seed in range(num_runs):
    alone, expected = run([seed])
    np.testing.assert_allclose(losses[:, seed], expected[:, 0], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
      np.testing.assert_allclose(ours[seed], theirs[0], atol=1e-6)


def test_runs_that_share_a_base_read_it_in_one_product() -> None:
  """Mapped over five runs, as on accelerators: no product has a base matrix for each run, and adapters have theirs."""
  num_runs, build = 5, build_of("ga")
  each = lambda leaf: np.repeat(np.asarray(leaf)[None], num_runs, 0)
  state = jax.vmap(lambda params: init_state(params, build(HYPER)))(jax.tree.map(each, adapter(0)))
  data = {"forget": jax.tree.map(each, DATA["forget"])}

  def one(state: Any, data: Any, shared: Params) -> Any:
    return train_step(MODEL, build, state, data, HYPER, Frozen(shared=shared))
  text = jax.jit(jax.vmap(one, in_axes=(0, 0, None))).lower(state, data, PARAMS).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  config = MODEL.config
  base = f"tensor<{config.intermediate_size}x{config.hidden_size}xf32>"
  assert sum(base in line and "batching_dims" not in line for line in products) >= 4  # there and back
  assert not any(f"tensor<{num_runs}x{config.intermediate_size}x{config.hidden_size}xf32>" in line for line in products)
  assert any(f"tensor<{num_runs}x{LORA.rank}x{config.hidden_size}xf32>" in line and "batching_dims" in line
             for line in products)


def test_only_the_adapter_has_moments() -> None:
  state = init_state(adapter(0), nll("forget"))
  trained = sum(leaf.size for leaf in jax.tree.leaves(adapter(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * trained + 1


def referenced(method: str) -> tuple[Objective, dict[str, TokenRows]]:
  objective = build_of(method)(HYPER)
  one = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
  data = add_references(BASE, one(PARAMS), {name: one(DATA[name]) for name in objective.rows}, objective.needs,
                        runs_mesh(1))
  return objective, jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], dict(data))


@pytest.mark.parametrize("method", [
    "kl", "npo", pytest.param("ga", marks=pytest.mark.slow), pytest.param("gd", marks=pytest.mark.slow)])
def test_parts_of_a_step_add_up_to_the_step(method: str) -> None:
  """Although rows differ in length, and the last part holds an empty row."""
  objective, data = referenced(method)
  empty = lambda leaf: jnp.pad(leaf, ((0, -leaf.shape[0] % 4), *((0, 0),) * (leaf.ndim - 1)))

  def fill(rows: TokenRows) -> TokenRows:
    kept = {kind: x if kind == "head" else empty(x) for kind, x in rows.reference.items()}
    return TokenRows(empty(rows.tokens), empty(rows.mask), kept)
  padded = {name: fill(rows) for name, rows in data.items()}
  counts = {int(row.sum()) for row in padded["forget"].mask}
  assert len(counts) > 1 and 0 in counts
  # Not at the reference itself, where KL has no gradient and NPO none of the second order.
  moved = jax.tree.map(lambda leaf: leaf * 1.01, PARAMS)
  step = lambda rows, parts: jax.jit(lambda state: train_step(
      BASE, build_of(method), state, rows, HYPER, num_microbatches=parts))(init_state(moved, objective))
  whole, log = step(data, 1)
  for parts in (2, 4):
    state, parts_log = step(padded, parts)
    np.testing.assert_allclose(parts_log.loss, log.loss, rtol=2e-6)
    np.testing.assert_allclose(parts_log.grad_norm, log.grad_norm, rtol=2e-5)
    for name in log.terms:
      np.testing.assert_allclose(parts_log.terms[name], log.terms[name], rtol=1e-5, atol=1e-6)
    moments = jax.tree.leaves(state.opt_state[0].mu), jax.tree.leaves(whole.opt_state[0].mu)
    for ours, theirs in zip(*moments, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_references_in_parts_are_the_same() -> None:
  objective = build_of("kl")(HYPER)
  even = lambda leaf: np.pad(np.asarray(leaf), ((0, leaf.shape[0] % 2), (0, 0)))
  one = lambda tree: jax.tree.map(lambda leaf: even(leaf)[None], tree)
  batch = {name: one(TokenRows(DATA[name].tokens, DATA[name].mask)) for name in objective.rows}
  params = jax.tree.map(lambda leaf: leaf[None], PARAMS)
  once, parts = (add_references(BASE, params, batch, objective.needs, runs_mesh(1), num_microbatches=n)["retain"]
                 for n in (1, 2))
  np.testing.assert_allclose(parts.reference["hidden"], once.reference["hidden"], atol=1e-5)


def test_an_objective_whose_parts_do_not_add_up_is_not_split() -> None:
  build = default_recipe("ga", "sam").build
  with pytest.raises(ValueError, match="takes its step in one part"):
    train_step(BASE, build, init_state(PARAMS, build({})), DATA, HYPER, num_microbatches=2)


def test_rows_are_picked_by_place() -> None:
  _, data = referenced("kl")
  taken = take_rows(data, {"retain": jnp.array([1, 0])})
  np.testing.assert_array_equal(taken["retain"].tokens, np.asarray(data["retain"].tokens)[[1, 0]])
  np.testing.assert_array_equal(taken["retain"].reference["hidden"],
                                np.asarray(data["retain"].reference["hidden"])[[1, 0]])
  assert taken["retain"].reference["head"] is data["retain"].reference["head"]
  assert taken["forget"] is data["forget"]
  parts = split_rows({"x": TokenRows(jnp.arange(8).reshape(4, 2), jnp.ones((4, 2)))}, 2)["x"]
  assert parts.tokens[:, :, 0].tolist() == [[0, 4], [2, 6]] and parts.num_tokens.tolist() == [8, 8]


def test_small_updates_of_low_precision_are_not_lost() -> None:
  """Steps of 1e-5 on weights of 0.02: bf16 weights would not move at all, fp32 masters do."""
  assert jnp.bfloat16(0.02) + jnp.bfloat16(1e-5) == jnp.bfloat16(0.02)
  model = dataclasses.replace(BASE, dtype=jnp.bfloat16)
  path = lambda p: p["layers"]["mlp"]["up"]["weight"]
  start = {**PARAMS, "layers": {**PARAMS["layers"], "mlp": {
      **PARAMS["layers"]["mlp"], "up": {"weight": jnp.full_like(path(PARAMS), 0.02)}}}}
  hyper = {"learning_rate": 1e-5, "weight_decay": 0.0}
  state, log = jax.jit(lambda s: train_step(model, lambda _: nll("forget"), s, arrays(), hyper))(
      init_state(start, nll("forget")))
  assert log.loss.dtype == jnp.float32 and np.isfinite(float(log.loss))
  assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state[0].nu))} == {jnp.dtype("float32")}
  moved = np.abs(np.asarray(path(state.params)) - 0.02)
  assert np.median(moved) == pytest.approx(1e-5, rel=0.01)
  plain = jax.jit(lambda s: train_step(BASE, lambda _: nll("forget"), s, arrays(), hyper)[1])(
      init_state(start, nll("forget")))
  assert float(log.loss) == pytest.approx(float(plain.loss), rel=0.02)


@pytest.mark.parametrize("picked", [False, True])
def test_log_probabilities_in_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, picked: bool) -> None:
  rng = np.random.default_rng(0)
  batch, length, size, vocab = 3, 11, 8, 40
  tokens = jnp.asarray(rng.integers(0, vocab, (batch, length)))
  hidden = jnp.asarray(rng.normal(size=(batch, length, size)), jnp.float32)
  head = Head(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((vocab, size), (vocab,))))
  mask = np.zeros((batch, length), np.float32)
  mask[0, 3:7] = mask[1, 1:] = mask[2, 10:] = 1
  positions = None
  if picked:
    positions = jnp.asarray([np.resize([*np.flatnonzero(row), *[0] * length], 10) for row in mask])

  def loss(hidden: Any, head: Head) -> Any:
    function = lambda targets, h: likelihood.token_logprobs(h, head, targets)
    values = likelihood.per_token(function, tokens, positions, vocab, hidden)
    return jnp.sum(values * mask * jnp.arange(length)), values

  def dense(hidden: Any, head: Head) -> Any:
    logprobs = jax.nn.log_softmax(hidden @ head.weight.T + head.bias)[:, :-1]
    values = jnp.pad(jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0], ((0, 0), (1, 0)))
    return jnp.sum(values * mask * jnp.arange(length)), values
  monkeypatch.setattr(likelihood, "CHUNK_BYTES", 4 * batch * vocab * 3)  # three tokens a row
  ours, theirs = (jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head) for f in (loss, dense))
  np.testing.assert_allclose(ours[0][0], theirs[0][0], rtol=1e-6)
  np.testing.assert_allclose(ours[0][1] * mask, theirs[0][1] * mask, atol=1e-5)
  for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
    np.testing.assert_allclose(mine, other, atol=2e-5)
  text = str(jax.make_jaxpr(jax.grad(lambda h: loss(h, head)[0]))(hidden))
  assert f"f32[{batch},3,{vocab}]" in text or f"f32[{batch},4,{vocab}]" in text
  assert f"f32[{batch},{length},{vocab}]" not in text and f"f32[{batch},{length - 1},{vocab}]" not in text


def test_orders() -> None:
  assert Order(5, 5, 0).places(15).tolist() == Order(5, 9, 1).places(0).tolist() == [0, 1, 2, 3, 4]  # the file's own
  order = Order(7, 3, 0)
  seen = np.concatenate([order.places(position) for position in range(0, 21, 3)])
  for epoch in range(3):  # each epoch has every row once, and batches go over its end
    assert sorted(seen[7 * epoch:7 * epoch + 7]) == list(range(7))
  assert not np.array_equal(seen[:7], seen[7:14])
  assert order.places(12).tolist() == Order(7, 3, 0).places(12).tolist() != Order(7, 3, 1).places(12).tolist()
  assert order.places(12).tolist() == Order(7, 1, 0).places(12).tolist() + Order(7, 2, 0).places(13).tolist()
