"""What is loaded and what is exported: the same bits, on one device and several."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from relearn_jax.models import export as export_module
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.checkpoint_sources import load_tokenizer
from relearn_jax.models.export import export, hf_tensors
from relearn_jax.models.model import Model, fingerprint, flatten
from relearn_jax.models.safetensor_files import INDEX
from relearn_jax.parallel.mesh import runs_mesh

from .tiny import (
  CONFIG,
  DTYPES,
  refuses,
  weights,
  write,
  write_json,
  write_tokenizer,
)

NORM = "model.norm.weight"
AGAIN = "copy or download the file again"
BELONGS = "give the config.json that belongs to these weights"


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


def test_the_host_holds_one_part_at_a_time(tmp_path: pathlib.Path) -> None:
  """numpy's own memory at its peak, against the largest part of a device: never those of all devices at once."""
  code = ("import sys, tracemalloc, jax, numpy as np\n"
          "from relearn_jax.models.checkpoint import check_checkpoint, load_params\n"
          "from relearn_jax.models.model import Model\n"
          "from relearn_jax.parallel.mesh import make_mesh, parse_mesh\n"
          "checked = check_checkpoint(sys.argv[1]); model = Model(checked.config)\n"
          "for text in ('fsdp:1', 'fsdp:1', 'fsdp:8', 'data:4,fsdp:2'):\n"
          "  mesh = make_mesh(parse_mesh(text))\n"
          "  tracemalloc.start()\n"
          "  params = load_params(checked, model, mesh=mesh)\n"
          "  peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()\n"
          "  part = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))\n"
          "  print(text, peak / part)\n")
  sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32, "num_attention_heads": 8,
           "num_key_value_heads": 8, "head_dim": 32}
  config = parse_config(CONFIG | sizes, "config.json")
  model = Model(config)
  tensors = {name: np.ones(value().shape, ml_dtypes.bfloat16) for name, value in hf_tensors(
      jax.tree.map(lambda leaf: np.empty(leaf.shape, ml_dtypes.bfloat16), model.abstract()), model)}
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run([sys.executable, "-c", code, str(write(tmp_path, tensors, **sizes))], text=True,
                        capture_output=True, env=environment, timeout=120)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()[1:]  # the first load also traces the model
  assert len(lines) == 3 and all(float(line.split()[1]) < 2 for line in lines), done.stdout


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
