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
from relearn_jax.objectives.methods import Hyper
from relearn_jax.objectives.recipe import default_recipe
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, shard_runs, to_host
from relearn_jax.training.references import add_references
from relearn_jax.training.step import (
    TrainState,
    init_state,
    make_begin,
    make_readout,
    make_step,
    model_outputs,
    train_step,
)

from . import reference

DATA = {name: TokenRows(rows[0], rows[1], labels=rows[2] if len(rows) > 2 else None)  # type: ignore[arg-type]
        for name, rows in reference.rows().items()}
DEFENDED = {"sam_npo_gd": ("npo_gd", "sam"), "gp_npo_gd": ("npo_gd", "gradient_penalty"),
            "wa_npo_gd": ("npo_gd", "averaging")}
CURVES = ("gd", "kl", "npo", "scrub", "rmu", "whp_logits", "undial", "pdu", "sam_npo_gd")  # one of each kind
HALF = {"rmu": {"depth": 0.5}}  # what is fixed when a step is compiled


def arrays() -> dict[str, TokenRows]:
  """`DATA` as JAX's own arrays, on a device."""
  return jax.tree.map(jnp.asarray, DATA)


@functools.cache
def model_and_params() -> tuple[Model, Any]:
  checked = check_checkpoint(reference.CHECKPOINT)
  model = Model(checked.config)
  return model, load_params(checked, model)


def build_of(method: str) -> Any:
  if method == "nll":
    return lambda _: nll("forget")
  name, defence = DEFENDED.get(method, (method, "none"))
  return default_recipe(name, defence, **HALF.get(name, {}), **(
      {"alpha": reference.TABLE[method][1]["alpha"]} if name == "whp_logits" else {})).build


def reinforced() -> Any:
  """The second model of `whp_logits`, `[1, ...]`."""
  model, params = model_and_params()
  state = init_state(params, nll("forget"))
  step = jax.jit(lambda s: train_step(model, lambda _: nll("forget"), s, arrays(), reference.REINFORCE)[0])
  for _ in range(int(reference.REINFORCE["steps"])):
    state = step(state)
  return jax.tree.map(lambda leaf: leaf[None], state.params)


def start_runs(build: Any, hypers: list[dict[str, float]], mesh: Any, scale: float = 1.0) -> tuple[TrainState, Batch]:
  """Equal runs, with what the objective wants of the reference, whose weights are `scale` times theirs."""
  model, params = model_and_params()
  objective, num_runs = build(hypers[0]), len(hypers)
  stacked = repeat_runs(params, num_runs, mesh)
  stack = lambda leaf: np.repeat(np.asarray(leaf)[None], num_runs, 0)
  batch = {name: shard_runs(jax.tree.map(stack, DATA[name]), mesh) for name in objective.rows}
  frozen = jax.tree.map(lambda leaf: leaf * scale, stacked)
  second = reinforced() if any(need.kind == "generic" for need in objective.needs) else None
  batch = dict(add_references(model, frozen, batch, objective.needs, mesh, reinforced=second))
  return make_begin(build, model.axes(), mesh)(stacked, stack_hyper(hypers, mesh)), batch


def stack_hyper(hypers: list[dict[str, float]], mesh: Any) -> dict[str, jax.Array]:
  return shard_runs({key: np.array([hyper[key] for hyper in hypers], np.float32) for key in hypers[0]}, mesh)


def train(method: str, hypers: list[dict[str, float]], steps: int = reference.STEPS, devices: int | None = None
          ) -> tuple[np.ndarray, Any]:
  """Losses `[steps, runs]` and the released parameters on the host."""
  model, _ = model_and_params()
  mesh, build = runs_mesh(devices), build_of(method)
  state, batch = start_runs(build, hypers, mesh, reference.REFERENCE_SCALE.get(method, 1.0))
  hyper = stack_hyper(hypers, mesh)
  step = make_step(model, build, mesh)
  losses = []
  for _ in range(steps):
    state, log = step(state, batch, hyper)
    losses.append(np.asarray(log.loss)[:len(hypers)])
  return np.stack(losses), to_host(make_readout(model, build, mesh)(state, hyper), len(hypers))


def compare(method: str, losses: list[float], moved: float) -> None:
  ours, params = train(method, [reference.hyper(method)], devices=1)
  np.testing.assert_allclose(ours[:, 0], losses, atol=1e-4)
  before = flatten(model_and_params()[1])
  after = flatten(params)
  norm = sum(float(np.sum((after[key][0] - np.asarray(before[key])) ** 2)) for key in before) ** 0.5
  assert norm == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("method", [pytest.param(method, marks=[] if method in CURVES else pytest.mark.slow)
                                    for method in reference.METHODS])
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


@pytest.mark.parametrize("method,changes", [
    ("scrub", {"period": 2.0}), ("pdu", {"dual": 0.5, "dual_rate": 2.0}), ("rmu", {"steering": 8.0}),
    ("wa_npo_gd", {"beta": 1.0, "average_every": 1.0}), ("sam_npo_gd", {"rho": 0.5})])
def test_states_of_runs_side_by_side_do_not_mix(method: str, changes: dict[str, float]) -> None:
  """Phases, dual variables, averages and perturbed weights are each run's own, and so are their settings."""
  hypers = [reference.hyper(method), reference.hyper(method) | changes]
  losses, params = train(method, hypers, steps=4)
  assert not np.allclose(losses[-1, 0], losses[-1, 1], atol=1e-6)
  alone, alone_params = train(method, hypers[1:], steps=4, devices=1)
  # The mean over a layer's output of rmu may end in another last bit when it is compiled for more runs.
  bits = {"rtol": 1e-6, "atol": 1e-4} if method == "rmu" else {"rtol": 0, "atol": 0}
  np.testing.assert_allclose(alone[:, 0], losses[:, 1], **bits)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[1], **bits), alone_params, params)


@pytest.mark.parametrize("method", ["kl", "npo"])
def test_the_mapped_step_is_the_step_of_accelerators(method: str) -> None:
  """One run after the other, as on CPU, and all at once by vmap, as on accelerators."""
  model, _ = model_and_params()
  hypers = [reference.HYPER, reference.HYPER | {"learning_rate": 1e-3}]
  losses, params = train(method, hypers)
  build, mesh = build_of(method), runs_mesh(1)
  state, batch = start_runs(build, hypers, mesh)
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
    return default_recipe("npo").build(hyper)
  state, batch = start_runs(default_recipe("npo").build, [reference.HYPER], mesh)
  step = make_step(model, build, mesh)
  for rate, beta in ((1e-3, 0.1), (5e-4, 0.3), (1e-5, 2.0)):
    values = reference.HYPER | {"learning_rate": rate, "beta": beta}
    hyper = {key: jnp.full(1, value) for key, value in values.items()}
    state, _ = step(state, batch, hyper)
  assert len(traces) == 1


@pytest.mark.parametrize("method", ["kl", "npo", "rmu", *(
    pytest.param(method, marks=pytest.mark.slow) for method in ("npo_kl", "idk_dpo", "undial", "scrub"))])
def test_the_cached_reference_is_a_second_model(method: str) -> None:
  """The losses with cached statistics equal those in which the frozen model itself is asked each step."""
  (model, frozen), data = model_and_params(), arrays()
  objective, mesh = build_of(method)(reference.hyper(method)), runs_mesh(1)
  moved = jax.tree.map(lambda leaf: leaf * 1.05, frozen)

  def ask(name: str) -> dict[str, Any]:
    found = model_outputs(model, frozen, data[name])
    return {"logprobs": found.logprobs, "hidden": found.hidden, "head": found.head, "layer": found.layer(0.5)}
  live = {name: data[name]._replace(reference=ask(name)) for name in objective.rows}
  cached = start_runs(build_of(method), [reference.hyper(method)], mesh)[1]
  one = {name: jax.tree.map(lambda leaf: leaf[0], rows) for name, rows in cached.items()}
  kinds = {kind for need in objective.needs for kind in one[need.rows].reference}
  assert kinds <= {"logprobs", "hidden", "head", "layer"} and kinds
  forward = lambda params, rows: model_outputs(model, params, rows)
  loss = lambda batch: float(objective.value(forward, moved, batch, objective.init(frozen))[0])
  assert loss(one) == pytest.approx(loss(live), rel=1e-5)


def test_an_update_far_below_the_weights_is_not_lost() -> None:
  """Weights of 0.02 that take 100 steps of 1e-7 move by 1e-5; in bf16 they would not move at all."""
  model, params = model_and_params()
  small = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.02), params)
  state, batch = init_state(small, nll("forget")), {"forget": arrays()["forget"]}
  hyper = {"learning_rate": 1e-7, "weight_decay": 0.0}
  step = jax.jit(lambda s: train_step(model, lambda _: nll("forget"), s, batch, hyper)[0])
  for _ in range(100):
    state = step(state)
  moved = np.abs(np.asarray(state.params["embed"]["weight"]) - 0.02).max()
  assert moved == pytest.approx(1e-5, rel=0.1)
  assert state.params["embed"]["weight"].dtype == jnp.float32


def test_the_state_is_donated() -> None:
  mesh = runs_mesh(1)
  state, batch = start_runs(lambda _: nll("forget"), [reference.HYPER], mesh)
  step = make_step(model_and_params()[0], lambda _: nll("forget"), mesh)
  after, _ = step(state, batch, {key: jnp.full(1, value) for key, value in reference.HYPER.items()})
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert int(after.step[0]) == 1
