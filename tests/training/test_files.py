"""What training leaves behind: log rows, checkpoints, and a stage that goes on after a stop."""

import itertools
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from relearn_jax.data.order import Order
from relearn_jax.errors import InputError
from relearn_jax.models.model import Params, fingerprint
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, to_host
from relearn_jax.training import checkpoints
from relearn_jax.training import stage as module
from relearn_jax.training.ended import Ledger, read_ended
from relearn_jax.training.export_run import export_run, model_of
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import Stage, _tokens, run_stage
from relearn_jax.training.step import StepLog, init_state, train_step

from ..small import CONFIG, MODEL, params
from .test_step import DATA

ROWS = jax.tree.map(lambda leaf: np.repeat(leaf[None], 3, 0), DATA["forget"])


def log_of(loss: float) -> StepLog:
  return StepLog(jnp.array([loss, 3.0, 99.0]), {"nll": jnp.array([1.0, 2.0, 99.0])}, jnp.array([0.5, 1.5, 99.0]))


def test_log_rows_leave_padding_runs_out(tmp_path: pathlib.Path) -> None:
  log = TrainLog(tmp_path / "log.jsonl")
  ledger = Ledger(tmp_path / "memorize", "memorize", ["a", "b"], "learning_rate", 1e-3)
  with log.stage("memorize", ledger) as rows:
    rows.add(1, log_of(1.0), 1e-3, 70, 96)
    rows.add(2, log_of(float("nan")), 5e-4, 70, 96)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1  # the last one waits for the next step
  first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
  assert first | {"seconds": 0} == {
      "stage": "memorize", "step": 1, "loss": 2.0, "losses": [1.0, 3.0], "terms": {"nll": 1.5}, "grad_norm": 1.0,
      "left_out": [], "learning_rate": 1e-3, "tokens": 70, "padded_tokens": 96, "seconds": 0}
  # The mean does not fall silent because of one run, and says which one it leaves out.
  assert (second["loss"], second["losses"], second["left_out"]) == (3.0, [None, 3.0], ["a"])
  assert second["terms"] == {"nll": 2.0} and second["grad_norm"] == 1.5 and second["learning_rate"] == 5e-4


def test_a_log_is_cut_where_its_stage_goes_on(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "log.jsonl"
  rows = [{"stage": "a", "step": 1}, {"stage": "a", "step": 2}, {"stage": "b", "step": 1}, {"stage": "b", "step": 2}]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "b", "st')
  TrainLog(path).truncate("b", 1)
  assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:3]
  TrainLog(tmp_path / "none.jsonl").truncate("a", 0)


def test_tokens_are_counted_without_padding() -> None:
  real, padded = _tokens(ROWS)
  # Of each row all tokens to the last that counts: a prompt is read, although it is not predicted.
  assert (real, padded) == (3 * sum(int(np.flatnonzero(row)[-1]) + 1 for row in DATA["forget"].mask), 3 * 3 * 16)


def test_checkpoints_are_complete_or_absent(tmp_path: pathlib.Path) -> None:
  stacked = repeat_runs(params(), 4, runs_mesh())
  about = checkpoints.description(MODEL, ["a", "b", "c"], "unlearn", 5)
  path = checkpoints.step_path(tmp_path / "unlearn", 5)
  checkpoints.save_tree(path, stacked, 3, about)
  assert checkpoints.saved_steps(tmp_path / "unlearn") == [5] and checkpoints.saved_steps(tmp_path / "none") == []
  loaded = checkpoints.load_tree(path, params(), 3)
  assert fingerprint(loaded) == fingerprint(to_host(stacked, 3))
  assert checkpoints.describe(path) == about and model_of(checkpoints.describe(path)).config == CONFIG
  (tmp_path / "unlearn" / "000010").mkdir()  # what a crash may leave
  (tmp_path / "unlearn" / "notes").mkdir()
  assert checkpoints.saved_steps(tmp_path / "unlearn") == [5]
  with pytest.raises(InputError, match="is not a complete checkpoint"):
    checkpoints.describe(tmp_path / "unlearn" / "000010")
  with pytest.raises(InputError, match="the checkpoint holds a, b, c"):
    export_run(path, tmp_path / "out", "d")


def test_a_stage_that_was_stopped_ends_as_if_it_never_was(tmp_path: pathlib.Path) -> None:
  """Stopped after step 4, resumed from the state kept there: the same weights, each step logged once."""
  from .test_step import model_and_params
  model, weights = model_and_params()
  mesh = runs_mesh()
  stage = Stage("relearn", ["a", "b", "c"], lambda _: nll("forget"), {"forget": ROWS},
                {"learning_rate": 1e-3, "weight_decay": 0.0}, keep=(2, 4, 6))

  class Stop(Exception):
    pass

  def run(folder: pathlib.Path, stop: int | None) -> tuple[list[int], Any]:
    seen, last = [], []

    def on_keep(step: int, params: Params) -> bool:
      seen.append(step)
      if step == stop:
        raise Stop
      last[:] = [to_host(params, 3)]
      return False
    log = TrainLog(folder / "log.jsonl")
    start = lambda: repeat_runs(weights, 3, mesh)
    try:
      run_stage(stage, model, start, mesh, folder / "relearn", log, on_keep=on_keep, save_every=0)
    except Stop:
      pass
    return seen, last[0]

  for name in ("whole", "stopped"):
    (tmp_path / name).mkdir()
  seen, whole = run(tmp_path / "whole", None)
  assert seen == [2, 4, 6]
  assert run(tmp_path / "stopped", 4)[0] == [2, 4]
  assert checkpoints.saved_steps(tmp_path / "stopped" / "relearn" / "resume") == [3]
  seen, resumed = run(tmp_path / "stopped", None)
  assert seen == [4, 6] and fingerprint(resumed) == fingerprint(whole)
  assert not (tmp_path / "stopped" / "relearn" / "resume").exists()
  logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
          for name in ("whole", "stopped")]
  assert [[(row["step"], row["loss"]) for row in rows] for rows in logs][0] == [
      (row["step"], row["loss"]) for row in logs[1]]
  assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_a_stage_goes_on_from_any_step_by_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Only the last step is kept; killed before it, the stage goes on from a state between, to the same numbers.

  It does so on another number of devices, with the rows that it had not yet seen: how far it is stands in the state.
  """
  from .test_step import model_and_params
  model, weights = model_and_params()
  kept: list[tuple[str, int]] = []
  stage = Stage("relearn", ["a", "b", "c"], lambda _: nll("forget"), {"forget": ROWS},
                {"learning_rate": np.array([1e-3, 1e38, 2e-3], np.float32), "weight_decay": 0.1}, keep=(6,),
                order={"forget": [Order(3, 2, seed) for seed in range(3)]}, schedule=lambda step: 1.0 / (1 + step))
  positions: list[int] = []
  places = Order.places
  monkeypatch.setattr(Order, "places", lambda order, position: (
      positions.append(position) if order.seed == 0 else None, places(order, position))[1])

  def run(name: str, killed: bool, save_every: float, mesh: Mesh) -> Params:
    def on_keep(step: int, params: Params) -> bool:
      kept.append((name, step))
      if killed:
        raise KeyboardInterrupt
      states.append(to_host(params, 3))
      return False
    states: list[Params] = []
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    run_stage(stage, model, lambda: repeat_runs(weights, 3, mesh), mesh, folder / "relearn",
              TrainLog(folder / "log.jsonl"), on_keep=on_keep, save_every=save_every)
    return states[0]

  whole = run("whole", False, 1e9, runs_mesh())
  assert positions == [0, 2, 4, 6, 8, 10]
  ticks = itertools.count()  # a second a step
  monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
  with pytest.raises(KeyboardInterrupt):
    run("killed", True, 3.5, runs_mesh())
  assert checkpoints.saved_steps(tmp_path / "killed" / "relearn" / "resume") == [4]
  positions.clear()
  resumed = run("killed", False, 1e9, runs_mesh(1))
  assert positions == [8, 10]
  assert kept == [("whole", 6), ("killed", 6), ("killed", 6)]
  assert all(np.array_equal(a, b, equal_nan=True)
             for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True))
  rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
          for name in ("whole", "killed")]
  assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
  assert read_ended(tmp_path / "killed" / "relearn") == read_ended(tmp_path / "whole" / "relearn")
  assert not (tmp_path / "killed" / "relearn" / "resume").exists()


def test_on_keep_may_end_a_stage(tmp_path: pathlib.Path) -> None:
  from .test_step import model_and_params
  model, weights = model_and_params()
  mesh = runs_mesh()
  stage = Stage("unlearn", ["a"], lambda _: nll("forget"), {"forget": jax.tree.map(lambda leaf: leaf[:1], ROWS)},
                {"learning_rate": 1e-3, "weight_decay": 0.0}, keep=(1, 2, 50))
  seen: list[int] = []

  def on_keep(step: int, _: Params) -> bool:
    seen.append(step)
    return step == 2
  run_stage(stage, model, lambda: repeat_runs(weights, 1, mesh), mesh, tmp_path / "unlearn", TrainLog(tmp_path / "log"),
            on_keep=on_keep, save_every=1e9)
  assert seen == [1, 2] and len((tmp_path / "log").read_text().splitlines()) == 2



@pytest.mark.parametrize("parts", [1, 2])
def test_a_stage_in_small_batches_takes_the_rows_of_its_order(tmp_path: pathlib.Path, parts: int) -> None:
  """Rows of an order for each run, a schedule, and steps in parts, against the plain step on picked rows."""
  from .test_step import model_and_params
  model, weights = model_and_params()
  mesh, steps, size = runs_mesh(1), 4, 1 if parts == 1 else 2  # of three rows, so that an epoch ends within a batch
  orders = [Order(3, size, seed) for seed in (0, 3)]
  assert [order.places(0).tolist() for order in orders] != [orders[0].places(0).tolist()] * 2
  schedule = lambda step: 1.0 / (step + 1)
  hyper = {"learning_rate": 1e-3, "weight_decay": 0.1}
  stage = Stage("unlearn", ["a", "b"], lambda _: nll("forget"), {"forget": jax.tree.map(lambda leaf: leaf[:2], ROWS)},
                hyper, keep=(steps,), order={"forget": orders}, num_microbatches=parts, schedule=schedule)
  ended: list[Any] = []

  def on_keep(_: int, params: Params) -> bool:
    ended.append(to_host(params, 2))
    return False
  run_stage(stage, model, lambda: repeat_runs(weights, 2, mesh), mesh, tmp_path / "x", TrainLog(tmp_path / "log"),
            on_keep=on_keep, save_every=1e9)
  plain = jax.jit(lambda state, rows, hyper: train_step(model, lambda _: nll("forget"), state, {"forget": rows}, hyper))
  rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
  real = np.array([int(np.flatnonzero(row)[-1]) + 1 for row in np.asarray(DATA["forget"].mask)])
  for run, order in enumerate(orders):
    state = init_state(weights, nll("forget"))
    for step in range(steps):
      places = order.places(step * size)
      picked = jax.tree.map(lambda leaf, at=places: jnp.asarray(leaf)[at], DATA["forget"])
      state, log = plain(state, picked, hyper | {"learning_rate": 1e-3 * schedule(step)})
      assert rows[step]["losses"][run] == pytest.approx(float(log.loss), abs=2e-5)
    for ours, theirs in zip(jax.tree.leaves(ended[0]), jax.tree.leaves(state.params), strict=True):
      np.testing.assert_allclose(ours[run], theirs, atol=2e-5)
  assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4, 1e-3 / 3, 2.5e-4])
  assert [row["tokens"] for row in rows] == [sum(int(real[order.places(step * size)].sum()) for order in orders)
                                             for step in range(steps)]
