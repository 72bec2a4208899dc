"""The command line: help, and bad input refused by name before any device is touched."""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relearn_jax.cli import COMMANDS

from . import small
from .command import CONFIG, relearn

NO_DEVICE = {"JAX_PLATFORMS": "no_such_platform"}  # a process that touches a device fails with a traceback


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return small.write_checkpoint(tmp_path_factory.mktemp("model") / "good")


@pytest.fixture
def copy(model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A checkpoint to damage."""
  folder = tmp_path / "bad"
  folder.mkdir()
  for file in model.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


def prompts(folder: pathlib.Path, *rows: str) -> pathlib.Path:
  path = folder / "prompts.jsonl"
  path.write_text("".join(row + "\n" for row in rows or ('{"id": 1, "prompt": "James"}',)))
  return path


def generate(cache: pathlib.Path, model: pathlib.Path | str, rows: pathlib.Path, *more: str) -> str:
  """The message of a refused `relearn generate`."""
  output = rows.parent / "out.jsonl"
  done = relearn(cache, "generate", f"--model={model}", f"--prompts={rows}", f"--output={output}",
                 "--max_new_tokens=4", *more, status=2, **NO_DEVICE)
  assert not output.exists() and not done.stdout
  return done.stderr


def test_help_lists_commands_flags_and_fields(cache: pathlib.Path) -> None:
  shown = relearn(cache, "--help", **NO_DEVICE).stdout
  assert all(f"  {name} " in shown for name in ("audit", "report", "generate", "score", "export"))
  for name, flag in (("audit", "--workdir"), ("report", "--workdir"), ("generate", "--max_new_tokens"),
                     ("score", "--data"), ("export", "--checkpoint")):
    assert flag in relearn(cache, name, "--help", **NO_DEVICE).stdout
    assert COMMANDS[name].summary in shown
  shown = relearn(cache, "audit", f"--config={CONFIG}", "--help", **NO_DEVICE).stdout
  assert "method = 'ga'" in shown and "relearn.learning_rates = (0.0001,)" in shown
  assert "usage:" in relearn(cache, status=2, **NO_DEVICE).stdout


@pytest.mark.parametrize("arguments,message", [
    (["audti"], ["no command 'audti'", "did you mean 'audit'"]),
    (["audit"], ["`--config` is not given"]),
    (["audit", f"--config={CONFIG}"], ["`--workdir` is not given"]),
    (["audit", "--config=none.py", "--workdir=x"], ["none.py: `--config` does not exist", "configs/names.py"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.unlearn.max_step=3"],
     [f"{CONFIG}: `unlearn.max_step` is no field", "nearest: unlearn.max_steps"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.unlearn=3"], ["`unlearn` is a group of fields"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.method=gaa"],
     [f"{CONFIG}: `method` is 'gaa', which is no unlearning method", "nearest: ga", "expected one of ga, gd, kl, npo"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.method=npo", "--config.methods.npo.beta=0"],
     [f"{CONFIG}: `methods.npo.beta` is 0", "above 0"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.relearn.keep_steps=(5, 2)"],
     ["`relearn.keep_steps` is (5, 2)", "expected ascending steps"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--config.case.variants=(9,)"], ["`case.variants`", "from 1 to 8"]),
    (["audit", f"--config={CONFIG}", "--workdir=x", "--confg.method=ga"], ["confg.method"]),
    (["generate", "--model=x", "--prompts=y"], ["`--output` is not given"]),
    (["report", "--workdir=/nonexistent"], ["/nonexistent/results.parquet: does not exist", "run `relearn audit`"]),
    (["export", "--checkpoint=/nonexistent", "--output=x"],
     ["/nonexistent: is not a complete checkpoint", "WORKDIR/checkpoints/unlearn/000040"])])
def test_bad_arguments_are_named(cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                 arguments: list[str], message: list[str]) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PYTHONPATH", str(CONFIG.parents[1]))
  shown = relearn(cache, *arguments, status=2, **NO_DEVICE).stderr
  assert all(part in shown for part in message), shown
  assert not list(tmp_path.iterdir())


def test_a_broken_configuration_file_is_named(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  for content, why in (("x = ", "SyntaxError"), ("x = 1", "get_config"), ("def get_config(): return 3", "returns int")):
    file = tmp_path / "config.py"
    file.write_text(content)
    shown = relearn(cache, "audit", f"--config={file}", "--workdir=x", status=2, **NO_DEVICE).stderr
    assert str(file) in shown and why in shown


def test_a_workdir_that_cannot_be_written_is_named(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").touch()
  for workdir in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/relearn")):
    shown = relearn(cache, "audit", f"--config={CONFIG}", f"--workdir={workdir}", status=2, **NO_DEVICE).stderr
    assert f"{workdir}: `--workdir` cannot be written" in shown and "that you may write to" in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_closed_workdir_is_named(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "closed"
  folder.mkdir(mode=0o500)
  shown = relearn(cache, "audit", f"--config={CONFIG}", f"--workdir={folder}", status=2, **NO_DEVICE).stderr
  assert f"{folder}: `--workdir` cannot be written" in shown


def test_bad_rows_are_named(cache: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  good = '{"id": 1, "prompt": "James"}'
  for rows, message in (
      ([""], "prompts.jsonl: has no rows"), ([good, "{"], "prompts.jsonl:2: is no JSON"),
      ([good, "", '{"id": 2}'], "prompts.jsonl:3: `prompt` is missing"),
      ([good, json.dumps({"id": 2, "prompt": "James " * 160})], "prompts.jsonl:2: `prompt` has 161 tokens")):
    assert message in generate(cache, model, prompts(tmp_path, *rows))


def drop(name: str) -> Callable[[pathlib.Path], None]:
  return lambda folder: (folder / name).unlink()


def truncate(folder: pathlib.Path) -> None:
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder: pathlib.Path) -> None:
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_field(**fields: object) -> Callable[[pathlib.Path], None]:
  def change(folder: pathlib.Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  return change


def rename_tensor(old: str, new: str | None) -> Callable[[pathlib.Path], None]:
  def change(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = tensors.pop(old)
    if new is not None:
      tensors |= {old: kept, new: np.ones(3, np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return change


def more_words(folder: pathlib.Path) -> None:
  file = folder / "tokenizer.json"
  values = json.loads(file.read_text())
  values["model"]["vocab"] |= {f"extra{i}": 162 + i for i in range(9)}
  file.write_text(json.dumps(values))


@pytest.mark.parametrize("damage,message", [
    (drop("model.safetensors"), ["model.safetensors"]),
    (truncate, ["model.safetensors: ", "truncated"]),
    (pickle_only, ["only pickled weights (pytorch_model.bin)", "save_pretrained"]),
    (set_field(architectures=["GPT2LMHeadModel"], model_type="gpt2"), ["config.json: ", "gpt2"]),
    (rename_tensor("model.norm.weight", "model.extra.weight"), ["model.safetensors: ", "model.extra.weight"]),
    (rename_tensor("model.norm.weight", None), ["`model.norm.weight` is missing", "config.json"]),
    (more_words, ["config.json: `vocab_size` is 162", "needs 171 ids"])])
def test_bad_checkpoints_are_named(cache: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path,
                                   damage: Callable[[pathlib.Path], None], message: list[str]) -> None:
  damage(copy)
  shown = generate(cache, copy, prompts(tmp_path))
  assert str(copy) in shown and all(part in shown for part in message), shown
