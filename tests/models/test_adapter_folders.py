"""Adapters beside their base and alone: merged as PEFT applies them, or refused by name."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relearn_jax.models.checkpoint import check_checkpoint, load_params, tensors_digest, weights_digest
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.export import export
from relearn_jax.models.folders import chain
from relearn_jax.models.lora import LoraConfig, load_peft, merge_lora
from relearn_jax.models.model import Model, flatten
from relearn_jax.plan.price import find_model

from .tiny import refuses, weights, write, write_json, write_tokenizer

ABOUT: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1, "bias": "none", "inference_mode": True, "fan_in_fan_out": False, "use_dora": False,
    "use_rslora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "revision": None}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def matrices(seed: int = 1) -> dict[str, np.ndarray]:
  """Of the two targets in both layers."""
  rng = np.random.default_rng(seed)
  found = {}
  for i in range(2):
    for name, (features, size) in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 10)}.items():
      layer = f"base_model.model.model.layers.{i}.{name}"
      found[f"{layer}.lora_A.weight"] = rng.normal(size=(2, size)).astype(np.float32)
      found[f"{layer}.lora_B.weight"] = rng.normal(size=(features, 2)).astype(np.float32)
  return found


def write_adapter(folder: pathlib.Path, seed: int = 1, tensors: dict[str, np.ndarray] | None = None,
                  metadata: dict[str, str] | None = None, **fields: Any) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / CONFIG, ABOUT | fields)
  about = {"format": "pt"} | (metadata or {})
  save_file(matrices(seed) if tensors is None else tensors, folder / WEIGHTS, metadata=about)
  return folder


def by_hand(base: dict[str, np.ndarray], scale: float, seed: int = 1) -> dict[str, np.ndarray]:
  """The tensors of the merged model."""
  found, adapter = dict(base), matrices(seed)
  for name, a in adapter.items():
    if name.endswith("lora_A.weight"):
      weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
      product = adapter[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
      found[weight] = (found[weight] + scale * product).astype(np.float32)
  return found


def leaves(folder: pathlib.Path, **options: Any) -> dict[str, Any]:
  checked = check_checkpoint(folder)
  return flatten(load_params(checked, Model(checked.config), **options))


def assert_is(folder: pathlib.Path, tensors: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
  """A folder is the model of these tensors, and not that of its base."""
  expected, found = leaves(write(tmp_path / "expected", tensors)), leaves(folder)
  base = leaves(write(tmp_path / "plain"))
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6)
  assert not np.allclose(found["layers/attn/q/weight"], base["layers/attn/q/weight"], atol=0.1)


def test_an_adapter_beside_the_weights_is_merged(tmp_path: pathlib.Path) -> None:
  folder = write_adapter(write(tmp_path / "m"), base_model_name_or_path="somewhere/else")
  assert_is(folder, by_hand(weights(), 3.0), tmp_path)
  assert set(check_checkpoint(folder).deciding_files()) == {"config.json", "model.safetensors", CONFIG, WEIGHTS}


def test_the_merged_sum_is_made_in_full_precision(tmp_path: pathlib.Path) -> None:
  folder = write_adapter(write(tmp_path, {name: tensor.astype(np.float16) for name, tensor in weights().items()}))
  base = {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in weights().items()}
  exact = by_hand(base, 3.0)["model.layers.1.self_attn.q_proj.weight"]
  np.testing.assert_allclose(leaves(folder)["layers/attn/q/weight"][1], exact, rtol=1e-6, atol=1e-6)
  rounded = leaves(folder, dtype=jnp.bfloat16)["layers/attn/q/weight"][1]
  np.testing.assert_allclose(rounded.astype(np.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("where", ["absolute", "beside", "cwd"])
def test_an_adapter_alone_finds_its_base(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
  base = write(tmp_path / "models" / "base")
  write_tokenizer(base, 12)
  write_json(base / "generation_config.json", {"eos_token_id": 3})
  name = {"absolute": str(base), "beside": "../models/base", "cwd": "models/base"}[where]
  monkeypatch.chdir(tmp_path if where == "cwd" else "/")
  folder = write_adapter(tmp_path / "adapter", base_model_name_or_path=name)
  assert_is(folder, by_hand(weights(), 3.0), tmp_path)
  checked, tokenizer = open_checkpoint(str(folder))
  assert checked.path == folder and len(tokenizer) == 12
  assert set(checked.deciding_files()) == {
      CONFIG, WEIGHTS, "base/config.json", "base/model.safetensors", "tokenizer.json", "tokenizer_config.json",
      "generation_config.json"}
  assert find_model(str(folder), "here", "model") == (checked.config, folder)
  # What is trained from it is written with the tokenizer and generation config that it was opened with.
  model = Model(checked.config)
  export(load_params(checked, model), model, tmp_path / "copy", source=folder)
  assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in (tmp_path / "copy").iterdir()}


def test_an_adapter_with_a_tokenizer_of_its_own(tmp_path: pathlib.Path) -> None:
  base = write(tmp_path / "base")
  write_tokenizer(base, 12)
  folder = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
  write_tokenizer(folder, 9)
  checked, tokenizer = open_checkpoint(str(folder))
  assert len(tokenizer) == 9 and checked.deciding_files()["tokenizer.json"] == folder / "tokenizer.json"


def test_an_adapter_on_an_adapter(tmp_path: pathlib.Path) -> None:
  base = write_adapter(write(tmp_path / "base"), seed=1)
  first = write_adapter(tmp_path / "first", seed=2, base_model_name_or_path=str(base))
  second = write_adapter(tmp_path / "second", seed=3, base_model_name_or_path="../first")
  tensors = by_hand(by_hand(by_hand(weights(), 3.0, 1), 3.0, 2), 3.0, 3)
  expected, found = leaves(write(tmp_path / "expected", tensors)), leaves(second)
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-5)
  assert [folder.resolve() for folder in chain(second)] == [second, first, base]
  files = check_checkpoint(second).deciding_files()
  assert {CONFIG, f"base/{CONFIG}", f"base/base/{CONFIG}", "base/base/config.json"} <= set(files)


def test_digests_cover_adapters(tmp_path: pathlib.Path) -> None:
  plain = check_checkpoint(write(tmp_path / "plain"))
  found = {weights_digest(plain)}
  for number, fields in enumerate(({}, {"lora_alpha": 5}, {"seed": 2})):
    folder = write_adapter(write(tmp_path / str(number)), **fields)  # type: ignore[arg-type]
    found.add(weights_digest(check_checkpoint(folder)))
  assert len(found) == 4


def test_rank_stabilised_adapters(tmp_path: pathlib.Path) -> None:
  folder = write_adapter(write(tmp_path / "m"), use_rslora=True)
  assert_is(folder, by_hand(weights(), 6 / math.sqrt(2)), tmp_path)


def test_reading_merges_as_merging_does(tmp_path: pathlib.Path) -> None:
  folder = write_adapter(tmp_path / "a", base_model_name_or_path=str(write(tmp_path / "base")))
  checked = check_checkpoint(tmp_path / "base")
  model = Model(checked.config)
  adapter, config = load_peft(folder, model)
  assert config == LoraConfig(2, 6.0, ("down_proj", "q_proj"))
  merged = flatten(merge_lora(load_params(checked, model), adapter, config.scale))
  for path, leaf in leaves(folder).items():
    np.testing.assert_allclose(leaf, merged[path], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_modules": ".*(q_proj|down_proj)"}])
def test_transformers_makes_the_same_model_of_it(tmp_path: pathlib.Path, beside: bool, fields: dict) -> None:
  torch = pytest.importorskip("torch", reason="needs torch and peft: pip install -e '.[parity]'")
  pytest.importorskip("peft", reason="needs torch and peft: pip install -e '.[parity]'")
  from transformers import AutoModelForCausalLM
  base = write(tmp_path / "base")
  folder = write_adapter(base if beside else tmp_path / "a", base_model_name_or_path=str(base), **fields)
  theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
  tokens = np.array([[1, 5, 3, 11, 7]])
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  checked = check_checkpoint(folder)
  model = Model(checked.config)
  params = load_params(checked, model)
  np.testing.assert_allclose(model.logits(params, model.hidden(params, jnp.asarray(tokens))), expected, atol=1e-4)
  plain = load_params(dataclasses.replace(checked, adapters=()), model)
  assert np.abs(model.logits(plain, model.hidden(plain, jnp.asarray(tokens))) - expected).max() > 0.1


# What is refused.


@pytest.mark.parametrize(("fields", "field", "problem"), [
    ({"peft_type": "IA3"}, "peft_type", "is 'IA3', which is not supported"),
    ({"use_dora": True}, "use_dora", "is True, which is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save", "is ['lm_head'], which is not supported"),
    ({"bias": "all"}, "bias", "is 'all'"), ({"fan_in_fan_out": True}, "fan_in_fan_out", "is True"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern", "is {'q_proj': 4}"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern", "is {'q_proj': 4}"),
    ({"lora_bias": True}, "lora_bias", "is True"),
    ({"layer_replication": [[0, 2]]}, "layer_replication", "is [[0, 2]]"),
    ({"layers_to_transform": [0]}, "layers_to_transform", "is [0]"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices", "is [1]"),
    ({"something_new": {"x": 1}}, "something_new", "is {'x': 1}, which is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights", "is 'pissa', by which loading changes the base too"),
    ({"use_rslora": "yes"}, "use_rslora", "is 'yes'"), ({"r": None}, "r", "is None"),
    ({"target_modules": ["q_proj"]}, "target_modules", "but adapter_model.safetensors also has tensors of"),
    ({"target_modules": ".*q_proj"}, "target_modules", "also has tensors of model.layers.0.mlp.down_proj"),
    ({"exclude_modules": ["down_proj"]}, "exclude_modules", "has tensors of model.layers.0.mlp.down_proj")])
def test_what_is_not_merged_is_refused_by_name(tmp_path: pathlib.Path, fields: dict, field: str, problem: str) -> None:
  folder = write_adapter(write(tmp_path), **fields)
  with refuses(problem, file=folder / CONFIG, field=field, mend=""):
    check_checkpoint(folder)


def test_parts_of_an_adapter_are_refused(tmp_path: pathlib.Path) -> None:
  folder = write_adapter(write(tmp_path / "m"))
  (folder / CONFIG).rename(tmp_path / "kept")
  with refuses("does not exist", file=folder / CONFIG, mend="give the whole folder of the PEFT adapter"):
    check_checkpoint(folder)
  (tmp_path / "kept").rename(folder / CONFIG)
  (folder / WEIGHTS).rename(folder / "adapter_model.bin")
  with refuses("does not exist (adapter_model.bin is there", file=folder / WEIGHTS, mend="safetensors"):
    check_checkpoint(folder)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
  for tensor, problem, field in (
      (None, "is missing", name),
      (np.ones((8, 3), np.float32), "has shape (8, 3), but this base asks for (8, 2)", name),
      (np.ones((8, 2), np.int8), "has dtype I8", name)):
    tensors = {key: value for key, value in matrices().items() if key != name}
    write_adapter(folder, tensors=tensors if tensor is None else tensors | {name: tensor})
    with refuses(problem, file=folder / WEIGHTS, field=field, mend=""):
      check_checkpoint(folder)
  head = "base_model.model.lm_head.lora_A.weight"
  write_adapter(folder, tensors=matrices() | {head: np.ones((2, 8), np.float32)})
  with refuses("has no place in this base", file=folder / WEIGHTS, field=head, mend="own base"):
    check_checkpoint(folder)


def test_an_adapter_that_is_not_finite(tmp_path: pathlib.Path) -> None:
  name, tensors = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", matrices()
  tensors[name][0, 3] = np.nan
  folder = write_adapter(write(tmp_path), tensors=tensors)
  with refuses("is NaN or infinite", file=folder / WEIGHTS, field=name, mend="finite"):
    leaves(folder)


@pytest.mark.parametrize(("base", "problem", "mend"), [
    (None, "is not given, and the adapter lies beside no model", "name the folder of the model that it was trained on"),
    (7, "is 7", "expected text"), ("no/such/base", "the base of this adapter, which does not exist", "name the folder"),
    ("../a", "leads back to this adapter", "name the folder of the model")])
def test_a_missing_base(tmp_path: pathlib.Path, base: Any, problem: str, mend: str) -> None:
  folder = write_adapter(tmp_path / "a", base_model_name_or_path=base)
  with refuses(problem, file=folder / CONFIG, field="base_model_name_or_path", mend=mend):
    check_checkpoint(folder)


def test_two_bases_of_one_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  write(tmp_path / "base")
  folder = write_adapter(tmp_path / "a", base_model_name_or_path="base")
  monkeypatch.chdir(tmp_path)
  check_checkpoint(folder)
  write(folder / "base")
  with refuses("which is", file=folder / CONFIG, field="base_model_name_or_path", mend="write the whole path"):
    check_checkpoint(folder)
  os.chdir(folder)
  check_checkpoint(folder)


def test_the_fingerprint_of_the_base_is_compared(tmp_path: pathlib.Path) -> None:
  base = write(tmp_path / "base")
  digest = tensors_digest(check_checkpoint(base))
  folder = write_adapter(tmp_path / "a", base_model_name_or_path=str(base), metadata={"base_fingerprint": digest})
  check_checkpoint(folder)
  changed = load_file(base / "model.safetensors")
  changed["model.norm.weight"] += 1
  save_file(changed, base / "model.safetensors")
  with refuses("was trained on a base with other weights", file=folder / WEIGHTS, field="base_fingerprint",
               mend="own base"):
    check_checkpoint(folder)


def test_hub_bases_keep_their_revision(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  import huggingface_hub
  asked = []

  def download(name: str, **options: Any) -> str:
    asked.append((name, options["revision"]))
    return str(write(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  folder = write_adapter(tmp_path / "a", base_model_name_or_path="owner/base", revision="abc")
  check_checkpoint(folder)
  assert asked == [("owner/base", "abc")]


def test_defaults_of_a_config_are_read_as_peft_reads_them(tmp_path: pathlib.Path) -> None:
  """What the installed PEFT writes by itself is no reason to refuse."""
  peft = pytest.importorskip("peft", reason="needs torch and peft: pip install -e '.[parity]'")
  folder = write_adapter(write(tmp_path))
  config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
  config.save_pretrained(folder)
  assert check_checkpoint(folder).adapters[0].scale == 3.0
  assert "lora_dropout" in json.loads((folder / CONFIG).read_text())
