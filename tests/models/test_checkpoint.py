"""Checkpoints in and out: every kind of damage is named, and a round trip changes no bit."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from relearn_jax.models.checkpoint import check_checkpoint
from relearn_jax.models.safetensor_files import INDEX, read_json

from .tiny import (
    CONFIG,
    header_of,
    refuses,
    weights,
    write,
    write_header,
    write_json,
    write_sharded,
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
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
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
