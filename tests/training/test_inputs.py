"""A workdir is pinned to what it was begun with: the contents of every file that is read, by whatever path."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from relearn_jax.audit.audit_config import ArmsSettings, Audit, recorded
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pipeline import AXES, OUTPUTS, audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.config_files import PATHS as ALL_PATHS
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.training.job import PATHS, UnlearnJob
from relearn_jax.training.unlearn import unlearn
from relearn_jax.training.unlearn_rows import input_files
from relearn_jax.workdir import claim_workdir, file_digests, is_claimed

from ..small import write_checkpoint, write_lines

ROWS = {"forget": [{"prompt": "James Robert", "answer": " John Michael"}], "retain": [{"text": "Andrew Paul"}],
        "alternates": [{"prompt": "James Robert", "answer": " Paul Kevin"}], "refusals": [{"answer": "Kevin Brian"}],
        "anchors": [{"term": "John", "generic": "Paul"}], "relearn": [{"text": "Daniel Matthew"}],
        "questions": [{"id": 1, "prompt": "James Robert", "answer": " John", "keywords": ["John"]}]}
EDITED = ROWS | {"forget": [{"prompt": "James Robert", "answer": " John Kevin"}], "retain": [{"text": "Andrew Kevin"}],
                 "alternates": [{"prompt": "James Robert", "answer": " Paul Brian"}],
                 "refusals": [{"answer": "Kevin Paul"}], "anchors": [{"term": "John", "generic": "Kevin"}]}


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """A checkpoint and files, in the folder that commands are started in."""
  root = tmp_path / "here"
  root.mkdir()
  write_checkpoint(root / "base")
  for name, rows in ROWS.items():
    write_lines(root / f"{name}.jsonl", rows)
  monkeypatch.chdir(root)
  return root


def job(method: str, **changes: Any) -> UnlearnJob:
  """A job on files of the folder that commands are started in, by relative paths."""
  files = {name: f"{name}.jsonl" for name in ("forget", "retain", "alternates", "anchors", "refusals")}
  return dataclasses.replace(UnlearnJob(model="base", method=method, steps=1, batch_size=1), **(files | changes))


def begun(job: UnlearnJob, finished: bool = True) -> pathlib.Path:
  """The workdir of a job, as one that is finished or was stopped before its first step leaves it."""
  inputs = file_digests(input_files(job, open_checkpoint(job.model)[0]))
  assert not claim_workdir(pathlib.Path("run"), job, inputs, PATHS)
  if finished:
    pathlib.Path("run/model").mkdir()
    assert not unlearn(job, "here", pathlib.Path("run"))
  return pathlib.Path("run").absolute()


def edit(field: str) -> None:
  write_lines(pathlib.Path(f"{field}.jsonl"), EDITED[field])


@pytest.mark.parametrize(("method", "field"), [
    ("ga", "forget"), ("gd", "retain"), ("altpo", "alternates"), ("idk_nll", "refusals"), ("whp_relabel", "anchors")])
@pytest.mark.parametrize("finished", [True, False])
def test_edited_rows_are_another_job(folder: pathlib.Path, method: str, field: str, finished: bool) -> None:
  workdir = begun(job(method), finished)
  edit(field)
  with pytest.raises(InputError, match=f"inputs.json: was written for other contents of {field}; give another"):
    unlearn(job(method), "here", workdir)


def test_edited_rows_are_named_before_statistics_of_the_old_ones(folder: pathlib.Path) -> None:
  small = job("npo", dtype="float32")
  workdir = begun(small, finished=False)
  (workdir / "checkpoints" / "references").mkdir(parents=True)
  (workdir / "checkpoints" / "references" / "forget.safetensors").write_bytes(b"of the old rows")
  edit("forget")
  with pytest.raises(InputError, match="other contents of forget;"):
    unlearn(small, "here", workdir)


def test_what_the_method_does_not_read_may_change(folder: pathlib.Path) -> None:
  workdir = begun(job("ga"))
  for field in ("retain", "alternates", "refusals", "anchors"):
    edit(field)
  assert not unlearn(job("ga", retain=""), "here", workdir)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_another_model_at_the_same_path_is_another_job(folder: pathlib.Path, file: str) -> None:
  workdir = begun(job("ga"))
  path = folder / "base" / file
  content = path.read_bytes() if path.exists() else b"{}"
  # The last bit of a weight; a space in JSON, since bytes are compared and not what they mean.
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if file == "model.safetensors" else content + b" ")
  with pytest.raises(InputError, match=f"was written for other contents of model/{file}; give another"):
    unlearn(job("ga"), "here", workdir)


@pytest.mark.parametrize("method", ["gd", "idk_nll"])
def test_the_same_files_by_another_path_are_the_same_job(folder: pathlib.Path, method: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
  workdir = begun(job(method))
  moved = lambda place: {name: place(name, getattr(job(method), name)) for name in PATHS if name != "references"}
  ways: list[Callable[[str, str], str]] = [lambda _, path: str(folder / path), lambda _, path: f"../here/{path}"]
  for way in ways:
    assert not unlearn(job(method, **moved(way)), "here", workdir)
  shutil.copytree(folder, folder.parent / "copied")
  monkeypatch.chdir(folder.parent)
  for place in ("here", "copied"):
    assert not unlearn(job(method, **moved(lambda _, path, place=place: f"{place}/{path}")), "here", workdir)
  edit_elsewhere = write_lines(folder.parent / "copied" / "forget.jsonl", EDITED["forget"])
  with pytest.raises(InputError, match="other contents of forget"):
    unlearn(job(method, **moved(lambda _, path: f"here/{path}") | {"forget": str(edit_elsewhere)}), "here", workdir)


def test_other_settings_are_refused_whatever_the_paths(folder: pathlib.Path) -> None:
  workdir = begun(job("ga"))
  with pytest.raises(InputError, match=r"configuration:\n  steps: 2 here, 1 there;"):
    unlearn(job("ga", steps=2, forget=str(folder / "forget.jsonl")), "here", workdir)
  assert not unlearn(job("ga", references="elsewhere"), "here", workdir)


def test_a_file_more_or_less_is_another_job(folder: pathlib.Path) -> None:
  workdir = begun(job("idk_nll", refusals=""))
  with pytest.raises(InputError, match="other contents of refusals;"):
    unlearn(job("idk_nll"), "here", workdir)
  (workdir / "inputs.json").unlink()
  with pytest.raises(InputError, match="inputs.json: does not exist"):
    unlearn(job("idk_nll", refusals=""), "here", workdir)


def test_audits_of_checkpoints_go_by_contents_too(folder: pathlib.Path) -> None:
  case = FilesConfig(forget="forget.jsonl", retain="retain.jsonl", relearn=("relearn.jsonl",),
                     questions="questions.jsonl")
  config = Audit(case, seeds=(0,), arms=ArmsSettings(unlearned="base", control="base"))
  workdir = pathlib.Path("audit")
  run = lambda config: audit(config, "here", workdir, folder / "cache")
  assert not claim_workdir(workdir, recorded(config), Experiment(config, "here", workdir).digests(), ALL_PATHS)
  for name in OUTPUTS:
    (workdir / name).touch()
  arms = dataclasses.replace(config.arms, unlearned=str(folder / "base"))
  again = dataclasses.replace(config, arms=arms, case=dataclasses.replace(case, forget="../here/forget.jsonl"))
  assert not run(config) and not run(again)
  for field in ("control", "original"):
    arms = dataclasses.replace(config.arms, **{field: "" if field == "control" else "base"})
    with pytest.raises(InputError, match=f"other contents of {field}/config.json, "):
      run(dataclasses.replace(config, arms=arms))
  write_lines(folder / "more.jsonl", [{"text": "Steven Andrew"}])  # another relearn set is a larger grid
  wide = dataclasses.replace(config, case=dataclasses.replace(case, relearn=("relearn.jsonl", "more.jsonl")))
  digests = Experiment(wide, "here", workdir).digests()
  assert not is_claimed(workdir, recorded(wide), digests, ALL_PATHS, AXES, ["relearn", "more"])
  edit("retain")
  with pytest.raises(InputError, match="other contents of retain;"):
    run(config)
