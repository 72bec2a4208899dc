"""Jobs on adapters and what they write: an adapter that is read back over its base, and weights in fewer bits."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.audit_config import ArmsSettings, Audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.export import rounding
from relearn_jax.models.lora import LoraConfig, export_peft, init_lora
from relearn_jax.models.model import Params, flatten, unflatten
from relearn_jax.training import checkpoints
from relearn_jax.training.export_run import export_run
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.train_settings import AdapterSettings
from relearn_jax.training.unlearn import unlearn

from ..small import MODEL, write_checkpoint, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A base, an adapter on it, and rows."""
  root = tmp_path_factory.mktemp("adapters")
  write_checkpoint(root / "base")
  config = LoraConfig(2, 4.0, ("q_proj",))
  adapter = jax.tree.map(lambda leaf: leaf + 0.5, init_lora(MODEL, config, jax.random.key(0)))
  export_peft(adapter, MODEL, config, root / "adapter", base="../base")
  write_lines(root / "rows.jsonl", [{"prompt": "James Robert", "answer": " John"}, {"text": "Joseph Thomas"}])
  write_lines(root / "questions.jsonl", [{"id": 1, "prompt": "David", "answer": " William", "keywords": ["William"]}])
  return root


def read(folder: pathlib.Path) -> Params:
  return flatten(load_params(check_checkpoint(folder), MODEL))


def test_an_adapter_unlearns_and_what_it_leaves_is_read_back(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                             capsys: pytest.CaptureFixture) -> None:
  job = UnlearnJob(model=str(folder / "adapter"), method="ga", forget=str(folder / "rows.jsonl"), steps=2,
                   learning_rate=1e-2, adapter=AdapterSettings("lora", 2, 4.0, ("down_proj",)), save_dtype="bfloat16")
  assert unlearn(job, "here", tmp_path / "job")
  start, end, layered = read(folder / "adapter"), read(tmp_path / "job" / "model"), read(tmp_path / "job" / "adapter")
  np.testing.assert_allclose(end["layers/attn/q/weight"], start["layers/attn/q/weight"], rtol=2**-8)
  assert not np.allclose(start["layers/attn/q/weight"], read(folder / "base")["layers/attn/q/weight"], atol=0.1)
  for path, leaf in layered.items():  # the adapter in full precision, the model rounded
    np.testing.assert_array_equal(leaf.astype(jnp.bfloat16).astype(np.float32), end[path])
  assert not np.array_equal(layered["layers/mlp/down/weight"], start["layers/mlp/down/weight"])
  assert "Rounded to bfloat16, the " in capsys.readouterr().out
  # It is refused over other weights.
  write_checkpoint(tmp_path / "other")
  file = tmp_path / "job" / "adapter" / "adapter_config.json"
  file.write_text(file.read_text().replace(str(folder / "adapter"), str(tmp_path / "other")))
  with pytest.raises(InputError, match="`base_fingerprint` was trained on a base with other weights"):
    check_checkpoint(tmp_path / "job" / "adapter")


def test_an_audit_takes_adapters_and_names_their_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = str(folder / "rows.jsonl")
  case = FilesConfig(forget=rows, retain=rows, relearn=(rows,), questions=str(folder / "questions.jsonl"))
  arms = ArmsSettings(unlearned=str(folder / "adapter"), original=str(folder / "base"))
  audit = Experiment(Audit(case, seeds=(0,), arms=arms), "here", tmp_path)
  digests = audit.digests()
  assert {"unlearned/adapter_model.safetensors", "unlearned/adapter_config.json", "unlearned/base/model.safetensors",
          "unlearned/base/config.json", "original/model.safetensors"} <= set(digests)
  assert digests["unlearned/base/model.safetensors"] == digests["original/model.safetensors"]
  u, o = (flatten(load_params(audit.checked[arm], MODEL))["layers/attn/q/weight"] for arm in "UO")
  np.testing.assert_allclose(u - o, 0.5 * 2 * np.asarray(added(folder)), rtol=1e-4, atol=1e-5)


def added(folder: pathlib.Path) -> np.ndarray:
  """The sum of the rows of `a`, for each of the columns: `b` is 0.5 everywhere."""
  fresh = flatten(init_lora(MODEL, LoraConfig(2, 4.0, ("q_proj",)), jax.random.key(0)))["layers/attn/q/a"]
  total = (np.asarray(fresh) + 0.5).sum(1)
  return np.broadcast_to(total[:, None], (total.shape[0], 32, total.shape[1]))


def test_what_is_exported_from_a_step(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """As it was trained, or rounded, and then compared with the model that the job began from."""
  job = UnlearnJob(model=str(folder / "base"), method="ga", forget=str(folder / "rows.jsonl"), steps=1, keep_every=1,
                   learning_rate=1e-2, adapter=AdapterSettings("lora", 2, 4.0, ("down_proj",)))
  assert unlearn(job, "here", tmp_path / "job")
  step = tmp_path / "job" / "checkpoints" / "unlearn" / "000001"
  assert export_run(step, tmp_path / "whole", merge=True) == ("U", "")
  run, told = export_run(step, tmp_path / "rounded", merge=True, save_dtype="bfloat16")
  start, whole, rounded = read(folder / "base"), read(tmp_path / "whole"), read(tmp_path / "rounded")
  for path, leaf in read(tmp_path / "job" / "model").items():
    np.testing.assert_array_equal(whole[path], leaf)
    np.testing.assert_array_equal(rounded[path], leaf.astype(jnp.bfloat16).astype(np.float32))
  assert run == "U" and told == rounding(unflatten(whole), start.items(), "bfloat16", "--save_dtype")
  assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"
  with pytest.raises(InputError, match="`--save_dtype` is 'float16'; expected float32 or bfloat16"):
    export_run(step, tmp_path / "new", merge=True, save_dtype="float16")
  with pytest.raises(InputError, match="`--save_dtype` is bfloat16, and an adapter is written as it was .*--merge"):
    export_run(step, tmp_path / "new", save_dtype="bfloat16")
  assert not (tmp_path / "new").exists()


def test_the_weights_from_before_may_be_step_0_or_not_at_hand(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  write_checkpoint(tmp_path / "base")
  stage = tmp_path / "checkpoints" / "unlearn"
  before, after = (unflatten({path: leaf * factor for path, leaf in read(folder / "base").items()})
                   for factor in (1.0, 1.0 + 2**-10))
  stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  about = lambda names, step: checkpoints.description(MODEL, names, "unlearn", step)
  checkpoints.save_tree(stage / "000003", stack(after), 1, about(["b"], 3))
  _, told = export_run(stage / "000003", tmp_path / "alone", save_dtype="bfloat16")
  assert told == rounding(after, None, "bfloat16", "--save_dtype") and "is not known here" in told
  checkpoints.save_tree(stage / "000000", stack(after, before), 2, about(["a", "b"], 0))  # of more runs
  _, told = export_run(stage / "000003", tmp_path / "beside", save_dtype="bfloat16")
  assert told == rounding(after, flatten(before).items(), "bfloat16", "--save_dtype") and " that training moved" in told


def test_the_share_that_rounding_leaves_by_hand() -> None:
  before = {"a/weight": np.ones((2, 2), np.float32), "b/weight": np.full(3, 2.0, np.float32)}
  after: Params = {"a": {"weight": before["a/weight"] + np.float32(2**-10)},  # rounded away: 1 has steps of 2^-7
                   "b": {"weight": before["b/weight"] + np.float32(0.0625)}}  # kept: 2 has steps of 2^-6
  moved, kept = (4 * 2**-20 + 3 * 0.0625**2) ** 0.5, (3 * 0.0625**2) ** 0.5
  say = lambda after, before: rounding(after, before and before.items(), "bfloat16", "--flag")
  assert say(after, before) == (
      f"Rounded to bfloat16, the 7 weights lie {kept:.3g} from those before: {kept / moved:.1%} of the {moved:.3g} "
      "that training moved them. --flag=float32 writes them as trained.")
  assert f"the 7 weights lie {(4 * 2**-20) ** 0.5:.3g} from those that were trained; how far" in say(after, None)
  after["b"]["weight"] = before["b/weight"]
  assert "lie 0 from those before: 0.0% of the" in say(after, before)
  assert "lie 0 from those before: the 0 that" in say(
      {"a": {"weight": before["a/weight"]}, "b": after["b"]}, before)
