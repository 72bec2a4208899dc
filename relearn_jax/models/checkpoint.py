"""Hugging Face checkpoints in: checked from their headers first, then read by slice, without torch."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh, SingleDeviceSharding

from relearn_jax.errors import InputError
from relearn_jax.models.adapters import Adapter, check_adapter, has_adapter
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import ADAPTER, CONFIG, chain, companions
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.models.safetensor_files import CHUNK, read_header, read_json
from relearn_jax.models.tensor_places import BARE, find_tensors
from relearn_jax.parallel.mesh import weight_shardings
from relearn_jax.parallel.parts import place_parts


@dataclasses.dataclass(frozen=True)
class Checked:
  """A checkpoint in which nothing was found wrong: a folder, or an adapter's folder and its base.

  Attributes:
    folders: the one that was named, and where that holds an adapter alone, its base after it; see `folders.chain`.
    config: its architecture.
    files: tensor name -> file that holds it, for the tensors that are used.
    bare: the files' names lack the prefix "model.".
    adapters: merged into the weights as they are read, in this order.
  """

  folders: tuple[pathlib.Path, ...]
  config: ModelConfig
  files: dict[str, pathlib.Path]
  bare: bool = False
  adapters: tuple[Adapter, ...] = ()

  @property
  def path(self) -> pathlib.Path:
    """The folder that was named."""
    return self.folders[0]

  @property
  def config_file(self) -> pathlib.Path:
    """The config.json that was read."""
    return self.folders[-1] / CONFIG

  def stored(self, name: str) -> str:
    """What a tensor is called in its file."""
    return name.removeprefix(BARE) if self.bare else name

  def deciding_files(self) -> dict[str, pathlib.Path]:
    """Every file that decides what the model is and how it is asked, by its name in its folder."""
    base = {CONFIG: self.config_file} | {file.name: file for file in self.files.values()}
    named = lambda folder, name: "base/" * self.folders.index(folder) + name
    found = {named(self.folders[-1], name): file for name, file in base.items()} | companions(self.folders)
    for adapter in self.adapters:
      found |= {named(adapter.folder, file.name): file for file in (adapter.folder / ADAPTER, adapter.file)}
    return found


def check_checkpoint(path: str | pathlib.Path) -> Checked:
  """Finds what is wrong with a checkpoint folder from its configuration and headers alone.

  No device is used, and no weight is read, unless a tied head is stored too or an adapter states its base's digest.

  Args:
    path: a Hugging Face folder, with or without an adapter beside its weights, or the folder of an adapter.

  Raises:
    InputError: naming the file, and the field or tensor.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise InputError("is a file" if folder.exists() else "does not exist", file=folder,
                     mend="give the folder that holds config.json")
  folders = chain(folder)
  base = folders[-1]
  values = read_json(base / CONFIG, "give the folder of a Hugging Face checkpoint")
  config = parse_config(values, str(base / CONFIG))
  model = Model(config)
  files, bare = find_tensors(base, model)
  for name in values.get("architectures") or ():
    if "For" in str(name) and "ForCausalLM" not in str(name):
      raise InputError(f"has {name!r}, which is no causal language model", file=base / CONFIG, field="architectures",
                       mend="give a checkpoint that was saved as one (...ForCausalLM)")
  holders = [*([base] if has_adapter(base) else []), *reversed(folders[:-1])]
  checked = Checked(tuple(folders), config, files, bare)
  for holder in holders:
    adapter = check_adapter(holder, model)
    if adapter.fingerprint and (here := tensors_digest(checked)) != adapter.fingerprint:
      raise InputError(f"was trained on a base with other weights (fingerprint {adapter.fingerprint[:12]}..., here "
                       f"{here[:12]}...)", file=adapter.file, field="base_fingerprint",
                       mend="give the adapter's own base")
    checked = dataclasses.replace(checked, adapters=(*checked.adapters, adapter))
  return checked


def tensors_digest(checked: Checked) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of the tensors and of the adapters on them, in hexadecimal.

  It does not depend on how the tensors are spread over files.
  """
  digest = hashlib.sha256()
  places = [(name, checked.files[name], checked.stored(name)) for name in sorted(checked.files)]
  headers = {file: read_header(file) for file in set(checked.files.values())}
  for adapter in checked.adapters:
    headers[adapter.file] = read_header(adapter.file)
    places += [(f"{tensor} {adapter.scale!r}", adapter.file, tensor)
               for weight in sorted(adapter.pairs) for tensor in adapter.pairs[weight]]
  for name, path, stored in places:
    about = headers[path][stored]
    digest.update(f"{name} {about['shape']} {about['dtype']}".encode())
    with path.open("rb") as file:
      data = 8 + int.from_bytes(file.read(8), "little")
      begin, end = (data + offset for offset in about["data_offsets"])
      file.seek(begin)
      for start in range(begin, end, CHUNK):
        digest.update(file.read(min(CHUNK, end - start)))
  return digest.hexdigest()


def weights_digest(checked: Checked) -> str:
  """SHA-256 over the weights (see `tensors_digest`) and the constants of the architecture, in hexadecimal."""
  return hashlib.sha256(f"{checked.config!r} {tensors_digest(checked)}".encode()).hexdigest()


def load_params(checked: Checked, model: Model, *, dtype: Any = jnp.float32, mesh: Mesh | None = None,
                place: Callable[..., Any] = place_parts) -> Params:
  """Reads the weights straight into stacked `[layers, ...]` leaves, adapters merged into them; see `read_leaves`."""
  return unflatten(dict(read_leaves(checked, model, dtype=dtype, mesh=mesh, place=place)))


def read_leaves(checked: Checked, model: Model, *, dtype: Any = jnp.float32, mesh: Mesh | None = None,
                place: Callable[..., Any] = place_parts) -> Iterator[tuple[str, Any]]:
  """Path and value of every leaf of the parameters, one after the other.

  Each device's part is read by slice, once for all devices that hold the same, so that the host holds one
  such part at a time (and one tensor of it), whatever the model's size and however many its devices. A
  process reads only what its own devices hold.

  Args:
    checked: from `check_checkpoint`.
    model: its model.
    dtype: of the parameters in memory.
    mesh: the leaves lie on it as `parallel.rules` says; by default on the first device.
    place: makes a leaf of its parts; with `read_parts` a leaf is what lays it out later.

  Raises:
    InputError: a weight is NaN or infinite; or is too large for `dtype`.
  """
  # Opened for each leaf: a mapped file's pages count as this process's memory until it is closed.
  def tensor(files: Mapping[pathlib.Path, Any], name: str, index: tuple[slice, ...]) -> np.ndarray:
    file = checked.files[name]
    stored = files[file].get_slice(checked.stored(name))[index]
    with np.errstate(over="ignore", invalid="ignore"):
      merged = _merge(stored, [adapter for adapter in checked.adapters if name in adapter.pairs], files, name, index)
      values = merged.astype(dtype, copy=False)
    if not np.isfinite(values).all():
      bad = "is NaN or infinite" if not np.isfinite(stored).all() else f"is too large for {np.dtype(dtype).name}"
      raise InputError(f"has a value that {bad}", file=file, field=checked.stored(name),
                       mend="give a checkpoint whose weights are finite" if "NaN" in bad else "load it as float32")
    return values

  shardings = {}
  if mesh is not None:
    shardings = flatten(weight_shardings(model.abstract(), model.axes(), mesh, stacked=False))
  first = SingleDeviceSharding(jax.local_devices()[0])

  def leaf(path: str, shape: jax.ShapeDtypeStruct) -> Any:
    name = model.names[path]

    def part(index: tuple[slice, ...]) -> np.ndarray:
      layers = range(*index[0].indices(shape.shape[0])) if "{i}" in name else ()
      names = [name.format(i=i) for i in layers] or [name]
      rest = index[1:] if layers else index
      with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(safetensors.safe_open(file, "numpy"))
                 for file in {*(checked.files[n] for n in names), *(adapter.file for adapter in checked.adapters)}}
        if not layers:
          return tensor(files, name, rest)
        first = tensor(files, names[0], rest)
        out = np.empty((len(names), *first.shape), first.dtype)
        out[0] = first
        for row, n in zip(out[1:], names[1:], strict=True):
          row[...] = tensor(files, n, rest)
        return out
    return place(shape.shape, shardings.get(path, first), part, dtype)

  for path, shape in flatten(model.abstract()).items():
    yield path, leaf(path, shape)


def _merge(stored: np.ndarray, adapters: Sequence[Adapter], files: Mapping[pathlib.Path, Any], name: str,
           index: tuple[slice, ...]) -> np.ndarray:
  """Part of a weight with what adapters add to it, summed in fp32; the weight as it is stored where none does."""
  for adapter in adapters:
    tensors = adapter.pairs[name]
    columns, rows = (files[adapter.file].get_slice(tensor) for tensor in tensors)
    a, b = columns[:, index[1]].astype(np.float32), rows[index[0]].astype(np.float32)
    for tensor, values in zip(tensors, (a, b), strict=True):
      if not np.isfinite(values).all():
        raise InputError("has a value that is NaN or infinite", file=adapter.file, field=tensor,
                         mend="give an adapter whose weights are finite")
    stored = stored.astype(np.float32) + np.float32(adapter.scale) * (b @ a)
  return stored
