"""What objectives want of frozen models: computed once per data set, kept on disk, never a second resident model."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from safetensors.numpy import save_file

from relearn_jax.errors import InputError
from relearn_jax.metrics.likelihood import per_token
from relearn_jax.models.model import Head, Model, Params, head_logits, whole
from relearn_jax.models.safetensor_files import map_tensors, read_header, read_metadata
from relearn_jax.objectives.core import Batch, Need, TokenRows
from relearn_jax.objectives.losses import generic_logits
from relearn_jax.parallel.mesh import map_runs, shard_rows, shard_runs, to_host
from relearn_jax.parallel.processes import agree, write_atomically
from relearn_jax.training.step import NOTHING, Frozen, model_outputs, split_rows

HEAD = "head"


def _generic(model: Model, weights: Params, reinforced: Params, rows: TokenRows, alpha: float) -> Array:
  """The likeliest token of the generic logits at each counted place.

  Where they are not finite it is a token that there is not, whose log-probability is NaN, so that the run ends: an
  argmax over NaN would be a label like any other.
  """
  base, strong = model.head(weights), model.head(reinforced)

  def pick(_: Array, hidden: Array, strong_hidden: Array) -> Array:
    logits = generic_logits(head_logits(hidden, base), head_logits(strong_hidden, strong), alpha)
    return jnp.where(jnp.isfinite(logits).all(-1), jnp.argmax(logits, -1), model.config.vocab_size).astype(jnp.int32)
  hidden = lambda params: model.hidden(params, rows.tokens, rows.segments)
  return per_token(pick, rows.tokens, rows.positions, model.config.vocab_size, hidden(weights), hidden(reinforced))


def add_references(model: Model, params: Params, batch: Batch, needs: frozenset[Need], mesh: Mesh,
                   frozen: Frozen = NOTHING, num_microbatches: int = 1, reinforced: Params | None = None) -> Batch:
  """Computes what an objective wants of frozen models, once, and puts it beside the rows.

  Args:
    model: architecture.
    params: the reference's parameters (or adapters), stacked `[runs, ...]`; they may be donated afterwards.
    batch: data set name -> stacked rows.
    needs: the objective's declaration.
    mesh: where the runs lie.
    frozen: what is not trained.
    num_microbatches: number of parts in which rows are worked through.
    reinforced: the parameters (or adapters) of a second model, for needs of the kind "generic".
  """
  def one(some: tuple[Need, ...], run: tuple, shared: Params | None) -> dict[str, Any]:
    params, strong, rows, own = run
    weights = whole(params, own, shared)

    def part(rows: TokenRows) -> dict[str, Array]:
      outputs = model_outputs(model, weights, rows)
      found: dict[str, Array] = {}
      for need in some:
        if need.kind == "layer":
          found[need.kind] = model.layer(weights, rows.tokens, need.setting, rows.segments)
        elif need.kind == "generic":
          found[need.kind] = _generic(model, weights, whole(strong, own, shared), rows, need.setting)
        else:
          found[need.kind] = outputs.hidden if need.kind == "hidden" else outputs.logprobs
      return found
    if num_microbatches == 1:
      found: dict[str, Any] = part(rows)
    else:
      parts = jax.lax.map(part, split_rows({"x": rows}, num_microbatches)["x"])
      found = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), parts)
    if "hidden" in found and own is None and shared is None:
      found[HEAD] = jax.tree.map(jnp.copy, model.head(weights))  # a copy: the head itself is trained
    return found

  after = dict(batch)
  for name in sorted({need.rows for need in needs}):
    some = tuple(sorted(need for need in needs if need.rows == name))
    assert len({need.kind for need in some}) == len(some), f"two statistics of one kind on {name}"
    compute = jax.jit(map_runs(functools.partial(one, some), mesh))
    after[name] = batch[name]._replace(reference=compute((params, reinforced, batch[name], frozen.own), frozen.shared))
  return after


def rows_digest(rows: TokenRows) -> str:
  """SHA-256 of token rows on the host: tokens, which of them count, labels and segments where there are any."""
  digest = hashlib.sha256()
  for array in (rows.tokens, rows.mask, *(some for some in (rows.labels, rows.segments) if some is not None)):
    digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ReferenceCache:
  """Statistics of frozen models on disk, a safetensors file a data set, each with what it was made from.

  Attributes:
    folder: where the files are.
    needs: what is wanted.
    rows: data set name -> `rows_digest` of its rows.
    weights: digest of the reference's weights.
    recipe: whatever else decides the values: precision, how a second model was reinforced.
    field: what messages call the folder.
  """

  folder: pathlib.Path
  needs: frozenset[Need]
  rows: Mapping[str, str]
  weights: str
  recipe: str
  field: str = "references"

  def path(self, name: str) -> pathlib.Path:
    """The file of a data set."""
    return self.folder / f"{name}.safetensors"

  def _about(self, name: str) -> dict[str, str]:
    wanted = sorted(list(need[1:]) for need in self.needs if need.rows == name)
    return {"rows": self.rows[name], "weights": self.weights, "recipe": self.recipe, "needs": json.dumps(wanted)}

  def check(self, *only: str) -> None:
    """Refuses files that were made from something else; no device is used.

    Args:
      *only: of "rows", "weights", "recipe" and "needs", what to look at; all by default.

    Raises:
      InputError: naming the file, and whether its rows, its weights, its recipe or its statistics are others.
    """
    words = {"rows": f"was made from other rows of {{}} ({self.field} are of one data set)",
             "weights": "was made from a model with other weights",
             "recipe": "was made otherwise ({} here, {} there)", "needs": "holds other statistics ({} here, {} there)"}
    for name in sorted({need.rows for need in self.needs}):
      try:
        there = agree(functools.partial(_read_about, self.path(name)))
      except InputError as error:
        raise InputError(f"cannot be used: the file {error.problem}", file=self.path(name), field=self.field,
                         mend="remove it: it is computed again") from None
      if there is None:
        continue
      for key, value in self._about(name).items():
        if there.get(key) != value and key in (only or words):
          values = (name,) if key == "rows" else (value, there.get(key))
          raise InputError(words[key].format(*values), file=self.path(name), field=self.field,
                           mend="give another folder, or remove the file: it is computed again")

  def load(self, name: str, rows: TokenRows, mesh: Mesh, multiple: int) -> TokenRows | None:
    """Rows with their statistics from disk, laid out as `shard_rows` lays out rows; None where there are none yet."""
    if not agree(self.path(name).exists):
      return None
    found: dict[str, Any] = map_tensors(self.path(name))
    head = {key: found.pop(key) for key in list(found) if key.startswith(HEAD + ".")}
    # With as many empty rows as the tokens have, to fill up steps and shards.
    reference = dict(shard_rows(found, mesh, multiple, rows.tokens.shape[1]))
    if head:
      reference[HEAD] = Head(**shard_runs({key.removeprefix(HEAD + "."): leaf for key, leaf in head.items()}, mesh))
    return rows._replace(reference=reference)

  def save(self, name: str, rows: TokenRows, num_runs: int, num_rows: int) -> None:
    """Writes the statistics of rows on the mesh, without padding; the file appears complete or not at all."""
    held = dict(rows.reference)
    head = held.pop(HEAD, None)
    arrays = {kind: np.ascontiguousarray(leaf[:, :num_rows]) for kind, leaf in to_host(held, num_runs).items()}
    if head is not None:
      arrays |= {f"{HEAD}.{key}": np.ascontiguousarray(leaf) for key, leaf in to_host(head, num_runs)._asdict().items()
                 if leaf is not None}
    write_atomically(self.path(name), lambda path: save_file(arrays, path, metadata=self._about(name)))


def _read_about(file: pathlib.Path) -> dict[str, str] | None:
  """What statistics were made from; None where there is no file."""
  if not file.exists():
    return None
  read_header(file)  # checked against the file's size
  return read_metadata(file)


def references(model: Model, params: Params, batch: Batch, needs: frozenset[Need], mesh: Mesh, frozen: Frozen,
               num_microbatches: int, sizes: Mapping[str, tuple[int, int]], *,
               reinforced: Callable[[], Params] | None = None, cache: ReferenceCache | None = None) -> Batch:
  """As `add_references`, from the cache where it has them, and into it where it does not.

  Args:
    sizes: data set name -> its number of runs and of rows, without padding.
    reinforced: gives the second model; asked only where something is computed from it.
    cache: where statistics are kept; None: nowhere.
  """
  after, second = dict(batch), None
  for name in sorted({need.rows for need in needs}):
    found = cache.load(name, batch[name], mesh, num_microbatches) if cache else None
    if found and frozen == NOTHING and "hidden" in found.reference and HEAD not in found.reference:
      found = None  # from the training of an adapter, whose head is the model's own; ours is trained
    if found is None:
      some = frozenset(need for need in needs if need.rows == name)
      if reinforced and second is None and any(need.kind == "generic" for need in some):
        second = reinforced()
      found = add_references(model, params, {name: batch[name]}, some, mesh, frozen, num_microbatches, second)[name]
      if cache:
        cache.save(name, found, *sizes[name])
    after[name] = found
  return after
