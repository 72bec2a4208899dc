"""Objectives as pure values, in the manner of optax: what a loss is, and what it wants of other models.

An objective is a set of pure functions and a declaration of what it wants of frozen models. `value` is
called under `jax.grad` and `jax.vmap`; hyper-parameters may be traced values that the builder closes
over. Masks and reductions are explicit: `mask[b, t]` is 1 where token t of row b is predicted and counts
(never at t = 0, never on padding). A loss is a sum over rows divided by the step's counts, so that the
losses of parts of a step add up to the step's.

Notation of the docstrings: l[b, t] = log p(token[b, t] | tokens before it) where mask[b, t] is 1, p its
exponential; s[b] = sum_t l[b, t] and n[b] the number of counted tokens of a row; "token mean" the mean over
all counted tokens of the step, "row mean" the mean over its rows; x_ref the same under the frozen reference.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relearn_jax.models.model import Head, Params

State = Any
Terms = dict[str, Float[Array, ""]]
Reduction = Literal["sequence_sum", "token_mean"]
Kind = Literal["logprobs", "hidden", "layer", "generic"]


class TokenRows(NamedTuple):
  """Right-padded rows of one data set.

  Attributes:
    tokens: token ids, 0 at padding.
    mask: 1.0 where the token is predicted and counts in the loss.
    reference: statistics of frozen models on these rows, by kind; see `Need`.
    positions: places of the counted tokens, 0 where a row has fewer; None: most tokens count, so that
      looking at all of them costs less than picking them.
    num_tokens: counted tokens of the whole step, where these rows are only a part of it.
    num_rows: likewise, rows with a counted token.
    labels: what is to be predicted at each place; None: the tokens themselves.
    segments: where rows share a sequence, which then takes a row's place here: the row, from 1, that each token is of,
      0 at padding; see `data.packing`.
  """

  tokens: Int[Array, "B T"]
  mask: Float[Array, "B T"]
  reference: Mapping[str, Any] = {}
  positions: Int[Array, "B A"] | None = None
  num_tokens: Float[Array, ""] | None = None
  num_rows: Float[Array, ""] | None = None
  labels: Int[Array, "B T"] | None = None
  segments: Int[Array, "B T"] | None = None


class Need(NamedTuple):
  """A statistic of frozen models that an objective reads from `TokenRows.reference`.

  Attributes:
    rows: the data set.
    kind: "logprobs" (`[B, T]`, per token); "hidden" (final hidden states `[B, T, D]`, with the frozen output
      head beside them as "head": exact distributions at the price of hidden size; where the head is not trained
      it is the model's own, and left out); "layer" (the output `[B, T, D]` of the first layers); "generic" (the
      token `[B, T]` that the generic model of the Who's-Harry-Potter method would say, see `losses.generic_logits`,
      for which a second frozen model is needed: one that was reinforced on what is to be forgotten).
    setting: of "layer", the share of the layers; of "generic", alpha.
  """

  rows: str
  kind: Kind
  setting: float = 0.0


class Outputs(NamedTuple):
  """What the model computes on one data set under some parameters.

  Attributes:
    logprobs: of the labels, l in the notation above, 0 at the first place.
    hidden: final hidden states.
    head: the output head.
    layer: share of the layers, counted from the embedding -> what the last of them puts out.
  """

  logprobs: Float[Array, "B T"]
  hidden: Float[Array, "B T D"]
  head: Head
  layer: Callable[[float], Float[Array, "B T D"]] | None = None


Forward = Callable[[Params, TokenRows], Outputs]
Batch = Mapping[str, TokenRows]
Value = tuple[Float[Array, ""], Terms]


def _no_state(params: Params) -> State:
  return ()


def _same_state(state: State, terms: Terms, params: Params) -> State:
  return state


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss to be minimised.

  Attributes:
    init: parameters -> the objective's own state at step 0 (an empty tuple for most).
    value: (forward, parameters, batch, state) -> (loss, terms); terms are logged by name. `forward` gives
      the outputs under any parameters, so that a combinator may look at others than those it is given.
    needs: what it wants of frozen models.
    rows: the data sets it reads ("forget", "retain", ...).
    update: (state, terms of the whole step, parameters after it) -> the next state.
    readout: (parameters, state) -> the parameters that the method releases; None: those that are trained.
    divisible: whether the losses of a step's parts add up to the step's.
    packs: the data sets of which it takes means over tokens alone, so that rows may share a sequence.
  """

  init: Callable[[Params], State]
  value: Callable[[Forward, Params, Batch, State], Value]
  needs: frozenset[Need]
  rows: frozenset[str]
  update: Callable[[State, Terms, Params], State] = _same_state
  readout: Callable[[Params, State], Params] | None = None
  divisible: bool = True
  packs: frozenset[str] = frozenset()


def stateless(loss: Callable[[Forward, Params, Batch], Value], *rows: str, needs: tuple[Need, ...] = (),
              token_means: bool = False) -> Objective:
  """An objective without state, on one data set or more; `token_means`: see `Objective.packs`."""
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    return loss(forward, params, batch)
  return Objective(_no_state, value, frozenset(needs), frozenset(rows), packs=frozenset(rows if token_means else ()))


def remember(forward: Forward) -> Forward:
  """A forward pass that is made once for the same parameters and rows (the same objects), however many terms ask."""
  made: dict[tuple[int, int], tuple[Params, TokenRows, Outputs]] = {}

  def once(params: Params, rows: TokenRows) -> Outputs:
    key = id(params), id(rows)
    if key not in made:
      made[key] = params, rows, forward(params, rows)  # both are kept, so that no other object gets their ids
    return made[key][2]
  return once


def count_rows(rows: TokenRows) -> TokenRows:
  """Fills in the counts of a whole step, before its rows are split."""
  real = jnp.sum(rows.mask, axis=-1) > 0
  return rows._replace(num_tokens=jnp.sum(rows.mask), num_rows=jnp.sum(real.astype(jnp.float32)))


def num_tokens(rows: TokenRows) -> Float[Array, ""]:
  """Counted tokens of the whole step."""
  return jnp.sum(rows.mask) if rows.num_tokens is None else rows.num_tokens


def reduce_tokens(values: Float[Array, "B T"], rows: TokenRows, reduction: Reduction) -> Float[Array, "..."]:
  """Sums the counted tokens' values over each row (`[B]`), or averages them over all counted tokens (`[]`).

  "token_mean" divides by the number of counted tokens of the whole step, not row by row, so that
  neither padding nor the split into micro-batches changes it.

  >>> rows = TokenRows(jnp.zeros((2, 3), int), jnp.array([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
  >>> values = jnp.array([[9.0, 1.0, 2.0], [9.0, 6.0, 9.0]])
  >>> reduce_tokens(values, rows, "token_mean").tolist()  # (1 + 2 + 6) / 3
  3.0
  >>> reduce_tokens(values, rows, "sequence_sum").tolist()
  [3.0, 6.0]
  """
  if reduction == "sequence_sum":
    return jnp.sum(values * rows.mask, axis=-1)
  return jnp.sum(values * rows.mask) / jnp.maximum(num_tokens(rows), 1.0)


def mean_rows(values: Float[Array, " B"], rows: TokenRows) -> Float[Array, ""]:
  """Mean over the step's rows that hold at least one counted token; padded rows do not count."""
  real = (jnp.sum(rows.mask, axis=-1) > 0).astype(values.dtype)
  count = jnp.sum(real) if rows.num_rows is None else rows.num_rows
  return jnp.sum(values * real) / jnp.maximum(count, 1.0)
