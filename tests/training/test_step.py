"""The training step: the losses of torch, the same for a run alone and among others, no update lost."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.model import Model, flatten
from relearn_jax.objectives.core import Batch, Objective, TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.objectives.methods import METHODS, Hyper
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, runs_sharding, shard_runs, to_host
from relearn_jax.training.step import (
    TrainState,
    add_references,
    init_state,
    make_step,
    model_outputs,
    train_step,
)

from . import reference

DATA = {name: TokenRows(*rows) for name, rows in reference.rows().items()}  # type: ignore[arg-type]


@functools.cache
def model_and_params() -> tuple[Model, Any]:
  checked = check_checkpoint(reference.CHECKPOINT)
  model = Model(checked.config)
  return model, load_params(checked, model)


def build_of(method: str) -> Any:
  return (lambda _: nll("forget")) if method == "nll" else METHODS[method].build


def start_runs(objective: Objective, num_runs: int, mesh: Any) -> tuple[TrainState, Batch]:
  """Equal runs, with what the objective wants of the reference."""
  model, params = model_and_params()
  stacked = repeat_runs(params, num_runs, mesh)
  stack = lambda leaf: np.repeat(np.asarray(leaf)[None], num_runs, 0)
  batch = {name: shard_runs(jax.tree.map(stack, DATA[name]), mesh) for name in objective.rows}
  batch = dict(add_references(model, stacked, batch, objective.needs, mesh))
  return jax.jit(jax.vmap(lambda p: init_state(p, objective)), out_shardings=runs_sharding(mesh))(stacked), batch


def train(method: str, hypers: list[dict[str, float]], steps: int = reference.STEPS, devices: int | None = None
          ) -> tuple[np.ndarray, Any]:
  """Losses `[steps, runs]` and the trained parameters on the host."""
  model, _ = model_and_params()
  mesh = runs_mesh(devices)
  state, batch = start_runs(build_of(method)(hypers[0]), len(hypers), mesh)
  stacked = {key: np.array([hyper[key] for hyper in hypers], np.float32) for key in hypers[0]}
  hyper = shard_runs(stacked, mesh)
  step = make_step(model, build_of(method), mesh)
  losses = []
  for _ in range(steps):
    state, log = step(state, batch, hyper)
    losses.append(np.asarray(log.loss)[:len(hypers)])
  return np.stack(losses), to_host(state.params, len(hypers))


def compare(method: str, losses: list[float], moved: float) -> None:
  ours, params = train(method, [reference.HYPER])
  np.testing.assert_allclose(ours[:, 0], losses, atol=1e-4)
  before = flatten(model_and_params()[1])
  after = flatten(params)
  norm = sum(float(np.sum((after[key][0] - np.asarray(before[key])) ** 2)) for key in before) ** 0.5
  assert norm == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("method", reference.METHODS)
def test_loss_curves_are_torchs(method: str) -> None:
  """Losses before each of 6 AdamW steps and how far they moved the weights, recorded from torch."""
  compare(method, *json.loads(reference.CURVES.read_text())[method])


@pytest.mark.parametrize("method", reference.METHODS)
def test_recorded_curves_are_what_torch_gives_today(method: str) -> None:
  pytest.importorskip("torch")
  losses, moved = reference.curve(method)
  recorded, recorded_moved = json.loads(reference.CURVES.read_text())[method]
  np.testing.assert_allclose(losses, recorded, atol=2e-5)
  assert moved == pytest.approx(recorded_moved, rel=1e-4)


def test_runs_side_by_side_are_the_runs_alone() -> None:
  hypers = [reference.HYPER | {"learning_rate": rate, "beta": beta}
            for rate, beta in ((2e-3, 0.2), (1e-3, 1.0), (5e-3, 0.05))]
  losses, params = train("npo", hypers)
  for index, hyper in enumerate(hypers):
    alone, alone_params = train("npo", [hyper], devices=1)
    np.testing.assert_array_equal(alone[:, 0], losses[:, index])
    jax.tree.map(lambda a, b, i=index: np.testing.assert_array_equal(a[0], b[i]), alone_params, params)


@pytest.mark.parametrize("method", ["kl", "npo"])
def test_the_mapped_step_is_the_step_of_accelerators(method: str) -> None:
  """One run after the other, as on CPU, and all at once by vmap, as on accelerators."""
  model, _ = model_and_params()
  hypers = [reference.HYPER, reference.HYPER | {"learning_rate": 1e-3}]
  losses, params = train(method, hypers)
  build, mesh = build_of(method), runs_mesh(1)
  state, batch = start_runs(build(reference.HYPER), 2, mesh)
  hyper = {key: jnp.array([h[key] for h in hypers], jnp.float32) for key in hypers[0]}
  step = jax.jit(jax.vmap(lambda s, b, h: train_step(model, build, s, b, h)))
  for want in losses:
    state, log = step(state, batch, hyper)
    np.testing.assert_allclose(np.asarray(log.loss), want, atol=1e-5, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), to_host(state.params), params)


def test_one_executable_serves_all_cells_of_a_shape() -> None:
  model, _ = model_and_params()
  mesh, traces = runs_mesh(1), []

  def build(hyper: Hyper) -> Objective:
    traces.append(hyper)
    return METHODS["npo"].build(hyper)
  step = make_step(model, build, mesh)
  state, batch = start_runs(METHODS["npo"].build(reference.HYPER), 1, mesh)
  for rate, beta in ((1e-3, 0.1), (5e-4, 0.3), (1e-5, 2.0)):
    values = reference.HYPER | {"learning_rate": rate, "beta": beta}
    hyper = {key: jnp.full(1, value) for key, value in values.items()}
    state, _ = step(state, batch, hyper)
  assert len(traces) == 1


def test_the_cached_reference_is_a_second_model() -> None:
  """The losses with cached statistics equal those in which the frozen model itself is asked each step."""
  model, frozen = model_and_params()
  for method in ("kl", "npo"):
    objective = METHODS[method].build(reference.HYPER)
    moved = jax.tree.map(lambda leaf: leaf * 1.05, frozen)
    outputs = {name: model_outputs(model, moved, DATA[name]) for name in objective.rows}
    live = {name: DATA[name]._replace(reference=model_outputs(model, frozen, DATA[name])._asdict()) for name in DATA}
    mesh = runs_mesh(1)
    cached = start_runs(objective, 1, mesh)[1]
    one = {name: jax.tree.map(lambda leaf: leaf[0], rows) for name, rows in cached.items()}
    assert {kind for need in objective.needs for kind in one[need.rows].reference} <= {"logprobs", "hidden", "head"}
    loss = lambda batch, o=objective, x=outputs: float(o.value(x.__getitem__, batch, o.init())[0])
    assert loss(one) == pytest.approx(loss(live), rel=1e-6)


def test_an_update_far_below_the_weights_is_not_lost() -> None:
  """Weights of 0.02 that take 100 steps of 1e-7 move by 1e-5; in bf16 they would not move at all."""
  model, params = model_and_params()
  small = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.02), params)
  state, batch = init_state(small, nll("forget")), {"forget": DATA["forget"]}
  hyper = {"learning_rate": 1e-7, "weight_decay": 0.0}
  step = jax.jit(lambda s: train_step(model, lambda _: nll("forget"), s, batch, hyper)[0])
  for _ in range(100):
    state = step(state)
  moved = np.abs(np.asarray(state.params["embed"]["weight"]) - 0.02).max()
  assert moved == pytest.approx(1e-5, rel=0.1)
  assert state.params["embed"]["weight"].dtype == jnp.float32


def test_the_state_is_donated() -> None:
  mesh = runs_mesh(1)
  state, batch = start_runs(nll("forget"), 1, mesh)
  step = make_step(model_and_params()[0], lambda _: nll("forget"), mesh)
  after, _ = step(state, batch, {key: jnp.full(1, value) for key, value in reference.HYPER.items()})
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert int(after.step[0]) == 1
