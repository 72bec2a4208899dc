"""Objectives as pure values, composed as optax composes gradient transformations.

An objective is a pair of pure functions and a declaration of what it wants of the frozen reference
model. `value` is called under `jax.grad` and `jax.vmap`; hyper-parameters may be traced values that
the builder closes over. Masks and reductions are explicit: `mask[b, t]` is 1 where token t of row b
is predicted and counts (never at t = 0, never on padding). A loss is a sum over rows divided by the
step's counts, so that the losses of parts of a step add up to the step's.

Notation of the docstrings: l[b, t] = mask[b, t] * log p(token[b, t] | tokens before it).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relearn_jax.models.model import Head

State = Any
Terms = dict[str, Float[Array, ""]]
Reduction = Literal["sequence_sum", "token_mean"]


class TokenRows(NamedTuple):
  """Right-padded rows of one data set.

  Attributes:
    tokens: token ids, 0 at padding.
    mask: 1.0 where the token is predicted and counts in the loss.
    reference: statistics of the frozen reference model on these rows, by kind; see `Need`.
    positions: places of the counted tokens, 0 where a row has fewer; None: most tokens count, so that
      looking at all of them costs less than picking them.
    num_tokens: counted tokens of the whole step, where these rows are only a part of it.
    num_rows: likewise, rows with a counted token.
  """

  tokens: Int[Array, "B T"]
  mask: Float[Array, "B T"]
  reference: Mapping[str, Any] = {}
  positions: Int[Array, "B A"] | None = None
  num_tokens: Float[Array, ""] | None = None
  num_rows: Float[Array, ""] | None = None


class Need(NamedTuple):
  """A statistic of the reference model that an objective reads from `TokenRows.reference`.

  `kind` is "logprobs" (`[B, T]`, per token) or "hidden" (final hidden states `[B, T, D]`, with the
  frozen output head beside them as "head": exact distributions at the price of hidden size; where the
  head is not trained it is the model's own, and left out).
  """

  rows: str
  kind: Literal["logprobs", "hidden"]


class Outputs(NamedTuple):
  """What the model computes on one data set under the parameters being trained."""

  logprobs: Float[Array, "B T"]
  hidden: Float[Array, "B T D"]
  head: Head


Forward = Callable[[str], Outputs]
Batch = Mapping[str, TokenRows]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss to be minimised.

  Attributes:
    init: the objective's own state at step 0 (an empty tuple for most).
    value: (forward, batch, state) -> (loss, terms, next state); terms are logged by name.
    rows: the data sets it reads ("forget", "retain", ...).
    needs: what it wants of the reference model.
  """

  init: Callable[[], State]
  value: Callable[[Forward, Batch, State], tuple[Float[Array, ""], Terms, State]]
  rows: frozenset[str]
  needs: frozenset[Need] = frozenset()


def stateless(loss: Callable[[Forward, Batch], tuple[Float[Array, ""], Terms]], rows: str,
              needs: frozenset[Need] = frozenset()) -> Objective:
  """An objective without state, on one data set."""
  def value(forward: Forward, batch: Batch, state: State) -> tuple[Float[Array, ""], Terms, State]:
    return *loss(forward, batch), state
  return Objective(lambda: (), value, frozenset({rows}), needs)


def count_rows(rows: TokenRows) -> TokenRows:
  """Fills in the counts of a whole step, before its rows are split."""
  real = jnp.sum(rows.mask, axis=-1) > 0
  return rows._replace(num_tokens=jnp.sum(rows.mask), num_rows=jnp.sum(real.astype(jnp.float32)))


def reduce_tokens(values: Float[Array, "B T"], rows: TokenRows, reduction: Reduction) -> Float[Array, "..."]:
  """Sums the counted tokens' values over each row (`[B]`), or averages them over all counted tokens (`[]`).

  "token_mean" divides by the number of counted tokens of the whole step, not row by row, so that
  neither padding nor the split into micro-batches changes it.
  """
  if reduction == "sequence_sum":
    return jnp.sum(values * rows.mask, axis=-1)
  count = jnp.sum(rows.mask) if rows.num_tokens is None else rows.num_tokens
  return jnp.sum(values * rows.mask) / jnp.maximum(count, 1.0)


def mean_rows(values: Float[Array, " B"], rows: TokenRows) -> Float[Array, ""]:
  """Mean over the step's rows that hold at least one counted token; padded rows do not count."""
  real = (jnp.sum(rows.mask, axis=-1) > 0).astype(values.dtype)
  count = jnp.sum(real) if rows.num_rows is None else rows.num_rows
  return jnp.sum(values * real) / jnp.maximum(count, 1.0)


def ascend(objective: Objective) -> Objective:
  """The negated objective: minimising it raises the loss it was made of."""
  return scale(-1.0, objective)


def scale(weight: Float[Array, ""] | float, objective: Objective) -> Objective:
  """`weight` times an objective; the terms are logged unscaled."""
  def value(forward: Forward, batch: Batch, state: State) -> tuple[Float[Array, ""], Terms, State]:
    loss, terms, state = objective.value(forward, batch, state)
    return weight * loss, terms, state
  return dataclasses.replace(objective, value=value)


def add(*objectives: Objective) -> Objective:
  """The sum of objectives, each with its own state. Terms must have different names."""
  def value(forward: Forward, batch: Batch, states: State) -> tuple[Float[Array, ""], Terms, State]:
    total, after = jnp.zeros(()), []
    merged: Terms = {}
    for objective, state in zip(objectives, states, strict=True):
      loss, terms, state = objective.value(forward, batch, state)
      if clash := merged.keys() & terms.keys():
        raise ValueError(f"two terms of a sum are both called {sorted(clash)}")
      total, merged = total + loss, {**merged, **terms}
      after.append(state)
    return total, merged, tuple(after)
  return Objective(
      lambda: tuple(objective.init() for objective in objectives), value,
      frozenset().union(*(o.rows for o in objectives)), frozenset().union(*(o.needs for o in objectives)))
