"""Hugging Face checkpoints in: checked from their headers first, then read by slice, without torch."""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from relearn_jax.errors import InputError
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.models.safetensor_files import INDEX, read_header, read_json, weight_files
from relearn_jax.parallel.mesh import weight_shardings

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


def weights_digest(checked: Checked) -> str:
  """SHA-256 over the bytes of the files that hold the weights, in hexadecimal."""
  digest = hashlib.sha256()
  for path in sorted(set(checked.files.values())):
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def load_params(checked: Checked, model: Model, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
  """Reads the weights straight into stacked `[layers, ...]` leaves.

  Each device's part is read by slice, once for all devices that hold the same, so that the host holds one
  such part at a time (and one tensor of it), whatever the model's size and however many its devices. A
  process reads only what its own devices hold.

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

    def part(index: tuple[slice, ...]) -> np.ndarray:
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
    return _place(shape.shape, shardings.get(path, first), part, dtype)

  return unflatten({path: leaf(path, shape) for path, shape in flatten(model.abstract()).items()})


def _place(shape: tuple[int, ...], sharding: Sharding, part: Callable[[tuple[slice, ...]], np.ndarray], dtype: Any
           ) -> jax.Array:
  """As `jax.make_array_from_callback`, which would hold the parts of all devices on the host at once."""
  places = sharding.addressable_devices_indices_map(shape)
  alike = collections.defaultdict(list)
  for device, index in places.items():
    alike[str(index)].append(device)  # slices cannot be hashed before Python 3.12
  arrays: dict[Any, jax.Array] = {}
  for devices in alike.values():
    host = part(places[devices[0]] or ())
    arrays |= {device: jax.device_put(host, device) for device in devices}
    jax.block_until_ready([arrays[device] for device in devices])
    del host
    jax.device_put(np.zeros(()), devices[0])  # the runtime lets go of what it has copied at its next transfer
  return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in places], dtype=dtype)
