"""What stands before every prompt: it is read once, and rows begin with its keys and values.

A prefix is declared (a text that is put before all prompts, or the head of a chat template), never found by comparing
rows: whether a row shares it depends on the row and on what was declared, so its completion depends on no other row.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from relearn_jax.data.batches import RowBatch, bucketize
from relearn_jax.errors import InputError
from relearn_jax.generation.gather import gather_weights
from relearn_jax.models.layers import LayerCache
from relearn_jax.models.model import Model, Params

LEAST = 32  # tokens: to share fewer takes as long as to read them with each prompt (benchmarks/speed.md)
# What prompts may begin with. A tokenizer may join the end of a prefix with what follows, each in its own way.
BEGINNINGS = ("", "a", " a", "\n", "1", ".")


def shared_ids(encode: Callable[[str], list[int]]) -> list[int]:
  """The ids that begin those of any prompt, as far as they can be told from what is declared; [] if fewer than `LEAST`.

  Args:
    encode: ids of a prompt with all that stands before it.
  """
  found = []
  for text in BEGINNINGS:
    with contextlib.suppress(InputError):  # of a text that this tokenizer has no token for
      found.append(encode(text))
  alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*found, strict=False))
  shared = [ids[0] for ids in alike]
  return shared if len(shared) >= LEAST else []


def bucketize_after(rows: Sequence[Sequence[int]], shared: Sequence[int]) -> Iterator[tuple[RowBatch, bool]]:
  """Batches by `bucketize`: of rows that begin with `shared`, without it (True), and of the others (False)."""
  begins = [bool(shared) and len(row) > len(shared) and row[:len(shared)] == shared for row in rows]
  for which in (True, False):
    members = [index for index, one in enumerate(begins) if one == which]
    for batch in bucketize([rows[index][len(shared) if which else 0:] for index in members]):
      yield batch._replace(indices=np.array(members)[batch.indices]), which


@functools.partial(jax.jit, static_argnames="model")
def read_prefix(params: Params, tokens: Int[Array, " S"], *, model: Model) -> list[LayerCache]:
  """Keys and values of a prefix, `[1, K, S, H]` of each layer; parameters have been through `split_layers`."""
  _, cache = model.prefill(gather_weights(model, params), tokens[None], 1)
  assert isinstance(cache, list)
  return cache
