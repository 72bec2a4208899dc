"""Adapters: what they add, what merging gives, and PEFT folders in and out."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.lora import (
  LoraConfig,
  check_lora,
  export_peft,
  init_lora,
  linear_layers,
  load_peft,
  merge_lora,
)
from relearn_jax.models.model import Model, Params, flatten

from .tiny import GOLDEN, refuses

LORA = LoraConfig(rank=3, alpha=7.0)
FAMILIES = ["multi_head_tied", "mistral_window", "phi_partial", "qwen2_bias"]


@functools.cache
def load(name: str) -> tuple[Model, Params, np.ndarray]:
  checked = check_checkpoint(GOLDEN / name)
  model = Model(checked.config, lora_scale=LORA.scale)
  return model, load_params(checked, model), np.load(GOLDEN / name / "golden.npz")["tokens"]


def random_adapter(model: Model, config: LoraConfig = LORA) -> Params:
  """An adapter whose `b` is not zero."""
  draw = lambda leaf: jnp.asarray(0.1 * np.random.default_rng(leaf.size).normal(size=leaf.shape), jnp.float32)
  return jax.tree.map(draw, init_lora(model, config, jax.random.key(0)))


def logits(model: Model, params: Params, tokens: Any) -> np.ndarray:
  return np.asarray(jax.jit(lambda p: model.logits(p, model.hidden(p, jnp.asarray(tokens))))(params))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_same_model(name: str) -> None:
  model, params, tokens = load(name)
  plain = logits(model, params, tokens)
  fresh = init_lora(model, LORA, jax.random.key(1))
  np.testing.assert_array_equal(logits(model, {**params, "lora": fresh}, tokens), plain)
  adapter = random_adapter(model)
  added = logits(model, {**params, "lora": adapter}, tokens)
  assert np.abs(added - plain).max() > 0.1
  np.testing.assert_allclose(logits(model, merge_lora(params, adapter, LORA.scale), tokens), added, atol=5e-5)
  # Every linear layer has one: 7 in a gated block, 6 in Phi's.
  assert len(flatten(adapter)) == 2 * len(linear_layers(model)) == 2 * (6 if name == "phi_partial" else 7)


def test_the_first_step_is_that_of_the_published_start() -> None:
  model, params, _ = load("multi_head_tied")
  fresh = flatten(init_lora(model, LORA, jax.random.key(1)))
  for path, leaf in fresh.items():
    if path.endswith("/b"):
      assert not leaf.any()
      continue
    bound = leaf.shape[-1] ** -0.5
    assert float(jnp.abs(leaf).max()) <= bound and float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.15)


def test_targets() -> None:
  model, _, _ = load("multi_head_tied")
  assert check_lora(model, LoraConfig(targets=("q_proj", "down_proj")), None) == ["layers/attn/q", "layers/mlp/down"]
  phi = load("phi_partial")[0]
  assert check_lora(phi, LoraConfig(targets=("dense", "fc1")), None) == ["layers/attn/o", "layers/mlp/fc1"]
  with refuses("has 'q_porj', which matches no linear layer of this model (nearest: q_proj", file="c.py",
               field="lora.targets", mend="expected 'all-linear' or some of down_proj, gate_proj"):
    check_lora(model, LoraConfig(targets=("q_porj",)), "c.py")
  with refuses("is 0", file="c.py", field="lora.rank", mend="at least 1"):
    check_lora(model, LoraConfig(rank=0), "c.py")
  with refuses("is nan", file="c.py", field="lora.alpha", mend="positive"):
    check_lora(model, LoraConfig(alpha=float("nan")), "c.py")


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_folders_come_back_bitwise(tmp_path: pathlib.Path, name: str) -> None:
  model, _, _ = load(name)
  adapter = random_adapter(model)
  export_peft(adapter, model, LORA, tmp_path / "out", base="somewhere/base", base_fingerprint="ab")
  again, config = load_peft(tmp_path / "out", model, base_fingerprint="ab")
  assert (config.rank, config.alpha) == (LORA.rank, LORA.alpha)
  ours, theirs = flatten(adapter), flatten(again)
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(theirs[path], leaf) for path, leaf in ours.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_is_exported(tmp_path: pathlib.Path, name: str) -> None:
  torch = pytest.importorskip("torch", reason="needs torch and peft: pip install -e '.[parity]'")
  peft = pytest.importorskip("peft", reason="needs torch and peft: pip install -e '.[parity]'")
  from transformers import AutoModelForCausalLM
  model, params, tokens = load(name)
  adapter = random_adapter(model)
  export_peft(adapter, model, LORA, tmp_path / "out", base=str(GOLDEN / name))
  base = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32, attn_implementation="eager")
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
  error = np.abs(logits(model, {**params, "lora": adapter}, tokens) - expected)[0].max()  # row 0 has no padding
  print(f"max error {error:.2e}")
  assert error <= 1e-4
  # And the other way: what peft saves is read back.
  theirs.save_pretrained(tmp_path / "theirs")
  read, config = load_peft(tmp_path / "theirs", model)
  assert config.scale == LORA.scale
  assert all(np.array_equal(flatten(read)[path], leaf) for path, leaf in flatten(adapter).items())


def exported(tmp_path: pathlib.Path) -> tuple[Model, pathlib.Path]:
  model = load("multi_head_tied")[0]
  export_peft(random_adapter(model), model, LORA, tmp_path / "a", base="owner/base", base_fingerprint="ab" * 32)
  return model, tmp_path / "a"


def test_adapters_of_another_base(tmp_path: pathlib.Path) -> None:
  model, folder = exported(tmp_path)
  file = folder / "adapter_model.safetensors"
  wide = Model(dataclasses.replace(model.config, intermediate_size=112))
  with refuses("but this base asks for", file=file, field="base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
               mend="give the adapter's own base (owner/base)"):
    load_peft(folder, wide)
  deep = Model(dataclasses.replace(model.config, num_layers=3))
  with refuses("is missing", file=file, field="base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight",
               mend="every layer of this base"):
    load_peft(folder, deep)
  shallow = Model(dataclasses.replace(model.config, num_layers=1))
  with refuses("has no place in this base", file=file,
               field="base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", mend="(owner/base)"):
    load_peft(folder, shallow)
  with refuses("was trained on a base with other weights", file=file, field="base_fingerprint", mend="own base"):
    load_peft(folder, model, base_fingerprint="cd" * 32)
  phi = load("phi_partial")[0]
  with refuses("has no place in this base", file=file,
               field="base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", mend="own base"):
    load_peft(folder, phi)


@pytest.mark.parametrize(("fields", "field", "problem"), [
    ({"peft_type": "LOHA"}, "peft_type", "is 'LOHA', which is not supported"),
    ({"use_dora": True}, "use_dora", "is True"),
    ({"r": 0}, "r", "is 0"), ({"lora_alpha": "x"}, "lora_alpha", "is 'x'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern", "is {'q_proj': 2}, which is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save", "is ['lm_head']")])
def test_adapters_of_other_kinds(tmp_path: pathlib.Path, fields: dict, field: str, problem: str) -> None:
  model, folder = exported(tmp_path)
  file = folder / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with refuses(problem, file=file, field=field, mend=""):
    load_peft(folder, model)


def test_damaged_adapters(tmp_path: pathlib.Path) -> None:
  model, folder = exported(tmp_path)
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
  tensors[name][0, 0] = np.nan
  save_file(tensors, file)
  with refuses("is NaN or infinite", file=file, field=name, mend="finite"):
    load_peft(folder, model)
  file.rename(folder / "adapter_model.bin")
  with refuses("does not exist (adapter_model.bin is there", file=file, mend="save the adapter as safetensors"):
    load_peft(folder, model)
  with refuses("exists and is not empty", file=folder, field="--output", mend="give a new folder"):
    export_peft(random_adapter(model), model, LORA, folder, base="b")
