"""Hugging Face checkpoints in: checked from their headers first, then read by slice, without torch."""

import contextlib
import dataclasses
import difflib
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, SingleDeviceSharding

from relearn_jax.errors import InputError
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.parallel.mesh import weight_shardings

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")  # never *.bin: pickles run code
FLOATS = ("F32", "F16", "BF16")
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
AGAIN = "copy or download the file again"


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


def resolve(name: str | pathlib.Path, field: str = "--model") -> pathlib.Path:
  """A local folder, or a hub id fetched into the hub's own cache (offline: found there); `field` is for messages.

  Raises:
    InputError: it is neither, the repository is gated, or the hub cannot be reached.
  """
  path = pathlib.Path(name).expanduser()
  siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
  near = difflib.get_close_matches(path.name, siblings, 1)
  hint = f" (there is {path.parent / near[0]})" if near else ""
  if path.is_dir():
    return path
  if path.exists():
    raise InputError("is a file", file=path, field=field, mend="give the folder that holds config.json")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
    raise InputError(f"does not exist{hint}, and is no hub id (owner/name)", file=path, field=field,
                     mend="give an existing folder or a hub id")
  import huggingface_hub
  from huggingface_hub import errors
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(WANTED)))
  except errors.GatedRepoError:
    mend = "accept its licence on the hub, then set HF_TOKEN"
    raise InputError("is gated", file=name, field=field, mend=mend) from None
  except errors.RepositoryNotFoundError:
    raise InputError(f"is neither a local folder{hint} nor a repository that the hub shows you", file=name,
                     field=field, mend="check the spelling, or set HF_TOKEN if it is private") from None
  except errors.HFValidationError as error:
    raise InputError(f"does not exist{hint}, and is no hub id ({error})", file=name, field=field,
                     mend="give an existing folder or a hub id") from None
  except Exception as error:  # its own kinds, the disk's and those of the HTTP library below it
    raise InputError(f"is no local folder{hint}, and cannot be fetched from the hub ({type(error).__name__})",
                     file=name, field=field,
                     mend="give a local folder, or download the checkpoint while online") from None


def read_json(path: pathlib.Path, mend: str) -> dict[str, Any]:
  """A JSON object from a file of a checkpoint; `InputError` if there is none."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError("does not exist", file=path, mend=mend) from None
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, mend=mend) from None
  except (ValueError, RecursionError) as error:  # malformed JSON, or no UTF-8
    raise InputError(f"is no JSON ({error})", file=path, mend=mend) from None
  if not isinstance(values, dict):
    raise InputError("is no JSON object", file=path, mend=mend)
  return values


def read_header(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Tensor name -> dtype, shape and offsets of a safetensors file, checked against its size.

  Raises:
    InputError: the file is unreadable, truncated or too long, or its header does not fit it.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 or length > size - 8:
        raise InputError(f"is truncated ({size} bytes, its header alone needs {length + 8})", file=path, mend=AGAIN)
      header = json.loads(file.read(length))
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, mend=AGAIN) from None
  except InputError:
    raise
  except (ValueError, RecursionError):
    raise InputError("has no safetensors header", file=path, mend=AGAIN) from None
  if not isinstance(header, dict):
    raise InputError("has a header that is no JSON object", file=path, mend=AGAIN)
  tensors = {name: about for name, about in header.items() if name != "__metadata__"}
  end = 0
  for name, about in sorted(tensors.items(), key=lambda item: _begin(path, *item)):
    begin, stop = about["data_offsets"]
    if begin != end:  # the format has neither holes nor overlaps
      raise InputError(f"has data_offsets {[begin, stop]}, but the tensor before it ends at {end}", file=path,
                       field=name, mend=AGAIN)
    item = ITEM_BYTES.get(about["dtype"])
    if item is not None and stop - begin != math.prod(about["shape"]) * item:
      raise InputError(f"has {stop - begin} bytes, but its shape {tuple(about['shape'])} of {about['dtype']} needs "
                       f"{math.prod(about['shape']) * item}", file=path, field=name, mend=AGAIN)
    end = stop
  whole = 8 + length + end
  if size != whole:
    long = f"has {size - whole} bytes after its tensors"
    raise InputError(long if size > whole else f"is truncated ({size} of {whole} bytes)", file=path, mend=AGAIN)
  return tensors


def _begin(path: pathlib.Path, name: str, about: Any) -> tuple[int, int]:
  """A tensor's offsets; `InputError` if its header entry is not of the format's form."""
  def sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
  if not isinstance(about, dict):
    raise InputError("has a header entry that is no JSON object", file=path, field=name, mend=AGAIN)
  offsets: Any = about.get("data_offsets")
  ok = {"dtype": isinstance(about.get("dtype"), str), "shape": sizes(about.get("shape")),
        "data_offsets": sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]}
  for part, good in ok.items():
    if not good:
      what = f"has {part} {about[part]!r}" if part in about else f"has no {part}"
      raise InputError(f"{what} in the header", file=path, field=name, mend=AGAIN)
  return offsets[0], offsets[1]


def read_index(index: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> file, from the index of a sharded checkpoint.

  Raises:
    InputError: the index is malformed, or names a file that is not there.
  """
  weight_map = read_json(index, "download the checkpoint again").get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    problem = "is missing" if weight_map is None else f"is {str(weight_map)[:60]!r}"
    raise InputError(problem, file=index, field="weight_map", mend="expected an object: tensor name to file name")
  for name, file in weight_map.items():
    # A path out of the folder would read files that are no part of the checkpoint.
    if not isinstance(file, str) or not file or pathlib.PurePath(file).name != file:
      raise InputError(f"is {file!r}", file=index, field=f"weight_map.{name}",
                       mend="expected the name of a file in the same folder")
  if missing := sorted(file for file in set(weight_map.values()) if not (index.parent / file).is_file()):
    verb = "does" if len(missing) == 1 else "do"
    raise InputError(f"names {', '.join(missing)}, which {verb} not exist", file=index, field="weight_map",
                     mend="download the missing files")
  return {name: index.parent / file for name, file in weight_map.items()}


def weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, pathlib.Path] | None]:
  """The safetensors files of a checkpoint, and its index if it has one.

  Raises:
    InputError: there are none, or only pickled ones, or the index does not fit the files.
  """
  index = folder / INDEX
  if index.exists():
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    if (folder / SINGLE).exists() and folder / SINGLE not in files:
      raise InputError(f"names other files than {SINGLE}, which is there too", file=index, field="weight_map",
                       mend="remove the one that is out of date")
    return files, weight_map
  if (folder / SINGLE).exists():
    return [folder / SINGLE], None
  if files := sorted(folder.glob("*.safetensors")):
    return files, None
  if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
    raise InputError(f"has only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded",
                     file=folder,
                     mend="convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(...)"
                          ".save_pretrained(...)")
  raise InputError("has no weights", file=folder, mend=f"expected {SINGLE}")


def check_checkpoint(path: str | pathlib.Path) -> Checked:
  """Finds what is wrong with a checkpoint folder from its configuration and headers alone.

  No weight is read and no device is used.

  Raises:
    InputError: naming the file, and the field or tensor.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise InputError("is a file" if folder.exists() else "does not exist", file=folder,
                     mend="give the folder that holds config.json")
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
  files, weight_map = weight_files(folder)
  headers = {file: read_header(file) for file in files}
  for name, file in (weight_map or {}).items():
    if name not in headers[file]:
      raise InputError(f"is in {file.name} by the index, but not in that file", file=folder / INDEX,
                       field=f"weight_map.{name}", mend="give the index that belongs to these files")
  for file, header in headers.items():
    for name, about in header.items():
      # A tied checkpoint may repeat the embedding as its head; old ones store rotary tables.
      if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
        continue
      if name in found:
        raise InputError(f"is also in {found[name].name}", file=file, field=name, mend="remove one of the two")
      if weight_map is not None and weight_map.get(name) != file:
        raise InputError(f"is not in {INDEX}", file=file, field=name, mend="give the index that belongs to these files")
      if name not in expected:
        raise InputError("has no place in the model that config.json describes", file=file, field=name,
                         mend="give the config.json that belongs to these weights")
      if tuple(about["shape"]) != expected[name]:
        raise InputError(f"has shape {tuple(about['shape'])}, but config.json asks for {expected[name]}", file=file,
                         field=name, mend="give the config.json that belongs to these weights")
      if about["dtype"] not in FLOATS:
        raise InputError(f"has dtype {about['dtype']}", file=file, field=name,
                         mend=f"expected one of {', '.join(FLOATS)}")
      found[name] = file
  if missing := sorted(expected.keys() - found.keys()):
    raise InputError(f"is missing (and {len(missing) - 1} more)" if len(missing) > 1 else "is missing", file=folder,
                     field=missing[0], mend="give a complete checkpoint whose config.json fits its weights")
  return Checked(folder, config, found)


def load_params(checked: Checked, model: Model, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
  """Reads the weights straight into stacked `[layers, ...]` leaves.

  Each device's part is read by slice, so that the host holds one such part at a time, whatever the
  model's size, and a process reads only what its own devices hold.

  Args:
    checked: from `check_checkpoint`.
    model: its model.
    dtype: of the parameters in memory.
    mesh: the leaves lie on it as `parallel.rules` says; by default on the first device.

  Raises:
    InputError: a weight is NaN or infinite; or is too large for `dtype`.
  """
  # Opened for each leaf: a mapped file's pages count as this process's memory until it is closed.
  def tensor(file: Any, name: str, index: tuple[slice, ...]) -> np.ndarray:
    stored = file.get_slice(name)[index]
    with np.errstate(over="ignore"):
      values = stored.astype(dtype, copy=False)
    if not np.isfinite(values).all():
      bad = "is NaN or infinite" if not np.isfinite(stored).all() else f"is too large for {np.dtype(dtype).name}"
      raise InputError(f"has a value that {bad}", file=checked.files[name], field=name,
                       mend="give a checkpoint whose weights are finite" if "NaN" in bad else "load it as float32")
    return values

  shardings = {}
  if mesh is not None:
    shardings = flatten(weight_shardings(model.abstract(), model.axes(), mesh, stacked=False))
  first = SingleDeviceSharding(jax.local_devices()[0])

  def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    name = model.names[path]

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # the shape has axes
      layers = range(*index[0].indices(shape.shape[0])) if "{i}" in name else ()
      names = [name.format(i=i) for i in layers] or [name]
      rest = index[1:] if layers else index
      with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(safetensors.safe_open(file, "numpy"))
                 for file in {checked.files[n] for n in names}}
        if not layers:
          return tensor(files[checked.files[name]], name, rest)
        first = tensor(files[checked.files[names[0]]], names[0], rest)
        out = np.empty((len(names), *first.shape), first.dtype)
        out[0] = first
        for row, n in zip(out[1:], names[1:], strict=True):
          row[...] = tensor(files[checked.files[n]], n, rest)
        return out
    return jax.make_array_from_callback(shape.shape, shardings.get(path, first), part)

  return unflatten({path: leaf(path, shape) for path, shape in flatten(model.abstract()).items()})


def read_tensors(file: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
  """Whole tensors of one file, as they are stored; `InputError` for one that is not finite."""
  with safetensors.safe_open(file, "numpy") as handle:
    tensors = [handle.get_tensor(name) for name in names]
  for name, tensor in zip(names, tensors, strict=True):
    if not np.isfinite(tensor).all():
      raise InputError("has a value that is NaN or infinite", file=file, field=name,
                       mend="give weights that are finite")
  return tensors


def load_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Any:
  """The checkpoint's own tokenizer.

  Raises:
    InputError: there is none, it is damaged or empty, or it has more tokens (added ones included)
      than the embedding has rows.
  """
  from transformers import AutoTokenizer
  found = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).exists()]
  if not found:
    raise InputError("does not exist", file=folder / "tokenizer.json",
                     mend="copy the checkpoint's tokenizer files here")
  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the library raises many kinds for a damaged file
    raise InputError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})", file=found[0],
                     mend="copy the checkpoint's tokenizer files again") from None
  ids = tokenizer.get_vocab().values()
  if not ids:
    raise InputError("has no tokens", file=found[0], mend="copy the checkpoint's tokenizer files again")
  # Ids may have gaps, and a token added twice counts twice: neither number bounds the other.
  if (needed := max(max(ids) + 1, len(tokenizer))) > config.vocab_size:
    raise InputError(f"is {config.vocab_size}, but the tokenizer needs {needed} ids (its largest is {max(ids)})",
                     file=folder / "config.json", field="vocab_size",
                     mend="give the tokenizer that belongs to this checkpoint")
  return tokenizer


def open_checkpoint(name: str, field: str = "--model") -> tuple[Checked, Any]:
  """A checkpoint and its tokenizer, checked without a device.

  Args:
    name: folder or hub id.
    field: what messages call it.

  Raises:
    InputError: it is not found, or something is wrong with it.
  """
  checked = check_checkpoint(resolve(name, field))
  return checked, load_tokenizer(checked.path, checked.config)
