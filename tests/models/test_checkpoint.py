"""Checkpoints in and out: every kind of damage is named, and a round trip changes no bit."""

import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors

from relearn_jax.models import export as export_module
from relearn_jax.models.checkpoint import INDEX, check_checkpoint, load_params, load_tokenizer, read_json, resolve
from relearn_jax.models.export import export, hf_tensors
from relearn_jax.models.model import Model, fingerprint, flatten
from relearn_jax.parallel.mesh import runs_mesh

from .tiny import (
    CONFIG,
    DTYPES,
    header_of,
    refuses,
    weights,
    write,
    write_header,
    write_json,
    write_sharded,
    write_tokenizer,
)

NORM = "model.norm.weight"
AGAIN = "copy or download the file again"
BELONGS = "give the config.json that belongs to these weights"


def test_a_good_checkpoint_passes(tmp_path: pathlib.Path) -> None:
  checked = check_checkpoint(write(tmp_path / "one"))
  assert set(checked.files) == set(weights()) and checked.config.num_layers == 2
  sharded = check_checkpoint(str(write_sharded(tmp_path / "two")))
  assert {file.name for file in sharded.files.values()} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
  (tmp_path / "two" / INDEX).unlink()
  assert check_checkpoint(tmp_path / "two").files == sharded.files


def test_rotary_tables_and_a_repeated_tied_head_are_left_out(tmp_path: pathlib.Path) -> None:
  tensors = weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
  checked = check_checkpoint(write(tmp_path, tensors, tie_word_embeddings=True))
  assert set(checked.files) == set(weights()) - {"lm_head.weight"}


# Folder and config.json.


def test_missing_folder(tmp_path: pathlib.Path) -> None:
  with refuses("does not exist", file=tmp_path / "no", mend="give the folder that holds config.json"):
    check_checkpoint(tmp_path / "no")


def test_a_file_for_a_folder(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path) / "config.json"
  with refuses("is a file", file=file, mend="give the folder that holds config.json"):
    check_checkpoint(file)


def test_missing_config(tmp_path: pathlib.Path) -> None:
  with refuses("does not exist", file=tmp_path / "config.json", mend="give the folder of a Hugging Face checkpoint"):
    check_checkpoint(tmp_path)


def test_unreadable_config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (tmp_path / "config.json").mkdir()
  with refuses("cannot be read", file=tmp_path / "config.json", mend="give the folder"):
    check_checkpoint(tmp_path)

  def denied(*_: object, **__: object) -> str:
    raise PermissionError(13, "Permission denied")
  monkeypatch.setattr(pathlib.Path, "read_text", denied)
  with refuses("cannot be read (Permission denied)", file=tmp_path / "config.json", mend="allow"):
    read_json(tmp_path / "config.json", "allow it")


@pytest.mark.parametrize(("content", "problem"), [
    (b"{", "is no JSON"), (b"\xff\xfe{}", "is no JSON"), (b"[" * 100_000, "is no JSON"), (b"[1]", "is no JSON object")])
def test_malformed_config(tmp_path: pathlib.Path, content: bytes, problem: str) -> None:
  (tmp_path / "config.json").write_bytes(content)
  with refuses(problem, file=tmp_path / "config.json", mend="give the folder of a Hugging Face checkpoint"):
    check_checkpoint(tmp_path)


def test_another_architecture(tmp_path: pathlib.Path) -> None:
  with refuses("is 'gpt2'", file=write(tmp_path, model_type="gpt2") / "config.json", field="model_type",
               mend="use a checkpoint of one of: llama"):
    check_checkpoint(tmp_path)


def test_missing_field_and_wrong_type(tmp_path: pathlib.Path) -> None:
  with refuses("is null", file=write(tmp_path, vocab_size=None) / "config.json", field="vocab_size", mend="state"):
    check_checkpoint(tmp_path)
  write_json(tmp_path / "config.json", {name: value for name, value in CONFIG.items() if name != "vocab_size"})
  with refuses("is missing", file=tmp_path / "config.json", field="vocab_size", mend="state the model's vocab_size"):
    check_checkpoint(tmp_path)
  with refuses("is '12'", file=write(tmp_path, vocab_size="12") / "config.json", field="vocab_size",
               mend="expected int"):
    check_checkpoint(tmp_path)


# Weight files.


def test_no_weights(tmp_path: pathlib.Path) -> None:
  write_json(tmp_path / "config.json", CONFIG)
  with refuses("has no weights", file=tmp_path, mend="expected model.safetensors"):
    check_checkpoint(tmp_path)


def test_pickled_weights_only(tmp_path: pathlib.Path) -> None:
  write_json(tmp_path / "config.json", CONFIG)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
  with refuses("only pickled weights (pytorch_model.bin)", file=tmp_path, mend="convert it where you trust it"):
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_weights(tmp_path: pathlib.Path, keep: int) -> None:
  file = write(tmp_path) / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with refuses("is truncated", file=file, mend=AGAIN):
    check_checkpoint(tmp_path)


def test_trailing_bytes(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path) / "model.safetensors"
  file.write_bytes(file.read_bytes() + b"123")
  with refuses("has 3 bytes after its tensors", file=file, mend=AGAIN):
    check_checkpoint(tmp_path)


def test_weights_that_are_a_folder(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path) / "model.safetensors"
  file.unlink()
  file.mkdir()
  with refuses("cannot be read", file=file, mend=AGAIN):
    check_checkpoint(tmp_path)


def test_header_that_is_none(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path) / "model.safetensors"
  write_header(file, [1, 2], b"")
  with refuses("has a header that is no JSON object", file=file, mend=AGAIN):
    check_checkpoint(tmp_path)
  file.write_bytes((6).to_bytes(8, "little") + b"<html>")
  with refuses("has no safetensors header", file=file, mend=AGAIN):
    check_checkpoint(tmp_path)


@pytest.mark.parametrize(("change", "problem"), [
    (7, "has a header entry that is no JSON object"),
    ({"dtype": None}, "has no dtype"),
    ({"shape": None}, "has no shape"),
    ({"data_offsets": None}, "has no data_offsets"),
    ({"data_offsets": [0]}, "has data_offsets [0]"),
    ({"data_offsets": [8, 4]}, "has data_offsets [8, 4]"),
    ({"shape": [-8]}, "has shape [-8]"),
    ({"shape": "8"}, "has shape '8'"),
    ({"shape": [9]}, "has 32 bytes, but its shape (9,) of F32 needs 36"),
    ({"dtype": "F16"}, "has 32 bytes, but its shape (8,) of F16 needs 16"),
])
def test_damaged_header_entry(tmp_path: pathlib.Path, change: object, problem: str) -> None:
  file = write(tmp_path) / "model.safetensors"
  header, data = header_of(file)
  header[NORM] = change if not isinstance(change, dict) else {
      part: value for part, value in (header[NORM] | change).items() if value is not None}
  write_header(file, header, data)
  with refuses(problem, file=file, field=NORM, mend=AGAIN):
    check_checkpoint(tmp_path)


def test_tensors_that_overlap(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path) / "model.safetensors"
  header, data = header_of(file)
  names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
  header[names[1]]["data_offsets"] = [n - 4 for n in header[names[1]]["data_offsets"]]
  write_header(file, header, data)
  with refuses("but the tensor before it ends at", file=file, field=names[1], mend=AGAIN):
    check_checkpoint(tmp_path)


# The index of a sharded checkpoint.


def change_index(folder: pathlib.Path, **entries: object) -> pathlib.Path:
  index = folder / INDEX
  values = json.loads(index.read_text())
  values["weight_map"] |= entries
  values["weight_map"] = {name: file for name, file in values["weight_map"].items() if file is not None}
  write_json(index, values)
  return index


def test_index_naming_missing_files(tmp_path: pathlib.Path) -> None:
  index = write_sharded(tmp_path) / INDEX
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with refuses("names model-00002-of-00002.safetensors, which does not exist", file=index, field="weight_map",
               mend="download the missing files"):
    check_checkpoint(tmp_path)
  (tmp_path / "model-00001-of-00002.safetensors").unlink()
  with refuses("names model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, which do not exist",
               file=index, field="weight_map", mend="download the missing files"):
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [3, ["a"], "../model.safetensors", "/model.safetensors", ""])
def test_index_entry_that_is_no_file_name(tmp_path: pathlib.Path, value: object) -> None:
  index = change_index(write_sharded(tmp_path), **{NORM: value})
  with refuses(f"is {value!r}", file=index, field=f"weight_map.{NORM}", mend="expected the name of a file"):
    check_checkpoint(tmp_path)


@pytest.mark.parametrize(("values", "problem"), [({}, "is missing"), ({"weight_map": ["a"]}, "is \"['a']\""),
                                                 ({"weight_map": {}}, "is '{}'")])
def test_index_without_a_map(tmp_path: pathlib.Path, values: dict, problem: str) -> None:
  index = write_sharded(tmp_path) / INDEX
  write_json(index, values)
  with refuses(problem, file=index, field="weight_map", mend="expected an object"):
    check_checkpoint(tmp_path)


def test_index_that_names_the_wrong_shard(tmp_path: pathlib.Path) -> None:
  index = change_index(write_sharded(tmp_path), **{NORM: "model-00002-of-00002.safetensors"})
  with refuses("is in model-00002-of-00002.safetensors by the index, but not in that file", file=index,
               field=f"weight_map.{NORM}", mend="give the index that belongs to these files"):
    check_checkpoint(tmp_path)


def test_tensor_that_the_index_leaves_out(tmp_path: pathlib.Path) -> None:
  change_index(write_sharded(tmp_path), **{NORM: None})
  with refuses(f"is not in {INDEX}", file=tmp_path / "model-00001-of-00002.safetensors", field=NORM,
               mend="give the index that belongs to these files"):
    check_checkpoint(tmp_path)


def test_index_beside_a_single_file(tmp_path: pathlib.Path) -> None:
  write_sharded(write(tmp_path))
  with refuses("names other files than model.safetensors", file=tmp_path / INDEX, field="weight_map",
               mend="remove the one that is out of date"):
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_duplicate_tensor_across_shards(tmp_path: pathlib.Path, indexed: bool) -> None:
  second = write_sharded(tmp_path) / "model-00002-of-00002.safetensors"
  tensors = safetensors.numpy.load_file(second)
  safetensors.numpy.save_file(tensors | {NORM: weights()[NORM]}, second)
  if not indexed:
    (tmp_path / INDEX).unlink()
  with refuses("is also in model-00001-of-00002.safetensors", file=second, field=NORM, mend="remove one of the two"):
    check_checkpoint(tmp_path)


# Tensors against config.json.


def test_unused_tensor(tmp_path: pathlib.Path) -> None:
  name = "model.layers.2.mlp.up_proj.weight"
  write(tmp_path, weights() | {name: np.zeros((10, 8), np.float32)})
  with refuses("has no place in the model", file=tmp_path / "model.safetensors", field=name, mend=BELONGS):
    check_checkpoint(tmp_path)


def test_missing_tensors(tmp_path: pathlib.Path) -> None:
  tensors = weights()
  del tensors[NORM]
  with refuses("is missing", file=write(tmp_path, tensors), field=NORM, mend="give a complete checkpoint"):
    check_checkpoint(tmp_path)
  with refuses("is missing (and 8 more)", file=write(tmp_path, num_hidden_layers=3),
               field="model.layers.2.input_layernorm.weight", mend="give a complete checkpoint"):
    check_checkpoint(tmp_path)


def test_shape_that_contradicts_the_config(tmp_path: pathlib.Path) -> None:
  write(tmp_path, vocab_size=13)
  with refuses("has shape (12, 8), but config.json asks for (13, 8)", file=tmp_path / "model.safetensors",
               field="lm_head.weight", mend=BELONGS):
    check_checkpoint(tmp_path)


def test_integer_tensor(tmp_path: pathlib.Path) -> None:
  write(tmp_path, weights() | {NORM: np.ones(8, np.int32)})
  with refuses("has dtype I32", file=tmp_path / "model.safetensors", field=NORM, mend="expected one of F32, F16, BF16"):
    check_checkpoint(tmp_path)


def test_checks_need_no_device(tmp_path: pathlib.Path) -> None:
  good, bad = write(tmp_path / "good"), write(tmp_path / "bad", vocab_size=13)
  code = ("import sys, jax\n"
          "from relearn_jax.errors import InputError\n"
          "from relearn_jax.models.checkpoint import check_checkpoint\n"
          "print(len(check_checkpoint(sys.argv[1]).files))\n"
          "try: check_checkpoint(sys.argv[2])\n"
          "except InputError as error: print(error)\n"
          "try: jax.devices()\n"
          "except RuntimeError: print('no device')\n")
  done = subprocess.run([sys.executable, "-c", code, str(good), str(bad)], text=True, capture_output=True,
                        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"}, timeout=120)
  assert done.returncode == 0, done.stderr
  count, message, last = done.stdout.splitlines()
  assert count == str(len(weights())) and last == "no device"
  assert message.startswith(f"{bad / 'model.safetensors'}: `lm_head.weight` has shape (12, 8)")


# Tokenizers.


def config_of(folder: pathlib.Path):
  return check_checkpoint(folder).config


def test_tokenizer_that_fits(tmp_path: pathlib.Path) -> None:
  write_tokenizer(write(tmp_path), 10, added=2)
  assert len(load_tokenizer(tmp_path, config_of(tmp_path))) == 12


def test_no_tokenizer(tmp_path: pathlib.Path) -> None:
  with refuses("does not exist", file=write(tmp_path) / "tokenizer.json", mend="copy the checkpoint's tokenizer files"):
    load_tokenizer(tmp_path, config_of(tmp_path))


def test_damaged_tokenizer(tmp_path: pathlib.Path) -> None:
  (write(tmp_path) / "tokenizer.json").write_text("{")
  with refuses("cannot be read", file=tmp_path / "tokenizer.json", mend="copy the checkpoint's tokenizer files again"):
    load_tokenizer(tmp_path, config_of(tmp_path))


def test_empty_tokenizer(tmp_path: pathlib.Path) -> None:
  write_tokenizer(write(tmp_path), 0)
  with refuses("has no tokens", file=tmp_path / "tokenizer.json", mend="copy the checkpoint's tokenizer files again"):
    load_tokenizer(tmp_path, config_of(tmp_path))


@pytest.mark.parametrize(("size", "added", "needs"), [(13, 0, 13), (12, 3, 15)])
def test_tokenizer_larger_than_the_embedding(tmp_path: pathlib.Path, size: int, added: int, needs: int) -> None:
  write_tokenizer(write(tmp_path), size, added)
  with refuses(f"is 12, but the tokenizer needs {needs} ids", file=tmp_path / "config.json", field="vocab_size",
               mend="give the tokenizer that belongs to this checkpoint"):
    load_tokenizer(tmp_path, config_of(tmp_path))


# Names of models.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
  """A working directory with a folder `models/tofu`, and no hub."""
  (tmp_path / "models" / "tofu").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  return tmp_path


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
  def download(*_: object, **__: object) -> str:
    raise error
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_resolve_a_folder(offline: pathlib.Path) -> None:
  assert resolve("models/tofu") == pathlib.Path("models/tofu")
  assert resolve(offline / "models" / "tofu") == offline / "models" / "tofu"


def test_resolve_a_file(offline: pathlib.Path) -> None:
  (offline / "x").touch()
  with refuses("is a file", file=offline / "x", field="--model", mend="give the folder that holds config.json"):
    resolve(offline / "x")


@pytest.mark.parametrize("name", ["./models/tofo", "models/tofu/", "/models/none", "models/a/b", "tofu", "../models/t"])
def test_resolve_a_mistyped_path(offline: pathlib.Path, name: str) -> None:
  if name == "models/tofu/":
    assert resolve(name).is_dir()
    return
  hint = f" (there is {pathlib.Path('models/tofu')})" if name == "./models/tofo" else ""
  with refuses(f"does not exist{hint}, and is no hub id (owner/name)", file=pathlib.Path(name), field="--model",
               mend="give an existing folder or a hub id"):
    resolve(name)


def test_resolve_a_mistyped_path_that_could_be_a_hub_id(offline: pathlib.Path) -> None:
  with refuses(f"is no local folder (there is {pathlib.Path('models/tofu')}), and cannot be fetched from the hub",
               file="models/tofo", field="--model", mend="give a local folder, or download the checkpoint"):
    resolve("models/tofo")
  with refuses("is no hub id", file="owner/two--dashes", field="--model", mend="give an existing folder or a hub id"):
    resolve("owner/two--dashes")


def test_resolve_what_the_hub_refuses(offline: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  bare = lambda kind: kind.__new__(kind)  # they want an HTTP response
  hub_raises(monkeypatch, bare(errors.GatedRepoError))
  with refuses("is gated", file="owner/name", field="--model", mend="accept its licence on the hub, then set HF_TOKEN"):
    resolve("owner/name")
  hub_raises(monkeypatch, bare(errors.RepositoryNotFoundError))
  with refuses("nor a repository that the hub shows you", file="owner/name", field="--model",
               mend="check the spelling"):
    resolve("owner/name")
  hub_raises(monkeypatch, ConnectionError())
  with refuses("cannot be fetched from the hub (ConnectionError)", file="owner/name", field="--model", mend="online"):
    resolve("owner/name")


# Round trips.


def load(folder: pathlib.Path, **options):
  checked = check_checkpoint(folder)
  model = Model(checked.config)
  return model, load_params(checked, model, **options)


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {name: value for file in folder.glob("*.safetensors")
          for name, value in safetensors.numpy.load_file(file).items()}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype and ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bitwise(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, dtype: str, sharded: bool
                               ) -> None:
  monkeypatch.setattr(export_module, "SHARD_BYTES", 600 if sharded else 10**9)
  source = write(tmp_path / "source", weights(DTYPES[dtype]))
  # In the file's dtype, and through fp32 back to it: both lose nothing.
  for name, memory, disk in (("own", DTYPES[dtype], None), ("wide", jnp.float32, DTYPES[dtype])):
    model, params = load(source, dtype=memory, mesh=runs_mesh())
    assert all(leaf.dtype == memory for leaf in jax.tree.leaves(params))
    export(params, model, tmp_path / name, dtype=disk)
    assert (tmp_path / name / INDEX).exists() == sharded
    assert len(list((tmp_path / name).glob("*.safetensors"))) > 1 or not sharded
    assert_same_bits(tensors_of(tmp_path / name), weights(DTYPES[dtype]))
    assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
    again = load(tmp_path / name, dtype=memory)[1]
    assert fingerprint(again) == fingerprint(params)
  assert {file.name for file in tmp_path.iterdir()} == {"source", "own", "wide"}


def test_leaves_are_stacked(tmp_path: pathlib.Path) -> None:
  _, params = load(write(tmp_path), mesh=runs_mesh())
  expected = np.stack([weights()[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)])
  np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["weight"], expected)


def test_loading_over_several_devices(tmp_path: pathlib.Path) -> None:
  """Each device reads its own slice, and all together hold the same bits."""
  code = ("import sys, jax, numpy as np\n"
          "from relearn_jax.models.checkpoint import check_checkpoint, load_params\n"
          "from relearn_jax.models.model import Model, fingerprint\n"
          "from relearn_jax.parallel.mesh import make_mesh, parse_mesh\n"
          "checked = check_checkpoint(sys.argv[1]); model = Model(checked.config)\n"
          "print(fingerprint(load_params(checked, model)))\n"
          "for text, shape in (('runs:8', (10, 8)), ('fsdp:8', (10, 1)), ('data:2,fsdp:4', (10, 2)),\n"
          "                    ('fsdp:4,tensor:2', (5, 2))):\n"
          "  params = load_params(checked, model, mesh=make_mesh(parse_mesh(text)))\n"
          "  gate = params['layers']['mlp']['gate']['weight']\n"
          "  assert {s.data.shape[1:] for s in gate.addressable_shards} == {shape}, (text, gate.sharding)\n"
          "  assert {s.data.shape for s in params['final_norm']['weight'].addressable_shards} == {(8,)}\n"
          "  print(fingerprint(params))\n")
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run([sys.executable, "-c", code, str(write(tmp_path))], text=True, capture_output=True,
                        env=environment, timeout=120)
  assert done.returncode == 0, done.stderr
  assert set(done.stdout.split()) == {fingerprint(load(tmp_path)[1])} and len(done.stdout.split()) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite(tmp_path: pathlib.Path, value: float, dtype: str) -> None:
  tensors = weights(DTYPES[dtype])
  name = "model.layers.1.mlp.up_proj.weight"
  tensors[name][3, 2] = value
  folder = write(tmp_path, tensors)
  with refuses("has a value that is NaN or infinite", file=folder / "model.safetensors", field=name,
               mend="give a checkpoint whose weights are finite"):
    load(folder)


def test_weights_too_large_for_the_precision_in_memory(tmp_path: pathlib.Path) -> None:
  tensors = weights()
  tensors[NORM][0] = 1e30
  folder = write(tmp_path, tensors)
  with refuses("is too large for float16", file=folder / "model.safetensors", field=NORM, mend="load it as float32"):
    load(folder, dtype=jnp.float16)
  load(folder, dtype=jnp.bfloat16)


def test_mixed_dtypes_are_kept(tmp_path: pathlib.Path) -> None:
  model, params = load(write(tmp_path / "source"), dtype=jnp.bfloat16)
  params["final_norm"]["weight"] = params["final_norm"]["weight"].astype(jnp.float32)
  export(params, model, tmp_path / "mixed")
  stored = {name: value.dtype.name for name, value in tensors_of(tmp_path / "mixed").items()}
  assert stored.pop(NORM) == "float32" and set(stored.values()) == {"bfloat16"}
  assert json.loads((tmp_path / "mixed" / "config.json").read_text())["dtype"] == "bfloat16"
  export(params, model, tmp_path / "plain", dtype="float16")
  assert {value.dtype.name for value in tensors_of(tmp_path / "plain").values()} == {"float16"}


def test_export_takes_the_sources_other_files(tmp_path: pathlib.Path) -> None:
  source = write(tmp_path / "source")
  write_tokenizer(source, 12)
  write_json(source / "generation_config.json", {"eos_token_id": [2, 3]})
  model, params = load(source)
  export(params, model, tmp_path / "copied", source=source)
  export(params, model, tmp_path / "saved", source=source, tokenizer=load_tokenizer(source, model.config))
  for folder in (tmp_path / "copied", tmp_path / "saved"):
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert len(load_tokenizer(folder, model.config)) == 12
  mode = lambda name: (tmp_path / "copied" / name).stat().st_mode
  assert mode("model.safetensors") == mode("config.json")


def test_names_and_shapes_of_what_is_exported(tmp_path: pathlib.Path) -> None:
  model, params = load(write(tmp_path))
  assert {name: value().shape for name, value in hf_tensors(params, model)} == {
      name: value.shape for name, value in weights().items()}
  assert set(flatten(params)) == set(model.names) == set(flatten(model.abstract()))


def test_export_never_overwrites(tmp_path: pathlib.Path) -> None:
  model, params = load(write(tmp_path / "source"))
  (tmp_path / "empty").mkdir()
  export(params, model, tmp_path / "empty")
  check_checkpoint(tmp_path / "empty")
  for full in (tmp_path / "source", tmp_path / "source" / "config.json"):
    with refuses("exists and is not empty", file=full, field="--output", mend="give a new folder"):
      export(params, model, full)
  below = tmp_path / "source" / "config.json" / "out"
  with refuses("cannot be written", file=below, field="--output", mend="give a folder"):
    export(params, model, below)
  assert {p.name for p in tmp_path.iterdir()} == {"source", "empty"}
