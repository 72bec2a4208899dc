"""SIGTERM while a stage is trained: its state is saved, and it goes on to the same numbers."""

import json
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax import interrupts
from relearn_jax.data.order import Order
from relearn_jax.errors import InputError
from relearn_jax.models.model import Params, fingerprint
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, to_host
from relearn_jax.training import checkpoints
from relearn_jax.training.log import StageLog, TrainLog
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.states import States

from .test_files import ROWS
from .test_step import model_and_params


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
  """The command's, for the length of a test."""
  before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
  interrupts.handle_interrupts("told to stop")
  yield
  for number, handler in before:
    signal.signal(number, handler)
  interrupts.ask(None)


def run(folder: pathlib.Path, on_keep: Callable[[int, Params], bool], save_every: float = 1e9) -> None:
  model, weights = model_and_params()
  stage = Stage("relearn", ["a", "b", "c"], lambda _: nll("forget"), {"forget": ROWS},
                {"learning_rate": 1e-3, "weight_decay": 0.1}, keep=(3, 6),
                order={"forget": [Order(3, 2, seed) for seed in range(3)]})
  folder.mkdir(exist_ok=True)
  mesh = runs_mesh()
  run_stage(stage, model, lambda: repeat_runs(weights, 3, mesh), mesh, folder / "relearn",
            TrainLog(folder / "log.jsonl"), on_keep=on_keep, save_every=save_every)


def finish(folder: pathlib.Path) -> tuple[list[int], str, list[tuple[int, float]]]:
  """The steps that were kept, the last weights' hash, and the losses by step."""
  steps: list[int] = []
  last: list[Params] = []

  def on_keep(step: int, params: Params) -> bool:
    steps.append(step)
    last[:] = [to_host(params, 3)]
    return False
  run(folder, on_keep)
  rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
  return steps, fingerprint(last[0]), [(row["step"], row["loss"]) for row in rows]


def test_a_stage_that_is_told_to_stop_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Within a step, which is done first; and within what a kept step is for, which is done again."""
  _, weights, losses = finish(tmp_path / "whole")
  add = StageLog.add

  def told(log: StageLog, step: int, *more: object) -> None:
    if step == 2:
      signal.raise_signal(signal.SIGTERM)
      signal.raise_signal(signal.SIGTERM)  # schedulers say it twice
    add(log, step, *more)  # type: ignore[arg-type]
  with monkeypatch.context() as patch, pytest.raises(interrupts.Preempted):
    patch.setattr(StageLog, "add", told)
    run(tmp_path / "stopped", lambda step, params: False)
  resume = tmp_path / "stopped" / "relearn" / "resume"
  assert checkpoints.saved_steps(resume) == [2]
  interrupts.ask(None)

  for step in (3, 6):
    def keep(at: int, params: Params, step: int = step) -> bool:
      if at == step:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it was not stopped here")
      return False
    with pytest.raises(interrupts.Preempted):
      run(tmp_path / "stopped", keep)
    assert checkpoints.saved_steps(resume) == [step]
    interrupts.ask(None)
  assert finish(tmp_path / "stopped") == ([6], weights, losses)
  assert not resume.exists()


def test_what_is_trained_on_meanwhile_is_not_in_a_state(tmp_path: pathlib.Path) -> None:
  """Its buffers are donated to the next steps while they are still being written."""
  step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
  tree = {"a": jnp.zeros((2, 512, 512)), "b": jnp.zeros((2, 512, 512))}
  wait = checkpoints.begin_save(tmp_path / "state", tree, 2, {})
  for _ in range(10):
    tree = step(tree)
  jax.block_until_ready(tree)
  wait()
  saved = checkpoints.load_tree(tmp_path / "state", {name: np.empty((512, 512), np.float32) for name in "ab"}, 2)
  assert not any(leaf.any() for leaf in saved.values()) and float(tree["a"].min()) == 10


def test_the_log_says_how_long_a_step_waits_for_a_state(tmp_path: pathlib.Path) -> None:
  run(tmp_path / "x", lambda step, params: False, save_every=0)
  rows = list(map(json.loads, (tmp_path / "x" / "log.jsonl").read_text().splitlines()))
  assert [row["step"] for row in rows if "save_seconds" in row] == [2, 3, 4, 5, 6]
  assert all(0 < row.get("save_seconds", 1e-9) <= row["seconds"] + 1e-3 for row in rows)


def test_a_damaged_state_is_left_behind(tmp_path: pathlib.Path) -> None:
  """A file of it was cut in half; the command is run again, and the stage begins anew."""
  def stop(step: int, params: Params) -> bool:
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "x", stop, save_every=0)
  resume = tmp_path / "x" / "relearn" / "resume"
  assert checkpoints.saved_steps(resume) == [2]
  largest = max((path for path in resume.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  with pytest.raises(InputError, match="cannot be read .*; run the same command again: the stage begins anew"):
    run(tmp_path / "x", lambda step, params: False)
  assert not resume.exists()
  assert finish(tmp_path / "x")[0] == [3, 6]


def test_states_that_are_gone_are_no_trouble(tmp_path: pathlib.Path) -> None:
  """Another command took the stage over while this one was suspended, and is through with it."""
  with States(tmp_path / "resume", 2) as states:
    states.save(1, {"a": jnp.zeros((2, 3))}, {})
    states._pending[1]()  # type: ignore[index]
    shutil.rmtree(tmp_path / "resume")
  assert not (tmp_path / "resume").exists()


def test_what_cannot_go_on_saves_nothing(tmp_path: pathlib.Path) -> None:
  def keep(step: int, params: Params) -> bool:
    signal.raise_signal(signal.SIGTERM)
    return False
  with pytest.raises(interrupts.Preempted):
    run(tmp_path / "x", keep, save_every=np.inf)
  assert not (tmp_path / "x" / "relearn" / "resume").exists()


def test_outside_of_training_it_raises_at_once() -> None:
  with pytest.raises(interrupts.Preempted):
    signal.raise_signal(signal.SIGTERM)
  interrupts.ask(None)
  reached = []
  with pytest.raises(interrupts.Preempted), interrupts.deferred():
    signal.raise_signal(signal.SIGTERM)
    reached.append("the end of the block")
  assert reached == ["the end of the block"] and isinstance(interrupts.asked(), interrupts.Preempted)
