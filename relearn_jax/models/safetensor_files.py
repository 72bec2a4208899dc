"""The files of a checkpoint: JSON, safetensors headers, indices; whatever is damaged in them is named."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from relearn_jax.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F32", "F16", "BF16")
NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32}
ADAPTERS = "adapter_model*"  # weights of an adapter, which may lie beside those of its base
CHUNK = 2**24  # bytes that are read at once, where a file is not mapped
AGAIN = "copy or download the file again"


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
  mine = lambda pattern: sorted(p for p in folder.glob(pattern) if not p.match(ADAPTERS))
  if files := mine("*.safetensors"):
    return files, None
  if pickles := [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in mine(pattern)]:
    raise InputError(f"has only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded",
                     file=folder,
                     mend="convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(...)"
                          ".save_pretrained(...)")
  raise InputError("has no weights", file=folder, mend=f"expected {SINGLE}")


def read_tensors(file: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
  """Whole tensors of one file, as they are stored; `InputError` for one that is not finite."""
  with safetensors.safe_open(file, "numpy") as handle:
    tensors = [handle.get_tensor(name) for name in names]
  for name, tensor in zip(names, tensors, strict=True):
    if not np.isfinite(tensor).all():
      raise InputError("has a value that is NaN or infinite", file=file, field=name,
                       mend="give weights that are finite")
  return tensors


def map_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a file that this program wrote, mapped: only what is looked at is read."""
  with file.open("rb") as stream:
    start = 8 + int.from_bytes(stream.read(8), "little")
  one = lambda about: np.memmap(file, NUMPY[about["dtype"]], "r", start + about["data_offsets"][0],
                                tuple(about["shape"]))
  return {name: one(about) for name, about in read_header(file).items()}


def read_metadata(file: pathlib.Path) -> dict[str, str]:
  """The free text of a safetensors header."""
  with file.open("rb") as stream:
    header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
  found = header.get("__metadata__")
  return found if isinstance(found, dict) else {}
