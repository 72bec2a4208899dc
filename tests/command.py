"""The `relearn` command: called in this process, or, where a test needs one, in a process of its own."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

from relearn_jax.cli import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "names.py"

# An audit of seconds: two variants, two seeds, a base that knows little.
TINY = ["--config.case.variants=(7, 1)", "--config.seeds=(0, 1)", "--config.case.num_questions=12",
        *(f"--config.arms.pretrain.{field}" for field in (
            "steps=40", "hidden_size=32", "intermediate_size=64", "num_layers=2", "num_heads=2", "num_kv_heads=2")),
        "--config.memorize.steps=30", "--config.memorize.learning_rate=0.003", "--config.unlearn.max_steps=20",
        "--config.unlearn.settings.ga.learning_rate=0.001", "--config.attack.keep_steps=(1, 2, 5)",
        "--config.attack.learning_rates=(0.0001,)",
        "--config.verdict.draws=500", "--config.checkpoint_seconds=0.5"]

Done = subprocess.CompletedProcess[str]


def relearn(cache: pathlib.Path, *arguments: Any, status: int = 0, **more: str) -> Done:
  """Calls a command in this process and asserts its exit status.

  Args:
    cache: the test run's cache.
    *arguments: the command's name and its arguments.
    status: the exit status that is expected.
    **more: environment variables; where there are any, the command gets a process of its own, see `relearn_process`.
  """
  if more:
    return relearn_process(cache, *arguments, status=status, **more)
  line, stdout, stderr = list(map(str, arguments)), io.StringIO(), io.StringIO()
  with (mock.patch.dict(os.environ, RELEARN_CACHE=str(cache)), contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr)):
    returned = main(line)
  return _asserted(subprocess.CompletedProcess(line, returned, stdout.getvalue(), stderr.getvalue()), status)


def relearn_process(cache: pathlib.Path, *arguments: Any, status: int = 0, **more: str) -> Done:
  """Runs a command as a user does, in a process with `more` in its environment, and asserts its exit status."""
  done = subprocess.run(argv(*arguments), capture_output=True, text=True, env=environment(cache, **more), timeout=600)
  return _asserted(done, status)


def without_devices(cache: pathlib.Path, lines: Sequence[Sequence[Any]], cwd: pathlib.Path = ROOT) -> list[Done]:
  """Runs command lines one after the other in one process that has no device; one that touches it has a traceback."""
  given = [list(map(str, line)) for line in lines]
  own = environment(cache, JAX_PLATFORMS="no_such_platform", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
  done = subprocess.run([sys.executable, "-m", "tests.lines"], input=json.dumps(given), capture_output=True, text=True,
                        env=own, cwd=cwd, timeout=600)
  assert done.returncode == 0, done.stderr
  return [subprocess.CompletedProcess(line, *found) for line, found in zip(given, json.loads(done.stdout), strict=True)]


def _asserted(done: Done, status: int) -> Done:
  assert done.returncode == status, done.stdout + done.stderr
  assert "Traceback" not in done.stderr, done.stderr
  return done


def environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
  """A user's environment, with this run's cache; programs are compiled as those of the tests are, and shared with them.
  """
  plain = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
  return plain | {"RELEARN_CACHE": str(cache), "JAX_NUM_CPU_DEVICES": "2"} | more


def argv(*arguments: Any) -> list[str]:
  """The command line of a process."""
  return [sys.executable, "-m", "relearn_jax", *map(str, arguments)]


def summary(workdir: pathlib.Path) -> dict[str, Any]:
  """summary.json without what two equal audits differ in: seconds, and how many devices there were."""
  values = json.loads((workdir / "summary.json").read_text())
  del values["seconds"], values["versions"]["devices"]
  return values
