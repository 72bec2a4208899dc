"""Objectives as pure values, composed as optax composes gradient transformations.

An objective is a pair of pure functions and a declaration of what it wants of the frozen reference
model. `value` is called under `jax.grad` and `jax.vmap`; hyper-parameters may be traced values that
the builder closes over. Masks and reductions are explicit: `mask[b, t]` is 1 where token t of row b
is predicted and counts (never at t = 0, never on padding).

Notation of the docstrings: l[b, t] = mask[b, t] * log p(token[b, t] | tokens before it).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

State = Any
Terms = dict[str, Float[Array, ""]]
Reduction = Literal["sequence_sum", "token_mean"]


class TokenRows(NamedTuple):
  """Right-padded rows of one data set.

  Attributes:
    tokens: token ids, 0 at padding.
    mask: 1.0 where the token is predicted and counts in the loss.
    reference: statistics of the frozen reference model on these rows, by kind; see `Need`.
  """

  tokens: Int[Array, "B T"]
  mask: Float[Array, "B T"]
  reference: Mapping[str, Array] = {}


class Need(NamedTuple):
  """A statistic of the reference model that an objective reads from `TokenRows.reference`.

  `kind` is "logprobs" (`[B, T]`, per token) or "hidden" (final hidden states `[B, T, D]`, with the
  frozen output head beside them as "head", `[V, D]`: exact distributions at the price of hidden size).
  """

  rows: str
  kind: Literal["logprobs", "hidden"]


class Outputs(NamedTuple):
  """What the model computes on one data set under the parameters being trained."""

  logprobs: Float[Array, "B T"]
  hidden: Float[Array, "B T D"]
  head: Float[Array, "V D"]


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


def reduce_tokens(values: Float[Array, "B T"], mask: Float[Array, "B T"], reduction: Reduction
                  ) -> Float[Array, "..."]:
  """Sums masked token values over each row (`[B]`), or averages them over all counted tokens (`[]`).

  "token_mean" divides by the number of counted tokens of the whole batch, not row by row, so that
  neither padding nor the split into micro-batches changes it.
  """
  if reduction == "sequence_sum":
    return jnp.sum(values * mask, axis=-1)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def mean_rows(values: Float[Array, " B"], mask: Float[Array, "B T"]) -> Float[Array, ""]:
  """Mean over the rows that hold at least one counted token; padded rows do not count."""
  real = (jnp.sum(mask, axis=-1) > 0).astype(values.dtype)
  return jnp.sum(values * real) / jnp.maximum(jnp.sum(real), 1.0)


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


def reference_logits(rows: TokenRows) -> Float[Array, "B T V"]:
  """The reference model's logits, from its cached hidden states and its frozen head."""
  logits = jnp.einsum("btd,vd->btv", rows.reference["hidden"], rows.reference["head"],
                      preferred_element_type=jnp.float32)
  return jax.lax.stop_gradient(logits)
