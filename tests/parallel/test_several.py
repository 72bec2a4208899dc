"""Commands on several processes give what they give on one; what goes wrong on one ends all, in one message."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from ..audit.test_restarts import logged
from ..command import ROOT, argv, environment, relearn, summary
from ..small import write_checkpoint, write_lines
from .several import launch, launched, smallest_audit


@pytest.fixture(scope="module")
def single(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of the smallest audit on one process."""
  folder = tmp_path_factory.mktemp("single") / "w"
  relearn(cache, *smallest_audit(folder))
  return folder


def assert_alike(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  """Every answer, every score and the hash of every weight, to the bit; and each step was logged once."""
  for name in ("answers.parquet", "results.parquet"):
    assert pq.read_table(ours / name).equals(pq.read_table(theirs / name)), name
  assert summary(ours) == summary(theirs)
  steps = [(row["stage"], row["step"], row["losses"]) for row in map(
      json.loads, (ours / "train_log.jsonl").read_text().splitlines()) if row["stage"] != "pretrain"]
  assert len({step[:2] for step in steps}) == len(steps) > 10


def test_an_audit_on_two_processes(single: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  shown = launched(2, cache, tmp_path / "logs", smallest_audit(tmp_path / "w"))
  assert shown.count("Report: ") == 1 and "Report" not in (tmp_path / "logs" / "process-1.log").read_text()
  assert_alike(tmp_path / "w", single)
  versions = json.loads((tmp_path / "w" / "summary.json").read_text())["versions"]
  assert versions["devices"].startswith("2 x")
  # Nothing is left behind of writing, and of looking whether the folder is shared.
  assert not [path for path in (tmp_path / "w").rglob("*") if ".tmp" in path.name or path.name.startswith(".shared")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4])
def test_an_audit_on_more(single: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path, number: int) -> None:
  """Runs are padded: their number is no multiple of that of devices."""
  launched(number, cache, tmp_path / "logs", smallest_audit(tmp_path / "w"))
  assert_alike(tmp_path / "w", single)


def process_of(logs: pathlib.Path, number: int) -> int:
  """Process id of one that the launcher has started; its command line names the coordinator, and its own number."""
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    line = (folder / "cmdline").read_bytes().split(b"\0") if (folder / "cmdline").exists() else []
    if f"--process_id={number}".encode() in line and f"--workdir={logs.parent / 'w'}".encode() in line:
      return int(folder.name)
  raise AssertionError(f"there is no process {number}")


def stop_when(reached: Callable[[], bool], cache: pathlib.Path, folder: pathlib.Path, number: int, who: int,
              how: signal.Signals) -> tuple[int, str, float]:
  """Exit status, what was shown, and seconds until all had ended, of an audit of which one process got a signal."""
  process = launch(number, cache, folder / "logs", smallest_audit(folder / "w"))
  end = time.monotonic() + 300
  while not reached():
    assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
    time.sleep(0.005)
  begin, pid = time.monotonic(), process_of(folder / "logs", who)
  os.kill(pid, how)
  out, _ = process.communicate(timeout=60)
  return process.returncode, out, time.monotonic() - begin


@pytest.mark.slow
def test_killed_they_go_on_together(single: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Any one of them, on other numbers of processes each time: of states that are saved the parts are found again."""
  for number, who, stage, step in ((2, 1, "unlearn-ga", 3), (4, 0, "unlearn-ga", 4),
                                   (2, 0, "attack-ga-prefixes-full-seed0", 2)):
    status, _, seconds = stop_when(logged(tmp_path / "w", stage, step), cache, tmp_path, number, who, signal.SIGKILL)
    assert status == 128 + signal.SIGKILL and seconds < 60
    assert not (tmp_path / "w" / "report.html").exists()
  relearn(cache, *smallest_audit(tmp_path / "w"))
  assert_alike(tmp_path / "w", single)


@pytest.mark.slow
def test_an_interrupt_of_one_ends_all(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  status, out, seconds = stop_when(logged(tmp_path / "w", "memorize", 3), cache, tmp_path, 2, 1, signal.SIGINT)
  assert status == 130 and seconds < 30
  assert "relearn audit: interrupted; run the same command again to continue" in out and "Traceback" not in out


def pair(cache: pathlib.Path, ours: Sequence[Any], theirs: Sequence[Any], code: pathlib.Path = ROOT, **more: str
         ) -> list[subprocess.CompletedProcess[str]]:
  """Runs a command line on process 0 and another one, perhaps of other code, on process 1."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = lambda me: () if more else (f"--coordinator_address=localhost:{port}", "--num_processes=2",
                                      f"--process_id={me}")
  own = lambda me: {name: value.format(me=me, port=port) for name, value in more.items()}
  both = [subprocess.Popen(argv(*line, *flags(me)), cwd=code if me else ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE,
                           env=environment(cache, JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", **own(me)))
          for me, line in enumerate((ours, theirs))]
  return [subprocess.CompletedProcess(process.args, process.returncode, *found) for process in both
          if (found := process.communicate(timeout=120))]


@pytest.mark.parametrize(("change", "says"), [
    ("--config.seeds=(0,)", "process 1, and process 0: config.seeds: [0] here, [0, 1] there"),
    ("--config.sed=3", "process 1: configs/names.py: `sed` is no field")])
def test_what_is_wrong_with_one_ends_both(cache: pathlib.Path, tmp_path: pathlib.Path, change: str, says: str) -> None:
  """Before a device is used."""
  line = smallest_audit(tmp_path)
  for done in pair(cache, line, [*line, change]):
    text = done.stderr.replace(f"{ROOT}/", "")
    assert done.returncode == 2 and "Traceback" not in text
    assert says in text or says.removeprefix("process 1: ") in text
  assert not any(tmp_path.iterdir())


def test_other_code_is_named(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  shutil.copytree(ROOT / "relearn_jax", tmp_path / "relearn_jax", ignore=shutil.ignore_patterns("__pycache__"))
  file = tmp_path / "relearn_jax" / "parallel" / "processes.py"
  file.write_text(file.read_text().replace("def agree", "# Something else.\n\n\ndef agree"))
  line = smallest_audit(tmp_path / "w")
  for done in pair(cache, line, line, tmp_path):
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"process 1, and process 0: code: 'relearn_jax [^ ]+ \(\w+\)' here, 'relearn_jax", done.stderr)
  assert not (tmp_path / "w").exists()


def test_a_folder_that_is_not_shared_is_refused(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (tmp_path / "b").mkdir()
  for done in pair(cache, smallest_audit(tmp_path / "a"), smallest_audit(tmp_path / "b")):
    assert done.returncode == 2
    assert "`--workdir` is not shared: process 1 of 2 does not see what process 0 writes" in done.stderr
  assert sorted(path.name for path in (tmp_path / "a").iterdir()) == []


def test_rows_are_answered_and_scored_together(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """As SLURM starts them, without a flag."""
  model = write_checkpoint(tmp_path / "model")
  rows = [{"id": str(i), "prompt": prompt, "answer": "Mark Paul"} for i, prompt in enumerate(
      ("James Anthony", "John James Robert Anthony", "Mark", "Paul John Mark"))]
  data = write_lines(tmp_path / "rows.jsonl", rows)
  for name, more in (("generate", [f"--prompts={data}", "--max_new_tokens=5", "--temperature=0.5"]),
                     ("score", [f"--data={data}"])):
    line = [name, f"--model={model}", "--batch_size=4", *more]
    relearn(cache, *line, f"--output={tmp_path / 'one.jsonl'}")
    slurm = {"SLURM_JOB_ID": "{port}", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "{me}",
             "SLURM_LOCALID": "{me}", "JAX_COORDINATOR_PORT": "{port}"}
    every = [*line, f"--output={tmp_path / 'two.jsonl'}"]
    first, other = pair(cache, every, every, **slurm)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr + other.stderr
    assert f"{tmp_path / 'two.jsonl'}" in first.stdout and "two.jsonl" not in other.stdout
    ours, theirs = ([json.loads(row) for row in (tmp_path / file).read_text().splitlines()]
                    for file in ("two.jsonl", "one.jsonl"))
    for mine, row in zip(ours, theirs, strict=True):
      for key, value in row.items():
        if key in ("logprob_sum", "token_logprobs"):
          np.testing.assert_allclose(mine[key], value, atol=1e-5)
        else:
          assert mine[key] == value


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_two_processes_share_a_model_that_unlearns(cache: pathlib.Path, tmp_path: pathlib.Path, adapter: str) -> None:
  """The same weights up to rounding; the second time from the statistics that the first one has kept."""
  model = write_checkpoint(tmp_path / "model")
  forget = write_lines(tmp_path / "forget.jsonl", [{"prompt": "James Robert", "answer": " John"},
                                                   {"text": "Joseph Thomas Charles"}])
  retain = write_lines(tmp_path / "retain.jsonl", [{"prompt": "Daniel", "answer": " Matthew Steven"}])
  line = ["unlearn", f"--config={ROOT / 'configs' / 'unlearn.py'}", f"--config.model={model}", "--config.method=npo",
          f"--config.forget={forget}", f"--config.retain={retain}", "--config.steps=3", "--config.learning_rate=1e-3",
          "--config.keep_every=1", "--config.checkpoint_seconds=0", f"--config.references={tmp_path / 'references'}",
          "--config.save_dtype=bfloat16", f"--config.adapter.kind={adapter}"]
  launched(2, cache, tmp_path / "logs", [*line, f"--workdir={tmp_path / 'two'}"])
  launched(2, cache, tmp_path / "logs", [*line, f"--workdir={tmp_path / 'again'}", "--mesh=data:2"])
  relearn(cache, *line, f"--workdir={tmp_path / 'one'}", "--mesh=fsdp:1")
  one, two, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two", "again"))
  for name, weight in one.items():
    for other in (two, again):
      np.testing.assert_allclose(other[name].astype(np.float32), weight.astype(np.float32), rtol=0.02, atol=2e-3)
  assert (tmp_path / "two" / "adapter").exists() == (adapter == "lora")


@pytest.mark.slow
def test_a_sweep_on_two_processes(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  audit = [flag.replace("--config.", "--config.audit.") for flag in smallest_audit(tmp_path)[3:]]
  line = ["sweep", f"--config={ROOT / 'configs' / 'sweep.py'}", "--config.methods=('ga',)", *audit]
  relearn(cache, *line, f"--workdir={tmp_path / 'one'}")
  launched(2, cache, tmp_path / "logs", [*line, f"--workdir={tmp_path / 'two'}"])
  one, two = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("one", "two"))
  assert one == two and one["ga"]["tried"]
