"""Commands on several processes of this machine, as a user starts them; and the smallest of audits."""

import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ..audit.tiny import audit_flags
from ..command import ROOT, argv, environment

LAUNCH = [sys.executable, str(ROOT / "launch" / "processes" / "run.py")]
# One variant, two seeds, a model of one layer that knows little. Batches are smaller than their data sets, whose rows
# come in an order, so that whoever goes on must know how far in it the others were.
SMALLEST = [
    "--config.case.variants=(7,)", "--config.case.num_questions=6", "--config.memorize.steps=10",
    "--config.unlearn.max_steps=10", "--config.unlearn.depths=1", "--config.attack.keep_steps=(1, 3)",
    "--config.unlearn.batch_size=3", "--config.attack.batch_size=3", "--config.verdict.draws=100",
    "--config.checkpoint_seconds=0",
    *(f"--config.arms.pretrain.{field}" for field in (
        "steps=20", "warmup_steps=2", "hidden_size=16", "intermediate_size=32", "num_layers=1"))]


def smallest_audit(workdir: pathlib.Path, *more: str) -> list[str]:
  """The command line of an audit with every stage, of two runs and more."""
  return audit_flags(workdir, *SMALLEST, *more)


def launch(number: int, cache: pathlib.Path, logs: pathlib.Path, arguments: Sequence[Any]) -> subprocess.Popen[str]:
  """Starts a command on some processes with a device each."""
  return subprocess.Popen([*LAUNCH, "-n", str(number), f"--logs={logs}", "--", *argv(*arguments)], cwd=ROOT, text=True,
                          env=environment(cache, JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def launched(number: int, cache: pathlib.Path, logs: pathlib.Path, arguments: Sequence[Any], status: int = 0) -> str:
  """What a command on some processes shows; its exit status is asserted, and that nothing of it is a traceback."""
  process = launch(number, cache, logs, arguments)
  out, _ = process.communicate(timeout=500)
  every = out + "".join(log.read_text(errors="replace") for log in sorted(logs.glob("*.log")))
  assert process.returncode == status and "Traceback" not in every, every
  return out
