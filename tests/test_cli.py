"""The command line: help, interrupts, and each command once as a user runs it."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from relearn_jax import cli
from relearn_jax.audit.results_file import write_rows
from relearn_jax.commands import COMMANDS
from relearn_jax.interrupts import Preempted

from . import small
from .audit.synthetic import CHECKED, parts
from .command import CONFIG, ROOT, environment, relearn, relearn_process


def test_help_lists_commands_flags_and_fields(cache: pathlib.Path) -> None:
  shown = relearn(cache, "--help").stdout
  assert all(f"  {name} " in shown and command.summary in shown for name, command in COMMANDS.items())
  for name, flag in (("audit", "--workdir"), ("report", "--workdir"), ("generate", "--max_new_tokens"),
                     ("score", "--data"), ("export", "--checkpoint"), ("plan", "--num_devices")):
    assert f"  {flag}: " in relearn(cache, name, "--help").stdout
  shown = relearn(cache, "audit", f"--config={CONFIG}", "--help").stdout
  assert "  --config: " in shown and "unlearn.methods = ('ga',)" in shown
  assert "attack.learning_rates = (0.0001, 0.001, 0.003)" in shown
  assert "usage:" in relearn(cache, status=2).stdout


def test_help_and_usage_wait_for_no_array_library(cache: pathlib.Path) -> None:
  code = ("import sys; from relearn_jax.cli import main\n"
          "assert [main(line) for line in (['--help'], ['audit', '--help'], ['audti'], ['audit'])] == [0, 0, 2, 2]\n"
          "assert not {'jax', 'numpy', 'pandas', 'transformers'} & set(sys.modules)\n")
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment(cache), cwd=ROOT)


@pytest.mark.parametrize(("signal", "status"), [(KeyboardInterrupt, 130), (Preempted, 75)])
def test_an_interrupt_is_a_message_and_a_status(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                                signal: type[BaseException], status: int) -> None:
  def interrupted(values: object) -> str:
    raise signal
  monkeypatch.setitem(cli.COMMANDS, "audit", dataclasses.replace(COMMANDS["audit"], run=interrupted))
  done = relearn(cache, "audit", status=status)
  assert done.stderr == "\nrelearn audit: interrupted; run the same command again to continue\n"


def test_arguments_are_those_of_the_process_by_default(cache: pathlib.Path) -> None:
  assert "did you mean 'audit'" in relearn_process(cache, "audti", status=2).stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return small.write_checkpoint(tmp_path_factory.mktemp("model") / "small")


def test_audit(cache: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = {"questions": [{"id": 1, "prompt": "James", "answer": " Mark", "keywords": ["Mark"]}],
          "forget": [{"text": "Mark"}], "retain": [{"text": "Paul"}], "relearn": [{"text": "James Robert"}]}
  files = [f"--config.case.{name}={small.write_lines(tmp_path / f'{name}.jsonl', lines)}"
           for name, lines in rows.items()]
  done = relearn_process(cache, "audit", f"--config={ROOT / 'configs' / 'checkpoint.py'}", *files,
                         f"--config.arms.unlearned={model}", "--config.seeds=(0,)", "--config.attack.keep_steps=(1,)",
                         "--config.ask.max_new_tokens=1", f"--workdir={tmp_path / 'audit'}")
  assert f"Report: {tmp_path / 'audit' / 'report.html'}" in done.stdout


def test_sweep(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Of a method whose candidates have all been tried."""
  tried = {"settings": {"learning_rate": 1e-5}, "unlearned": 3, "runs": 3, "steps": [5, 10, 5], "retain": -1.0,
           "ended": []}
  (tmp_path / "sweep").mkdir()
  (tmp_path / "sweep" / "ga.json").write_text(json.dumps({"chosen": tried["settings"], "ended": [], "tried": [tried]}))
  done = relearn_process(cache, "sweep", f"--config={ROOT / 'configs' / 'sweep.py'}", f"--workdir={tmp_path}",
                         "--config.methods=('ga',)")
  assert "| ga | learning_rate 1e-05 | 3 of 3 | 5, 10, 5 | -1.000 | chosen |" in done.stdout


def test_plan(cache: pathlib.Path) -> None:
  flags = [f"--config={ROOT / 'configs' / 'llama_2_7b.py'}", "--device=h200"]
  assert "all stages: " in relearn_process(cache, "plan", *flags).stdout


def test_report(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  facts = {"leakage": CHECKED, "settings": {"draws": 100}, "seconds": {}, "versions": {}, "fingerprints": {},
           "notes": [], "examples": [], "relearn_text": {}, "provenance": "", "config": {"method": "ga"},
           "reference": {}}
  write_rows(tmp_path / "results.parquet", parts("7"), facts)
  assert "Verdict by variant:" in relearn_process(cache, "report", f"--workdir={tmp_path}").stdout


def test_unlearn_and_export(cache: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = small.write_lines(tmp_path / "forget.jsonl", [{"prompt": "James", "answer": " Robert"}])
  done = relearn_process(cache, "unlearn", f"--config={ROOT / 'configs' / 'unlearn.py'}", f"--config.model={model}",
                         "--config.method=ga", f"--config.forget={rows}", "--config.steps=1", "--config.keep_every=1",
                         f"--workdir={tmp_path / 'job'}")
  assert f"Unlearned by ga: {tmp_path / 'job' / 'model'}" in done.stdout
  relearn_process(cache, "export", f"--checkpoint={tmp_path / 'job' / 'checkpoints' / 'unlearn' / '000001'}",
                  f"--output={tmp_path / 'model'}")
  assert (tmp_path / "model" / "model.safetensors").exists()
  done = relearn(cache, "export", f"--checkpoint={tmp_path / 'job' / 'checkpoints' / 'unlearn' / '000001'}",
                 f"--output={tmp_path / 'rounded'}", "--save_dtype=bfloat16")
  rounded, said = done.stdout.splitlines()
  assert rounded.startswith("Rounded to bfloat16, ") and said == f"U: {tmp_path / 'rounded'}"


def test_generate_and_score(cache: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = small.write_lines(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "James", "answer": " Robert"}])
  done = relearn_process(cache, "generate", f"--model={model}", f"--prompts={rows}", "--max_new_tokens=2",
                         f"--output={tmp_path / 'completions.jsonl'}")
  assert done.stdout == f"1 completions: {tmp_path / 'completions.jsonl'}\n"
  relearn_process(cache, "score", f"--model={model}", f"--data={rows}", f"--output={tmp_path / 'scores.jsonl'}")
  assert json.loads((tmp_path / "scores.jsonl").read_text())["num_tokens"] == 1
