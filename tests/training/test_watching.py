"""TensorBoard's files and traces of steps, of what is trained."""

import pathlib
import sys

import numpy as np
import pytest

from relearn_jax.errors import InputError
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.watching import watching

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


def test_losses_and_traces(tmp_path: pathlib.Path) -> None:
  pytest.importorskip("tensorboardX")
  with watching(str(tmp_path / "board"), "2:3", tmp_path):
    run(tmp_path, 4)
  found = scalars(tmp_path / "board" / "relearn")
  assert {"loss", "grad_norm", "learning_rate", "terms/nll_forget", "tokens_per_second"} == set(found)
  assert all(steps == [1, 2, 3, 4] for steps in found.values())
  assert list((tmp_path / "profile" / "relearn").rglob("*.xplane.pb"))


def test_nobody_looks_on_unless_asked(tmp_path: pathlib.Path) -> None:
  with watching(None, None, tmp_path):
    run(tmp_path, 1)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


@pytest.mark.parametrize("steps", ["5", "8:5", "0:2", "a:b"])
def test_steps_that_are_none(steps: str, tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError, match="`--profile_steps` is .*; expected FIRST:LAST"), watching(None, steps, tmp_path):
    pass


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(InputError, match=r"needs tensorboardX; pip install 'relearn_jax\[tensorboard\]'"), \
       watching("board", None, tmp_path):
    pass
