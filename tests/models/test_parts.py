"""What a checkpoint consists of is used or refused by name: heads, prefixes, statements of its angles, its files."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from relearn_jax.models.architectures import parse_config
from relearn_jax.models.checkpoint import check_checkpoint, load_params, tensors_digest, weights_digest
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export, to_hf_config
from relearn_jax.models.model import Model, flatten
from relearn_jax.models.safetensor_files import INDEX

from .tiny import CONFIG, refuses, weights, write, write_json, write_sharded, write_tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
BESIDE = {"rope_theta": 777.0}


def leaves(folder: pathlib.Path, **options: Any) -> dict[str, Any]:
  checked = check_checkpoint(folder)
  return flatten(load_params(checked, Model(checked.config), **options))


# Heads.


def tied(dtype: Any = np.float32) -> dict[str, np.ndarray]:
  tensors = weights(dtype)
  return tensors | {HEAD: tensors[EMBED].copy()}


def test_a_tied_head_is_equal_to_the_embedding_or_refused(tmp_path: pathlib.Path) -> None:
  tensors = tied()
  assert HEAD not in check_checkpoint(write(tmp_path / "same", tensors, tie_word_embeddings=True)).files
  tensors[HEAD][-1, -1] += 1e-3
  folder = write(tmp_path / "other", tensors, tie_word_embeddings=True)
  with refuses("differs from the embedding", file=folder / "model.safetensors", field=HEAD,
               mend="set tie_word_embeddings to false"):
    check_checkpoint(folder)
  tensors[HEAD] = tensors[HEAD][:-1]
  with refuses("differs from the embedding", file=folder / "model.safetensors", field=HEAD, mend="tie_word_embeddings"):
    check_checkpoint(write(folder, tensors, tie_word_embeddings=True))


def test_a_tied_head_in_another_precision_and_another_file(tmp_path: pathlib.Path) -> None:
  half = tied(np.float16)
  folder = write(tmp_path, half, tie_word_embeddings=True)
  head = half.pop(HEAD)
  save_file(half, folder / "model.safetensors")
  (folder / "model.safetensors").rename(folder / "a.safetensors")
  save_file({HEAD: head.astype(np.float32)}, folder / "b.safetensors")
  check_checkpoint(folder)
  save_file({HEAD: head.astype(np.float32) + 1}, folder / "b.safetensors")
  with refuses("differs from the embedding", file=folder / "b.safetensors", field=HEAD, mend=""):
    check_checkpoint(folder)


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight", "classifier.bias"])
@pytest.mark.parametrize("tie", [False, True])
def test_heads_of_other_models_are_refused_by_their_tensors(tmp_path: pathlib.Path, name: str, tie: bool) -> None:
  folder = write(tmp_path, tied() | {name: np.ones((2, 8), np.float32)}, tie_word_embeddings=tie,
                 architectures=["LlamaForSequenceClassification"])
  with refuses("belongs to a head that a causal language model does not have", file=folder / "model.safetensors",
               field=name, mend="...ForCausalLM"):
    check_checkpoint(folder)


def test_another_kind_of_model_is_refused_without_its_head(tmp_path: pathlib.Path) -> None:
  folder = write(tmp_path, tied(), tie_word_embeddings=True, architectures=["LlamaForTokenClassification"])
  with refuses("has 'LlamaForTokenClassification', which is no causal language model", file=folder / "config.json",
               field="architectures", mend="...ForCausalLM"):
    check_checkpoint(folder)
  check_checkpoint(write(folder, tied(), architectures=["LlamaModel"]))


# Names without their prefix.


def bare(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("tie", [False, True])
def test_names_without_their_prefix_are_the_same_model(tmp_path: pathlib.Path, tie: bool) -> None:
  tensors = weights()
  if tie:
    del tensors[HEAD]
  for name, some in (("full", tensors), ("bare", bare(tensors))):
    write(tmp_path / name, some, tie_word_embeddings=tie)
  full, short = (leaves(tmp_path / name) for name in ("full", "bare"))
  assert full.keys() == short.keys() and all(np.array_equal(short[path], leaf) for path, leaf in full.items())
  digests = {tensors_digest(check_checkpoint(tmp_path / name)) for name in ("full", "bare")}
  assert len(digests) == 1


def test_without_a_head_an_untied_decoder_is_refused(tmp_path: pathlib.Path) -> None:
  tensors = bare(weights())
  del tensors[HEAD]
  folder = write(tmp_path, tensors)
  with refuses("is missing", file=folder, field=HEAD, mend="a model without its head"):
    check_checkpoint(folder)
  with refuses("is missing", file=write(folder, {n: t for n, t in weights().items() if n != HEAD}), field=HEAD,
               mend="complete checkpoint"):
    check_checkpoint(folder)


def test_both_kinds_of_names_are_refused(tmp_path: pathlib.Path) -> None:
  folder = write(tmp_path, weights() | {"norm.weight": np.ones(8, np.float32)})
  with refuses("has no place in the model", file=folder / "model.safetensors", field="norm.weight", mend=""):
    check_checkpoint(folder)


def test_bare_shards_follow_their_index(tmp_path: pathlib.Path) -> None:
  folder = write_sharded(tmp_path)
  index = json.loads((folder / INDEX).read_text())
  for file in sorted(set(index["weight_map"].values())):
    names = [name for name, home in index["weight_map"].items() if home == file]
    save_file(bare({name: weights()[name] for name in names}), folder / file)
  write_json(folder / INDEX, {"weight_map": {n.removeprefix("model."): f for n, f in index["weight_map"].items()}})
  expected = leaves(write(tmp_path / "one"))
  assert all(np.array_equal(leaf, expected[path]) for path, leaf in leaves(folder).items())


# What is said of the angles, against transformers' own reading.

ROPES: list[dict[str, Any]] = [
    {}, BESIDE, {"rope_scaling": None, **BESIDE}, {"rope_scaling": SCALED}, {"rope_scaling": SCALED, **BESIDE},
    {"rope_parameters": SCALED | {"rope_theta": 5.0}}, {"rope_parameters": SCALED | {"rope_theta": 5.0}, **BESIDE},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_scaling": SCALED},
    {"rope_parameters": SCALED | {"rope_theta": 5.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": SCALED | {"rope_theta": 5.0}, "rope_scaling": {"rope_type": "default"}, **BESIDE},
    {"rope_parameters": SCALED | {"rope_theta": 5.0}, "rope_scaling": SCALED | {"factor": 2.0, "rope_theta": 9.0}},
    {"rope_parameters": SCALED | {"rope_theta": 5.0}, "rope_scaling": {}},
    {"rope_scaling": {"type": "llama3"} | {k: v for k, v in SCALED.items() if k != "rope_type"}},
    {"rope_scaling": SCALED | {"type": "default"}},
    {"rope_scaling": {k: v for k, v in SCALED.items() if k != "original_max_position_embeddings"}},
    {"rope_scaling": SCALED, "original_max_position_embeddings": 8}]


def check_against(values: dict[str, Any], config: ModelConfig, theirs: Any) -> None:
  rope = theirs.rope_parameters
  assert config.rope_theta == rope["rope_theta"]
  if rope["rope_type"] == "default":
    assert config.rope_scaling is None
  else:
    scaling = config.rope_scaling
    assert scaling is not None and rope["rope_type"] == "llama3"
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions) == (
        rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
  share = rope.get("partial_rotary_factor", 1.0)
  assert (config.rotary_dim or config.head_dim) == int(config.head_dim * share)


@pytest.mark.parametrize("fields", ROPES, ids=range(len(ROPES)))
def test_angles_are_those_that_transformers_reads(fields: dict[str, Any]) -> None:
  values = {name: value for name, value in CONFIG.items() if name != "rope_theta"} | fields
  kind = values.pop("model_type")
  theirs = AutoConfig.for_model(kind, **json.loads(json.dumps(values)))
  check_against(values, parse_config(values | {"model_type": kind}, "config.json"), theirs)


@pytest.mark.parametrize(("kind", "fields"), [
    ("llama", {"rope_parameters": SCALED | {"rope_theta": 5.0}}), ("llama", BESIDE), ("mistral", BESIDE),
    ("qwen2", BESIDE), ("phi", {"partial_rotary_factor": 0.5, **BESIDE}), ("phi", {"partial_rotary_factor": 1.0}),
    ("phi", {})])
def test_both_generations_of_transformers_read_what_is_written(kind: str, fields: dict[str, Any]) -> None:
  more = {"hidden_act": "gelu_new"} if kind == "phi" else {}
  config = parse_config(CONFIG | {"model_type": kind, "num_key_value_heads": 2} | more | fields, "config.json")
  written = json.loads(json.dumps(to_hf_config(config)))
  fresh = json.loads(json.dumps(written))  # it writes into what it is given
  new = AutoConfig.for_model(kind, **{name: value for name, value in fresh.items() if name != "model_type"})
  check_against(written, config, new)
  # transformers 4 knows no `rope_parameters`; theta, share and scaling stand beside each other.
  old = {name: value for name, value in written.items() if name != "rope_parameters"}
  assert parse_config(old, "config.json") == config
  assert written["rope_theta"] == config.rope_theta and "rope_theta" not in (written["rope_scaling"] or {})
  if kind == "phi":
    assert written["partial_rotary_factor"] == (config.rotary_dim or config.head_dim) / config.head_dim


def test_angles_for_kinds_of_layers_are_refused() -> None:
  rope = {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}
  with refuses("angles of its own", file="c", field="rope_parameters.full_attention", mend="layers are all alike"):
    parse_config(CONFIG | {"rope_parameters": rope}, "c")
  with refuses("is 'yarn', which is not supported", file="c", field="rope_scaling.rope_type", mend="'llama3'"):
    parse_config(CONFIG | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}}, "c")


# The files that decide.


def test_digests_follow_tensors_and_constants_not_files(tmp_path: pathlib.Path) -> None:
  one, two = check_checkpoint(write(tmp_path / "one")), check_checkpoint(write_sharded(tmp_path / "two"))
  assert weights_digest(one) == weights_digest(two)
  turned = check_checkpoint(write(tmp_path / "turned", rope_theta=5.0))
  assert tensors_digest(turned) == tensors_digest(one) and weights_digest(turned) != weights_digest(one)
  changed = weights()
  changed[EMBED][0, 0] += 1
  assert tensors_digest(check_checkpoint(write(tmp_path / "one", changed))) != tensors_digest(two)
  half = check_checkpoint(write(tmp_path / "half", weights(np.float16)))
  assert tensors_digest(half) != tensors_digest(two)


def test_every_file_that_decides_is_named_and_copied(tmp_path: pathlib.Path) -> None:
  folder = write(tmp_path / "m")
  write_tokenizer(folder, 12)
  write_json(folder / "generation_config.json", {"eos_token_id": 3})
  (folder / "additional_chat_templates").mkdir()
  for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
    (folder / name).write_text("{{ messages }}")
  (folder / "README.md").write_text("decides nothing")
  checked = check_checkpoint(folder)
  files = checked.deciding_files()
  assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                        "generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"}
  assert all(file == folder / name for name, file in files.items())
  model = Model(checked.config)
  export(load_params(checked, model), model, tmp_path / "copy", source=folder)
  assert set(check_checkpoint(tmp_path / "copy").deciding_files()) == set(files)


def test_weights_are_read_in_the_precision_that_is_asked_for(tmp_path: pathlib.Path) -> None:
  found = leaves(write(tmp_path, bare(weights())), dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.bfloat16)}
