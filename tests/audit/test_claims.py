"""Several commands work through one grid, each stage once, and end with the rows of an undisturbed run."""

import json
import os
import pathlib
import random
import signal
import subprocess
import time
import types
from typing import Any

import pyarrow.parquet as pq
import pytest

from relearn_jax.audit import claims as claims_module
from relearn_jax.audit.claims import Claims, is_ready, refuse_shared
from relearn_jax.audit.stages import plan_stages
from relearn_jax.audit.status import status
from relearn_jax.errors import InputError
from relearn_jax.training.checkpoints import Unreadable
from relearn_jax.workdir import only_process

from ..command import argv, environment, relearn, summary
from ..parallel.several import smallest_audit
from .tiny import names_audit


def test_what_can_be_begun() -> None:
  """Attacks of a method once it is through, whatever becomes of the others; parts of unlearning in their order."""
  config = names_audit(unlearn__methods=("ga", "npo"), unlearn__runs_at_once=4, seeds=(0,), case__variants=(7, 1))
  stages = {stage.name: stage for stage in plan_stages(config, ["prefixes"])}
  ready = lambda *done: [name for name, stage in stages.items() if name not in done and is_ready(
      stage, [one for other, one in stages.items() if other not in done])]
  attacks = ["attack-ga-prefixes-full-seed0", "attack-npo-prefixes-full-seed0"]
  assert set(stages) == {"pretrain", "memorize", "unlearn-ga", "unlearn-npo", *attacks}
  assert ready("pretrain") == ["memorize"]
  assert ready("pretrain", "memorize") == ["unlearn-ga", "unlearn-npo"]
  assert ready("pretrain", "memorize", "unlearn-npo") == ["unlearn-ga", attacks[1]]
  config.unlearn.runs_at_once = 2
  stages = {stage.name: stage for stage in plan_stages(config, ["prefixes"])}
  assert ready("pretrain", "memorize") == ["unlearn-ga-part0", "unlearn-npo-part0"]
  assert ready("pretrain", "memorize", "unlearn-ga-part0") == ["unlearn-ga-part1", "unlearn-npo-part0"]


def test_who_may_work_in_a_workdir(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  with Claims(tmp_path):
    with pytest.raises(InputError, match="is shared by commands with --claim"):
      refuse_shared(tmp_path)
    other = Claims(tmp_path)
    other.refuse_larger()  # nothing is there yet
    (tmp_path / "config.json").write_text("{}")
    other.refuse_larger()  # of one process: the same name
    other.name = "command-another"
    with pytest.raises(InputError, match="has another grid, on which a command on .* is at work"):
      other.refuse_larger()
    (tmp_path / "config.json").unlink()
    other.__exit__()
  refuse_shared(tmp_path)
  with only_process(tmp_path):
    assert "is in use by another process" in relearn(cache, *smallest_audit(tmp_path), "--claim", status=2).stderr


def test_the_first_command_decides_how_many_fit(tmp_path: pathlib.Path) -> None:
  stage = plan_stages(names_audit(), ["prefixes"])[-1]
  with Claims(tmp_path) as first, Claims(tmp_path) as other:
    assert first.at_once(lambda stage: 3)(stage) == 3
    assert other.at_once(lambda stage: 5)(stage) == 3


def test_what_cannot_be_read_is_made_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  """By whoever comes first; what starts from it waits, also where another command has found that it is damaged."""
  first, second = plan_stages(names_audit(), ["prefixes"])[1:3]
  done, did = [first], list[str]()

  def do(stage: Any) -> None:
    did.append(stage.name)
    if did == [second.name]:
      done.remove(first)
      raise Unreadable("cannot be read", file="memorize/000010")
    done.append(stage)
  monkeypatch.setattr(claims_module, "_keys", lambda exp, stage, cells: [stage.name])
  left = lambda *_: [stage for stage in (first, second) if stage not in done]
  with Claims(tmp_path) as claims:
    monkeypatch.setattr(claims, "_left", left)
    claims.work_through(types.SimpleNamespace(), (first, second), lambda stage: [], do)  # type: ignore[arg-type]
    assert did == [second.name, first.name, second.name]
    assert capsys.readouterr().err == "memorize/000010: cannot be read; it is made again\n"
    done.clear()
    claims._do(types.SimpleNamespace(), second, (), lambda stage: [], do, "key")  # type: ignore[arg-type]
    assert len(did) == 3


def test_logs_of_stages_become_one(tmp_path: pathlib.Path) -> None:
  row = lambda stage, step, loss: json.dumps({"stage": stage, "step": step, "loss": loss}) + "\n"
  (tmp_path / "train_log.jsonl").write_text(row("a", 1, 1.0) + row("a", 2, 9.0) + '{"stage": "a", "st')
  with Claims(tmp_path) as claims:
    for number, name in enumerate(("b", "a")):
      claims.log(name).path.write_text(row(name, 2, 2.0))
      os.utime(claims.log(name).path, (number, number))
    claims.merge_logs()
    assert not list(claims.folder.glob("*.jsonl"))
  assert (tmp_path / "train_log.jsonl").read_text() == row("a", 1, 1.0) + row("b", 2, 2.0) + row("a", 2, 2.0)


def test_status(tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError, match="has no plan of an audit"):
    status(tmp_path)
  with Claims(tmp_path) as claims:
    plan = [{"name": name, "kind": name[0], "steps": 10, "runs": runs}
            for name, runs in (("m", ["x", "y"]), ("u1", ["x"]), ("u2", ["y"]), ("u3", ["x", "y"]), ("u4", ["z"]))]
    write = lambda name, **values: (claims.folder / name).write_text(json.dumps(values))
    (claims.folder / "plan.json").write_text(json.dumps(plan))
    write("m.done.json", runs=["x", "y"], host="here", seconds=20.0)
    write("u3.done.json", runs=["x"], host="here", seconds=5.0)  # of a smaller grid
    write("u4.failed.json", error="InputError: is 0\nmore", host="there")
    assert claims.claim("u2-0123", "u2")
    text = status(tmp_path)
    assert text.startswith("Of 5 stages: 1 done, 1 running, 1 failed, 2 left. No stage of kind 'u' is done yet")
    assert "| m | 2 | 10 | done | 20 s, here |" in text and "| u4 | 1 | 10 | failed | there: InputError: is 0 |" in text
    assert f"process {os.getpid()}; last sign of life " in text and "| u3 | 2 | 10 | left |  |" in text
    write("u1.done.json", runs=["x"], host="here", seconds=600.0)
    assert "About 40 min are left with 1 command at work." in status(tmp_path)
  (tmp_path / "results.parquet").touch()
  assert status(tmp_path).startswith("All of 5 stages are done")


@pytest.mark.slow
def test_commands_that_are_killed_end_with_the_same_rows(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Three at a time, of which one dies, by SIGKILL or SIGTERM, every few seconds, and is started again."""
  grid = ("--config.unlearn.methods=('ga', 'gd')", "--config.attack.learning_rates=(1e-4, 1e-3)")
  relearn(cache, *smallest_audit(tmp_path / "whole", *grid))
  line, rng = smallest_audit(tmp_path / "shared", *grid, "--claim"), random.Random(5)
  begin = lambda: subprocess.Popen(argv(*line), env=environment(cache, JAX_NUM_CPU_DEVICES="1"),
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  commands, killed, end = [begin() for _ in range(3)], 0, time.monotonic() + 600
  while not (tmp_path / "shared" / "results.parquet").exists() and time.monotonic() < end:
    time.sleep(rng.uniform(3, 9))
    if killed < 6 and list((tmp_path / "shared" / "stages").glob("*.lease")):
      number, how = rng.randrange(3), rng.choice((signal.SIGKILL, signal.SIGTERM))
      commands[number].send_signal(how)
      out = commands[number].communicate(timeout=60)[0]
      assert commands[number].returncode in (-signal.SIGKILL, 75) or killed and not commands[number].returncode, out
      commands[number], killed = begin(), killed + 1
  for command in commands:
    out = command.communicate(timeout=300)[0]
    assert command.returncode == 0, out
  assert killed >= 3
  for name in ("answers.parquet", "results.parquet"):
    assert pq.read_table(tmp_path / "shared" / name).equals(pq.read_table(tmp_path / "whole" / name)), name
  assert summary(tmp_path / "shared") == summary(tmp_path / "whole")
  steps = [(row["stage"], row["step"]) for row in map(
      json.loads, (tmp_path / "shared" / "train_log.jsonl").read_text().splitlines())]
  assert len(steps) == len(set(steps)) > 20
