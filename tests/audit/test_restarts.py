"""A killed audit goes on to the same numbers, wherever it was; and nobody else works in its folder meanwhile."""

import json
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from relearn_jax.audit import acquire, pipeline
from relearn_jax.report import render
from relearn_jax.training.log import StageLog

from ..command import argv, environment, relearn, summary
from .tiny import audit_flags

ATTACK = "attack-ga-prefixes-full-seed"


def assert_alike(workdir: pathlib.Path, finished: pathlib.Path) -> None:
  """A workdir holds what that of an audit without interruption holds, each step once."""
  assert summary(workdir) == summary(finished)
  assert (workdir / "report.md").exists() and not list((workdir / "checkpoints").rglob("resume"))
  rows = map(json.loads, (workdir / "train_log.jsonl").read_text().splitlines())
  steps = [(row["stage"], row["step"]) for row in rows]
  assert len(steps) == len(set(steps))


def logged(workdir: pathlib.Path, stage: str, step: int) -> Callable[[], bool]:
  """Whether a stage has reached a step."""
  def reached() -> bool:
    path = workdir / "train_log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(f'"stage": "{stage}", "step": {step},' in line for line in lines)
  return reached


def kill_when(reached: Callable[[], bool], cache: pathlib.Path, workdir: pathlib.Path) -> None:
  """Starts or continues the audit and kills it, with SIGKILL, as soon as `reached`."""
  process = subprocess.Popen(argv(*audit_flags(workdir)), env=environment(cache), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
  end = time.monotonic() + 300
  while not reached():
    assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[0]}"
    assert time.monotonic() < end
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_it_ends_with_the_same_summary(finished: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path,
                                              number: int) -> None:
  """Between kept steps of unlearning; while it memorises, within an attack, and between the last answers and rows."""
  folder = tmp_path / "killed"
  moments: list[Callable[[], bool]] = [
      logged(folder, "memorize", 27), logged(folder, "unlearn-ga", 12), logged(folder, f"{ATTACK}0", 3),
      (folder / "checkpoints" / f"{ATTACK}1" / "answers" / "000005.npz").exists]
  for reached in moments[1:2] if number == 1 else moments:
    kill_when(reached, tmp_path / "cache", folder)
    assert not (folder / "report.html").exists()
  relearn(tmp_path / "cache", *audit_flags(folder))
  assert_alike(folder, finished)


class Stopped(BaseException):
  """What a test raises in place of a kill; nothing in the package catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, reached: Callable[..., bool]) -> None:
  """Lets a function of the package raise after it has done what it does, the first time that its arguments say so."""
  real = getattr(where, name)

  def stops(*args: Any, **kwargs: Any) -> Any:
    result = real(*args, **kwargs)
    if reached(*args, **kwargs):
      raise Stopped
    return result
  monkeypatch.setattr(where, name, stops)


@pytest.mark.slow  # at the moment that matters most, the one above kills it
def test_stopped_it_ends_with_the_same_summary(finished: pathlib.Path, tmp_path: pathlib.Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
  """At the other moments: while the base is trained, after answers, later in an attack, between files of results."""
  folder = tmp_path / "stopped"
  at = lambda stage, step: lambda log, number, *_: (log.stage, number) == (stage, step)
  moments: list[tuple[Any, str, Callable[..., bool]]] = [
      (StageLog, "add", at("pretrain", 10)),
      (acquire, "save_answers", lambda path, _: path.parts[-3:] == ("unlearn-ga", "answers", "000005.npz")),
      (StageLog, "add", at("unlearn-ga", 12)),  # which it goes on from: what was asked at 5 and 10 is not asked again
      (StageLog, "add", at(f"{ATTACK}1", 4)),
      (pipeline, "write_rows", lambda path, *_: path == folder / "answers.parquet"),
      (pipeline, "write_rows", lambda path, *_: path == folder / "results.parquet"),
      (render, "write_atomically", lambda path, _: path == folder / "summary.json")]
  for where, name, reached in moments:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
      stop_after(patch, where, name, reached)
      relearn(tmp_path / "cache", *audit_flags(folder, "--config.checkpoint_seconds=0"))
    assert not (folder / "report.html").exists()
  relearn(tmp_path / "cache", *audit_flags(folder))
  assert_alike(folder, finished)


def test_two_audits_do_not_share_a_workdir(cache: pathlib.Path, tmp_path: pathlib.Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
  """While one trains, another is refused, before it asks for a device."""
  def meanwhile(*_: Any) -> None:
    done = relearn(cache, *audit_flags(tmp_path), status=2, JAX_PLATFORMS="no_such_platform")
    assert "is in use by another process" in done.stderr
    raise Stopped
  monkeypatch.setattr(acquire, "memorize", meanwhile)
  with pytest.raises(Stopped):
    relearn(cache, *audit_flags(tmp_path))
