"""Hugging Face checkpoints in: checked from their headers first, then read by slice, without torch."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Sharding, SingleDeviceSharding

from relearn_jax.errors import InputError
from relearn_jax.models.config import ModelConfig, parse_config
from relearn_jax.models.model import Model, Params, flatten, unflatten

INDEX = "model.safetensors.index.json"
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")  # never *.bin: pickles run code
FLOATS = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Checked:
  """A checkpoint folder in which nothing was found wrong.

  Attributes:
    path: the folder.
    config: its architecture.
    files: tensor name -> file that holds it, for the tensors that are used.
  """

  path: pathlib.Path
  config: ModelConfig
  files: dict[str, pathlib.Path]


def resolve(name: str | pathlib.Path) -> pathlib.Path:
  """A local folder, or a hub id fetched into the hub's own cache.

  Raises:
    InputError: it is neither, the repository is gated, or the hub cannot be reached.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists():
    raise InputError("is a file", file=path, field="--model", mend="give the folder that holds config.json")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
    raise InputError("does not exist, and is no hub id (owner/name)", file=path, field="--model",
                     mend="give an existing folder or a hub id")
  import huggingface_hub
  from huggingface_hub import errors
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(WANTED)))
  except errors.GatedRepoError:
    mend = "accept its licence on the hub, then set HF_TOKEN"
    raise InputError("is gated", file=name, field="--model", mend=mend) from None
  except errors.RepositoryNotFoundError:
    raise InputError("is neither a local folder nor a repository that the hub shows you", file=name, field="--model",
                     mend="check the spelling, or set HF_TOKEN if it is private") from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
    raise InputError(f"is no local folder, and the hub cannot be reached ({type(error).__name__})", file=name,
                     field="--model", mend="give a local folder, or download the checkpoint while online") from None


def read_json(path: pathlib.Path, mend: str) -> dict[str, Any]:
  """A JSON object from a file of a checkpoint; `InputError` if there is none."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError("does not exist", file=path, mend=mend) from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"is no JSON ({error})", file=path, mend=mend) from None
  if not isinstance(values, dict):
    raise InputError("is no JSON object", file=path, mend=mend)
  return values


def read_header(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Tensor name -> dtype, shape and offsets of a safetensors file, whose size is checked against them."""
  mend = "copy or download the file again"
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise InputError(f"is truncated ({size} bytes, its header alone needs {length + 8})", file=path, mend=mend)
    try:
      header = json.loads(file.read(length))
    except (json.JSONDecodeError, UnicodeDecodeError):
      raise InputError("has no safetensors header", file=path, mend=mend) from None
  tensors = {name: about for name, about in header.items() if name != "__metadata__"}
  end = 8 + length + max((about["data_offsets"][1] for about in tensors.values()), default=0)
  if size < end:
    raise InputError(f"is truncated ({size} of {end} bytes)", file=path, mend=mend)
  return tensors


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint, by its index if it has one."""
  index = folder / INDEX
  if index.exists():
    weight_map = read_json(index, "download the checkpoint again").get("weight_map")
    if not isinstance(weight_map, dict):
      raise InputError("is missing", file=index, field="weight_map", mend="download the checkpoint again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
      if not file.exists():
        raise InputError(f"names {file.name}, which does not exist", file=index, field="weight_map",
                         mend="download the missing file")
    return files
  files = sorted(folder.glob("*.safetensors"))
  if files:
    return files
  if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
    raise InputError(f"has only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded", file=folder,
                     mend="convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(...)"
                          ".save_pretrained(..., safe_serialization=True)")
  raise InputError("has no weights", file=folder, mend="expected model.safetensors")


def check_checkpoint(path: str | pathlib.Path) -> Checked:
  """Finds what is wrong with a checkpoint folder from its configuration and headers alone.

  No weight is read and no device is used.

  Raises:
    InputError: naming the file, and the field or tensor.
  """
  folder = pathlib.Path(path)
  config_file = folder / "config.json"
  config = parse_config(read_json(config_file, "give the folder of a Hugging Face checkpoint"), str(config_file))
  model = Model(config)
  expected: dict[str, tuple[int, ...]] = {}
  for leaf, shape in flatten(model.abstract()).items():
    name = model.names[leaf]
    if "{i}" in name:
      expected |= {name.format(i=i): shape.shape[1:] for i in range(config.num_layers)}
    else:
      expected[name] = shape.shape
  found: dict[str, pathlib.Path] = {}
  for file in weight_files(folder):
    for name, about in read_header(file).items():
      # A tied checkpoint may repeat the embedding as its head; old ones store rotary tables.
      if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
        continue
      if name in found:
        raise InputError(f"is also in {found[name].name}", file=file, field=name, mend="remove one of the two")
      if name not in expected:
        raise InputError("has no place in the model that config.json describes", file=file, field=name,
                         mend="give the config.json that belongs to these weights")
      if tuple(about["shape"]) != expected[name]:
        raise InputError(f"has shape {tuple(about['shape'])}, but config.json asks for {expected[name]}", file=file,
                         field=name, mend="give the config.json that belongs to these weights")
      if about["dtype"] not in FLOATS:
        raise InputError(f"has dtype {about['dtype']}", file=file, field=name, mend=f"expected one of {', '.join(FLOATS)}")
      found[name] = file
  if missing := sorted(expected.keys() - found.keys()):
    raise InputError(f"is missing (and {len(missing) - 1} more)" if len(missing) > 1 else "is missing", file=folder,
                     field=missing[0], mend="give a complete checkpoint whose config.json fits its weights")
  return Checked(folder, config, found)


def load_params(checked: Checked, model: Model, *, dtype: Any = jnp.float32, sharding: Sharding | None = None) -> Params:
  """Reads the weights straight into stacked `[layers, ...]` leaves.

  Each device's part is read by slice, so the host holds one such part at a time.

  Args:
    checked: from `check_checkpoint`.
    model: its model.
    dtype: of the parameters in memory.
    sharding: of every leaf; the first device by default.
  """
  sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
  handles = {file: safetensors.safe_open(file, "numpy") for file in set(checked.files.values())}

  def tensor(name: str, index: tuple[slice, ...]) -> np.ndarray:
    return handles[checked.files[name]].get_slice(name)[index].astype(dtype)

  def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    name = model.names[path]

    def part(index: tuple[slice, ...]) -> np.ndarray:
      if "{i}" not in name:
        return tensor(name, index)
      layers = range(*index[0].indices(shape.shape[0]))
      return np.stack([tensor(name.format(i=i), index[1:]) for i in layers])
    return jax.make_array_from_callback(shape.shape, sharding, part)

  return unflatten({path: leaf(path, shape) for path, shape in flatten(model.abstract()).items()})


def load_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Any:
  """The checkpoint's own tokenizer.

  Raises:
    InputError: there is none, or it has more tokens than the embedding has rows.
  """
  from transformers import AutoTokenizer
  if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
    raise InputError("does not exist", file=folder / "tokenizer.json", mend="copy the checkpoint's tokenizer files here")
  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the library raises many kinds for a damaged file
    raise InputError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})", file=folder / "tokenizer.json",
                     mend="copy the checkpoint's tokenizer files again") from None
  largest = max(tokenizer.get_vocab().values())
  if largest >= config.vocab_size:
    raise InputError(f"is {config.vocab_size}, but the tokenizer has the id {largest}", file=folder / "config.json",
                     field="vocab_size", mend="give the tokenizer that belongs to this checkpoint")
  return tokenizer
