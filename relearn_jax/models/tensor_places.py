"""Where each tensor of a model is stored; what a checkpoint's files lack, hold besides or contradict is named."""

import math
import pathlib
from typing import Any

import numpy as np
import safetensors

from relearn_jax.errors import InputError
from relearn_jax.models.model import Model, flatten
from relearn_jax.models.safetensor_files import CHUNK, FLOATS, INDEX, read_header, weight_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEADS = ("score", "classifier", "qa_outputs", "v_head", "value_head", "reward_head", "regression_head")
BARE = "model."  # what the names of a decoder that was saved without its head lack
BELONGS = "give the config.json that belongs to these weights"


def find_tensors(folder: pathlib.Path, model: Model) -> tuple[dict[str, pathlib.Path], bool]:
  """Where each tensor of the model is stored, and whether its name lacks the prefix there.

  Raises:
    InputError: a tensor is missing, has no place in the model or does not fit it, or a head that is said to be the
      embedding is another.
  """
  expected: dict[str, tuple[int, ...]] = {}
  for leaf, shape in flatten(model.abstract()).items():
    name = model.names[leaf]
    if "{i}" in name:
      expected |= {name.format(i=i): shape.shape[1:] for i in range(model.config.num_layers)}
    else:
      expected[name] = shape.shape
  found: dict[str, pathlib.Path] = {}
  files, weight_map = weight_files(folder)
  headers = {file: read_header(file) for file in files}
  for name, file in (weight_map or {}).items():
    if name not in headers[file]:
      raise InputError(f"is in {file.name} by the index, but not in that file", file=folder / INDEX,
                       field=f"weight_map.{name}", mend="give the index that belongs to these files")
  names = {name for header in headers.values() for name in header}
  bare = not any(name.startswith(BARE) for name in names) and EMBEDDING.removeprefix(BARE) in names
  for file, header in headers.items():
    for stored, about in header.items():
      name = BARE + stored if bare and not stored.startswith("lm_head.") else stored
      # Old checkpoints store rotary tables, which follow from config.json; a tied one may repeat its embedding.
      if name.endswith("rotary_emb.inv_freq"):
        continue
      if name == HEAD and model.config.tie_embeddings:
        _check_tied(file, about, headers, EMBEDDING.removeprefix(BARE) if bare else EMBEDDING)
        continue
      if name in found:
        raise InputError(f"is also in {found[name].name}", file=file, field=stored, mend="remove one of the two")
      if weight_map is not None and weight_map.get(stored) != file:
        raise InputError(f"is not in {INDEX}", file=file, field=stored,
                         mend="give the index that belongs to these files")
      _check_tensor(stored, about, expected.get(name), file)
      found[name] = file
  if missing := sorted(expected.keys() - found.keys()):
    headless = bare and missing == [HEAD]
    raise InputError(f"is missing (and {len(missing) - 1} more)" if len(missing) > 1 else "is missing", file=folder,
                     field=missing[0],
                     mend="these are the weights of a model without its head: save it as a causal language model, or "
                          "set tie_word_embeddings if it is tied" if headless else
                          "give a complete checkpoint whose config.json fits its weights")
  return found, bare


def _check_tensor(name: str, about: dict[str, Any], expected: tuple[int, ...] | None, file: pathlib.Path) -> None:
  """`InputError` for a tensor that the model has no place for, or not one of this shape or dtype."""
  fail = lambda problem, mend: InputError(problem, file=file, field=name, mend=mend)
  if expected is None and name.split(".")[0] in HEADS:
    raise fail("belongs to a head that a causal language model does not have",
               "give a checkpoint that was saved as one (...ForCausalLM)")
  if expected is None:
    raise fail("has no place in the model that config.json describes", BELONGS)
  if tuple(about["shape"]) != expected:
    raise fail(f"has shape {tuple(about['shape'])}, but config.json asks for {expected}", BELONGS)
  if about["dtype"] not in FLOATS:
    raise fail(f"has dtype {about['dtype']}", f"expected one of {', '.join(FLOATS)}")


def _check_tied(file: pathlib.Path, about: dict[str, Any], headers: dict[pathlib.Path, dict[str, Any]], embedding: str
                ) -> None:
  """`InputError` unless the head that is stored is the embedding, which config.json says it is."""
  home = next((other for other, header in headers.items() if embedding in header), None)
  if home is None:
    return  # the embedding will be missed by its name
  shape = about["shape"]
  same = shape == headers[home][embedding]["shape"] and len(shape) == 2 and math.prod(shape) > 0
  with safetensors.safe_open(file, "numpy") as one, safetensors.safe_open(home, "numpy") as other:
    head, table = one.get_slice(HEAD), other.get_slice(embedding)
    rows = max(1, CHUNK // (4 * shape[1])) if same else 1
    for start in range(0, shape[0] if same else 0, rows):
      part = slice(start, min(start + rows, shape[0]))
      same = same and np.array_equal(head[part].astype(np.float32), table[part].astype(np.float32), equal_nan=True)
  if not same:
    raise InputError("differs from the embedding, and config.json says that they are one (tie_word_embeddings)",
                     file=file, field=HEAD, mend="set tie_word_embeddings to false if the model has a head of its own, "
                     "else remove the tensor")
