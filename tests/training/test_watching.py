"""TensorBoard's files and traces of steps, of what is trained."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.errors import InputError
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.training import stage as module
from relearn_jax.training.full_speed import full_speed
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.watching import watching

from ..small import MODEL
from .test_files import ROWS
from .test_step import model_and_params


def run(folder: pathlib.Path, steps: int) -> None:
  model, weights = model_and_params()
  mesh = runs_mesh(1)
  stage = Stage("relearn", ["a", "b", "c"], lambda _: nll("forget"), {"forget": ROWS},
                {"learning_rate": np.float32(1e-3), "weight_decay": 0.0}, keep=(steps,))
  run_stage(stage, model, lambda: repeat_runs(weights, 3, mesh), mesh, folder / "relearn",
            TrainLog(folder / "log.jsonl"), on_keep=lambda step, params: False, save_every=np.inf)


def scalars(folder: pathlib.Path) -> dict[str, list[int]]:
  """Name -> steps, as they stand in the files: records of TensorBoard's own protocol buffers."""
  from tensorboardX.proto.event_pb2 import Event
  found: dict[str, list[int]] = {}
  for path in folder.glob("events*"):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = int.from_bytes(data[at:at + 8], "little")
      event = Event.FromString(data[at + 12:at + 12 + size])
      at += size + 16  # two check sums beside the length and the record
      for value in event.summary.value:
        found.setdefault(value.tag, []).append(event.step)
  return found


def test_losses_and_traces(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("tensorboardX")
  monkeypatch.setattr(module, "full_speed", lambda *_: 1.0)  # as if the devices were known
  with watching(str(tmp_path / "board"), "2:3", tmp_path):
    run(tmp_path, 4)
  found = scalars(tmp_path / "board" / "relearn")
  assert {"loss", "grad_norm", "learning_rate", "terms/nll_forget", "tokens_per_second", "mfu"} == set(found)
  assert all(steps == [1, 2, 3, 4] for steps in found.values())
  for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
    assert row["tokens"] / row["mfu"] == pytest.approx(row["seconds"], abs=1e-4)
  assert list((tmp_path / "profile" / "relearn").rglob("*.xplane.pb"))


def test_nobody_looks_on_unless_asked(tmp_path: pathlib.Path) -> None:
  with watching(None, None, tmp_path):
    run(tmp_path, 1)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]
  assert "mfu" not in json.loads((tmp_path / "log.jsonl").read_text())  # of a CPU


def test_full_speed_by_hand() -> None:
  """Two layers of width 32: four products of attention, of which keys and values have 16 rows, and three of the MLP."""
  products, head = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48), 162 * 32
  attention = 12 * 2 * 32 * 10  # 12 L N H S: half of 20 tokens is seen
  model = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
  of = lambda trained, adapter=False, one=model, kind="NVIDIA H100 80GB HBM3": full_speed(
      one, trained, adapter, 20, kind, 2)
  assert of({}) == pytest.approx(2 * 989.5e12 / (6 * (products + head) + attention))
  added = 2 * (2 * (32 + 32) + 2 * (32 + 16))  # rank 2, queries and values
  adapter = jax.eval_shape(lambda: init_lora(MODEL, LoraConfig(2, 4.0, ("q_proj", "v_proj")), jax.random.key(0)))
  assert of(adapter, True) == pytest.approx(2 * 989.5e12 / (4 * (products + head) + 6 * added + attention))
  assert of({}, kind="cpu") is None and of({}, kind="NVIDIA L4") is None and of({}, one=MODEL) is None


@pytest.mark.parametrize("steps", ["5", "8:5", "0:2", "a:b"])
def test_steps_that_are_none(steps: str, tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError, match="`--profile_steps` is .*; expected FIRST:LAST"), watching(None, steps, tmp_path):
    pass


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(InputError, match=r"needs tensorboardX; pip install 'relearn_jax\[tensorboard\]'"), \
       watching("board", None, tmp_path):
    pass
