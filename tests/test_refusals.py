"""Bad input of every command: refused by name, with exit status 2, before any device is touched.

All command lines run in one process that has no device. What a line reads lies below {root}; see `root`.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from . import small
from .command import CONFIG, ROOT, TINY, Done, relearn, without_devices

Damage = Callable[[pathlib.Path], None]
CONFIGS = ROOT / "configs"


def drop(name: str) -> Damage:
  return lambda folder: (folder / name).unlink()


def truncate(folder: pathlib.Path) -> None:
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder: pathlib.Path) -> None:
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_field(**fields: object) -> Damage:
  def change(folder: pathlib.Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  return change


def rename_tensor(old: str, new: str | None) -> Damage:
  def change(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = tensors.pop(old)
    if new is not None:
      tensors |= {old: kept, new: np.ones(3, np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return change


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "no-weights": (drop("model.safetensors"), ["model.safetensors"]),
    "truncated": (truncate, ["model.safetensors: ", "truncated"]),
    "pickled": (pickle_only, ["only pickled weights (pytorch_model.bin)", "save_pretrained"]),
    "gpt2": (set_field(architectures=["GPT2LMHeadModel"], model_type="gpt2"), ["config.json: ", "gpt2"]),
    "extra-tensor": (rename_tensor("model.norm.weight", "model.extra.weight"),
                     ["model.safetensors: ", "model.extra.weight"]),
    "missing-tensor": (rename_tensor("model.norm.weight", None), ["`model.norm.weight` is missing", "config.json"])}

GOOD = '{"id": 1, "prompt": "James"}'
ROWS: dict[str, tuple[list[str], str]] = {
    "empty": ([""], "empty.jsonl: has no rows"), "no-json": ([GOOD, "{"], "no-json.jsonl:2: is no JSON"),
    "no-prompt": ([GOOD, "", '{"id": 2}'], "no-prompt.jsonl:3: `prompt` is missing"),
    "long": ([GOOD, json.dumps({"id": 2, "prompt": "James " * 160})], "long.jsonl:2: `prompt` has 161 tokens")}

BROKEN = {"syntax": ("x = ", "SyntaxError"), "nothing": ("x = 1", "get_config"),
          "number": ("def get_config(): return 3", "returns int")}


def audit(*flags: str, config: str = "names", workdir: str = "x") -> list[str]:
  return ["audit", f"--config={CONFIGS / config}.py", f"--workdir={workdir}", *flags]


def unlearn(*flags: str) -> list[str]:
  return ["unlearn", f"--config={CONFIGS / 'unlearn.py'}", "--config.model=x", "--workdir=x", *flags]


def plan(*flags: str, config: str = "llama_2_7b.py") -> list[str]:
  return ["plan", f"--config={CONFIGS / config}", *flags]


def generate(*flags: str, model: str = "good", rows: str = "good") -> list[str]:
  return ["generate", f"--model={{root}}/{model}", f"--prompts={{root}}/{rows}.jsonl", "--output=out.jsonl",
          "--max_new_tokens=4", *flags]


LINES: list[tuple[list[str], list[str]]] = [
    (["audti"], ["no command 'audti'", "did you mean 'audit'"]),
    (["audit"], ["`--config` is not given"]),
    (["audit", f"--config={CONFIG}"], ["`--workdir` is not given"]),
    (["audit", "--config=none.py", "--workdir=x"], ["none.py: `--config` does not exist", "configs/names.py"]),
    (audit("surplus"), ["is not understood: surplus"]),
    (audit("--confg.seeds=(1,)"), ["confg.seeds"]),
    (audit("--config.unlearn.max_step=3"), [f"{CONFIG}: `unlearn.max_step` is no field", "nearest: unlearn.max_steps"]),
    (audit("--config.unlearn=3"), ["`unlearn` is a group of fields"]),
    (audit("--config.unlearn.methods=('gaa',)"),
     [f"{CONFIG}: `unlearn.methods` is 'gaa', which is no unlearning method", "nearest: ga",
      "expected one of ga, gd, kl, npo"]),
    (audit("--config.unlearn.methods=('npo',)", "--config.unlearn.settings.npo.beta=0"),
     [f"{CONFIG}: `unlearn.settings.npo.beta` is 0", "above 0"]),
    (audit("--config.attack.keep_steps=(5, 2)"), ["`attack.keep_steps` is (5, 2)", "expected ascending steps"]),
    *((audit(f"--config.seeds={seeds}"), [f"{CONFIG}: `seeds` is {seeds}", "expected distinct integers from 0"])
      for seeds in ("()", "(-1,)", "(1, 1)")),
    (audit("--config.case.variants=(9,)"), ["`case.variants`", "from 1 to 8"]),
    (audit(*TINY, "--mesh=fsdp:3"), ["`--mesh` has fsdp:3, which does not divide hidden_size=32"]),
    (audit(*TINY, "--mesh=tensor:4"), ["`--mesh` has tensor:4, which does not divide num_attention_heads=2"]),
    (audit("--mesh=fdsp:2"), ["has axis 'fdsp' (did you mean 'fsdp'?)"]),
    (audit(config="unlearn"), ["describes a UnlearnJob", "wants Audit"]),
    (audit("--config.unlearn.methods=('nop',)", config="methods"),
     ["'nop', which is no unlearning method (nearest: npo"]),
    *((audit(workdir=folder), [f"{folder}: `--workdir` cannot be written", "that you may write to"])
      for folder in ("{root}/file", "{root}/file/below", "/proc/relearn")),
    *((["audit", f"--config={{root}}/{name}.py", "--workdir=x"], [f"{{root}}/{name}.py", why])
      for name, (_, why) in BROKEN.items()),
    (["sweep", f"--config={CONFIGS / 'sweep.py'}", "--workdir=x", "--config.methods=('nop',)"],
     ["`methods` has 'nop', for which there is no grid"]),
    (["report", "--workdir=/nonexistent"], ["/nonexistent/results.parquet: does not exist", "run `relearn audit`"]),
    (["export", "--checkpoint=/nonexistent", "--output=x"],
     ["/nonexistent: is not a complete checkpoint", "WORKDIR/checkpoints/unlearn/000040"]),
    (["unlearn", f"--config={CONFIG}", "--workdir=x"], ["describes a Audit, and this command wants UnlearnJob"]),
    (unlearn("--config.stepz=5"), ["`stepz` is no field of the configuration (nearest: steps"]),
    (unlearn("--config.method=rmu", "--config.methods.rmu.depth=1.5"),
     ["`methods.rmu.depth` is 1.5; expected a finite number above 0 and at most 1"]),
    (unlearn("--config.method=rmu", "--config.methods.rmu.dept=1"),
     ["`methods.rmu.dept` is no field of the configuration"]),
    (plan("--device=h300"), ["`--device` is 'h300'"]), (plan("--device=cpu"), ["give --memory_gib"]),
    (plan("--mesh=fsdp:3", "--num_devices=3"), ["`--mesh` has fsdp:3, which does not divide hidden_size=4096"]),
    (plan("--mesh=fsdp:2"), ["needs 2 devices, and there is 1"]), (plan("--num_devices=0"), ["`--num_devices` is 0"]),
    *((plan(f"--{size}=0"), [f"`--{size}` is 0; expected at least 1"]) for size in ("rows", "length", "counted")),
    (plan("--config.remat=ful"), ["`remat` is 'ful'"]),
    (plan("--config.adapter.kind=lora", "--config.adapter.targets=('q',)"), ["`adapter.targets` has 'q'"]),
    (plan(config="phi_1_5.py:unlern"), ["is 'unlern'; expected unlearn or audit"]),
    (["generate", "--model=x", "--prompts=y"], ["`--output` is not given"]),
    (generate("--max_new_tokens=0"), ["`--max_new_tokens` is 0; expected at least 1"]),
    (generate("--mesh=fdsp:2"), ["has axis 'fdsp' (did you mean 'fsdp'?)"]),
    (["score", "--model={root}/good", "--data={root}/good.jsonl", "--output=out.jsonl"],
     ["good.jsonl:1: `answer` is missing"]),
    *((generate(rows=name), ["{root}/" + message]) for name, (_, message) in ROWS.items()),
    *((generate(model=name), [f"{{root}}/{name}", *message]) for name, (_, message) in DAMAGES.items())]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A good checkpoint and damaged ones, files of rows, configuration files, and a file that is no folder."""
  folder = tmp_path_factory.mktemp("refusals")
  small.write_checkpoint(folder / "good")
  for name, (damage, _) in DAMAGES.items():
    (folder / name).mkdir()
    for file in (folder / "good").iterdir():
      (folder / name / file.name).write_bytes(file.read_bytes())
    damage(folder / name)
  for name, rows in {"good": [GOOD], **{name: rows for name, (rows, _) in ROWS.items()}}.items():
    (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
  for name, (content, _) in BROKEN.items():
    (folder / f"{name}.py").write_text(content)
  (folder / "file").touch()
  return folder


@pytest.fixture(scope="module")
def done(cache: pathlib.Path, root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Done]:
  """What comes of every line in an empty folder, and at last of one that nothing is wrong with."""
  cwd = tmp_path_factory.mktemp("empty")
  lines = [*(line for line, _ in LINES), generate()]
  found = without_devices(cache, [[part.format(root=root) for part in line] for line in lines], cwd)
  assert not list(cwd.iterdir())
  return found


@pytest.mark.parametrize("number", range(len(LINES)), ids=lambda number: " ".join(LINES[number][0])[-60:])
def test_bad_input_is_named_before_a_device_is_touched(done: Sequence[Done], root: pathlib.Path, number: int) -> None:
  found, message = done[number], [part.format(root=root) for part in LINES[number][1]]
  assert found.returncode == 2 and not found.stdout, found.stdout + found.stderr
  assert all(part in found.stderr for part in message), found.stderr


def test_a_line_that_touches_a_device_is_seen(done: Sequence[Done]) -> None:
  assert done[-1].returncode == 1 and "no_such_platform" in done[-1].stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_closed_workdir_is_named(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "closed"
  folder.mkdir(mode=0o500)
  assert f"{folder}: `--workdir` cannot be written" in relearn(cache, *audit(workdir=str(folder)), status=2).stderr
