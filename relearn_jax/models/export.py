"""Checkpoints out: a Hugging Face folder that transformers loads."""

import collections
import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from relearn_jax.errors import InputError
from relearn_jax.models.architectures import ARCHITECTURES
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import GENERATION, chain, companions
from relearn_jax.models.model import Model, Params, flatten
from relearn_jax.models.precision import DTYPES
from relearn_jax.models.safetensor_files import INDEX, SINGLE
from relearn_jax.parallel.processes import folder_atomically

SHARD_BYTES = 5 * 1024**3


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
  """The `config.json` of a decoder of this configuration."""
  return ARCHITECTURES[config.architecture].write(config)


def hf_tensors(params: Params, model: Model) -> list[tuple[str, Any]]:
  """Hugging Face name and (still lazy) value of every tensor, layer by layer."""
  rows: list[tuple[str, Any]] = []
  leaves = flatten(params)
  for path in sorted(leaves):
    name = model.names[path]
    if "{i}" not in name:
      rows.append((name, lambda leaf=leaves[path]: leaf))
    else:
      rows += [(name.format(i=i), lambda leaf=leaves[path], i=i: leaf[i]) for i in range(model.config.num_layers)]
  return rows


@contextlib.contextmanager
def new_folder(destination: pathlib.Path, field: str = "--output") -> Iterator[pathlib.Path]:
  """A folder to write a checkpoint into; once the block ends it stands at `destination`, complete or not at all.

  `field` is for messages.

  Raises:
    InputError: the destination holds something, or cannot be written.
  """
  if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
    raise InputError("exists and is not empty", file=destination, field=field, mend="give a new folder")
  try:
    with folder_atomically(destination) as temporary:
      yield temporary
      plain = next(temporary.glob("*.json"))
      for file in temporary.glob("*.safetensors"):
        shutil.copymode(plain, file)  # safetensors leaves them readable by their owner alone
  except (OSError, SafetensorError) as error:
    raise InputError(f"cannot be written ({getattr(error, 'strerror', None) or error})", file=destination,
                     field=field, mend="give a folder on a disk that you may write to and that has room") from None


def check_finite(name: str, array: np.ndarray) -> None:
  """`InputError` for a tensor that is about to be written and is not finite."""
  if not np.isfinite(array).all():
    raise InputError(f"would be written with values that are NaN or infinite in {array.dtype.name}", field=name,
                     mend="take a run, and a step of it, whose weights are finite")


def export(params: Params, model: Model, destination: pathlib.Path, *, source: pathlib.Path | None = None,
           tokenizer: Any = None, dtype: Any = None, field: str = "--output") -> None:
  """Writes safetensors (in shards of 5 GB), config and tokenizer; the folder appears complete or not at all.

  Args:
    params: parameters of one run.
    model: its architecture.
    destination: a folder that does not exist yet, or is empty.
    source: a folder of a checkpoint or an adapter, whose generation config and tokenizer files are copied.
    tokenizer: a tokenizer to save instead of the source's.
    dtype: of the tensors in the file; by default each keeps its own, and config.json states the
      one that most parameters have.
    field: which named the destination, for messages.

  Raises:
    InputError: the destination holds something, or cannot be written; or a weight is not finite in the file's dtype.
  """
  with new_folder(destination, field) as temporary:
    stored = _save_weights(params, model, temporary, dtype)
    config = to_hf_config(model.config) | {"dtype": stored}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
      tokenizer.save_pretrained(temporary)
    if source is not None:
      for name, file in companions(chain(source)).items():
        if tokenizer is None or name == GENERATION:
          (temporary / name).parent.mkdir(exist_ok=True)
          shutil.copyfile(file, temporary / name)


def _save_weights(params: Params, model: Model, folder: pathlib.Path, dtype: Any) -> str:
  """Streams the tensors into shards; returns the name of the dtype of most parameters."""
  shards: list[list[tuple[str, Any, np.dtype]]] = [[]]
  size, elements = 0, collections.Counter[str]()
  for name, value in hf_tensors(params, model):
    shape = jax.eval_shape(value)
    stored = np.dtype(shape.dtype if dtype is None else dtype)
    elements[stored.name] += shape.size
    if size and size + shape.size * stored.itemsize > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append((name, value, stored))
    size += shape.size * stored.itemsize
  total = 0
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    with np.errstate(over="ignore"):  # looked for below
      arrays = {name: np.ascontiguousarray(np.asarray(value()).astype(stored, copy=False))
                for name, value, stored in shard}
    for name, array in arrays.items():
      check_finite(name, array)
    total += sum(array.nbytes for array in arrays.values())
    weight_map |= dict.fromkeys(arrays, file)
    save_file(arrays, folder / file, metadata={"format": "pt"})
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return elements.most_common(1)[0][0]


def rounding(trained: Params, before: Iterable[tuple[str, Any]] | None, dtype: str, flag: str) -> str:
  """How far what training moved is left once the weights are rounded, in a sentence.

  The share is |round(W) - W0| / |W - W0|, with W0 the weights before and W those after, both in fp32, and Euclidean
  norms over all weights. Rounding takes back steps that are small beside a weight; where W0 itself is finer than
  `dtype`, it adds a distance of its own, and the share exceeds one. Without W0 there is only |round(W) - W|.

  Args:
    trained: W, of one run, on the host.
    before: path and value of each leaf of W0, too; None where it is not at hand.
    dtype: name of the precision that is written.
    flag: which asked for it.
  """
  after, moved, kept = flatten(trained), 0.0, 0.0
  for path, leaf in after.items() if before is None else before:
    start, end = (np.asarray(array, np.float32) for array in (leaf, after[path]))
    written = end.astype(DTYPES[dtype]).astype(np.float32)
    moved += float(np.sum(np.square(end - start), dtype=np.float64))
    kept += float(np.sum(np.square(written - start), dtype=np.float64))
  says = (f"Rounded to {dtype}, the {sum(leaf.size for leaf in after.values()):,} weights lie {math.sqrt(kept):.3g} "
          "from those ")
  if before is None:
    says += "that were trained; how far training moved them is not known here, so neither is what is left of it."
  else:
    share = f"{math.sqrt(kept / moved):.1%} of " if moved else ""
    says += f"before: {share}the {math.sqrt(moved):.3g} that training moved them."
  return f"{says} {flag}=float32 writes them as trained."
