"""One jitted training step over the runs axis.

State, batch and hyper-parameters are stacked `[runs, ...]` and the step of one run is mapped over
them, so U, N and O take the same step by construction. Learning rates and loss weights are traced:
one executable serves every cell of a shape. What is trained is in fp32, all parameters or adapters;
with adapters the base is frozen, in any precision, and may be shared by all runs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from relearn_jax.metrics.likelihood import per_token, token_logprobs
from relearn_jax.models.model import Model, Params, whole
from relearn_jax.objectives.combinators import released
from relearn_jax.objectives.core import Batch, Objective, Outputs, TokenRows, count_rows, remember
from relearn_jax.objectives.methods import Build, Hyper
from relearn_jax.parallel.mesh import map_runs, weight_shardings


class Frozen(NamedTuple):
  """Weights that are not trained: a run's own, `[runs, ...]` if stacked, or those that all runs share.

  Both are None where all parameters are trained; then nothing is frozen.
  """

  own: Params | None = None
  shared: Params | None = None


NOTHING = Frozen()
PROGRAMS = 16  # of each kind that are kept, so that the buckets of a grid compile theirs once


class TrainState(NamedTuple):
  """What training carries, of one run or stacked `[runs, ...]`; parameters and moments in fp32.

  `params` is what is trained: all parameters, or adapters alone (as `lora.init_lora` makes them).
  """

  params: Params
  opt_state: Any
  objective_state: Any
  step: Int[Array, ""]


class StepLog(NamedTuple):
  """What a step reports, before its update: loss, terms by name, global gradient norm."""

  loss: Float[Array, ""]
  terms: dict[str, Float[Array, ""]]
  grad_norm: Float[Array, ""]


def optimizer(learning_rate: Float[Array, ""] | float, weight_decay: Float[Array, ""] | float
              ) -> optax.GradientTransformation:
  """AdamW (0.9, 0.999, 1e-8). The state's structure does not depend on the (traced) values."""
  return optax.adamw(learning_rate, weight_decay=weight_decay)


def init_state(params: Params, objective: Objective) -> TrainState:
  """The state of one run at step 0; `jax.vmap` over `params` for stacked runs."""
  return TrainState(params, optimizer(0.0, 0.0).init(params), objective.init(params), jnp.zeros((), jnp.int32))


def model_outputs(model: Model, params: Params, rows: TokenRows) -> Outputs:
  """Log-probability of every label given the tokens before it (0 at the first), hidden states, and layers on demand."""
  hidden, head = model.hidden(params, rows.tokens, rows.segments), model.head(params)
  logprobs = per_token(lambda targets, hidden: token_logprobs(hidden, head, targets),
                       rows.tokens if rows.labels is None else rows.labels, rows.positions, model.config.vocab_size,
                       hidden)
  return Outputs(logprobs, hidden, head, lambda depth: model.layer(params, rows.tokens, depth, rows.segments))


def take_rows(batch: Batch, index: Mapping[str, Int[Array, " B"]] | None) -> Batch:
  """The rows of a step, by their places in each data set; None: all of them."""
  if index is None:
    return batch

  def take(name: str, rows: TokenRows) -> TokenRows:
    head = rows.reference.get("head")  # the one statistic that is not of a row
    per_row = rows._replace(reference={kind: x for kind, x in rows.reference.items() if kind != "head"})
    taken: TokenRows = jax.tree.map(lambda leaf: leaf[index[name]], per_row)
    return taken._replace(reference={**taken.reference, **({} if head is None else {"head": head})})
  return {name: take(name, rows) if name in index else rows for name, rows in batch.items()}


def split_rows(batch: Batch, number: int) -> Batch:
  """Rows `[B, ...]` as `[number, B / number, ...]`, each part with the counts of the whole step.

  Part i holds rows i, i + number, ...: rows that lie on one device stay there.
  """
  part = lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0] // number, number, *leaf.shape[1:]), 1, 0)
  each = lambda value: jnp.broadcast_to(value, (number, *value.shape))

  def split(rows: TokenRows) -> TokenRows:
    rows = count_rows(rows)
    reference = {kind: jax.tree.map(each if kind == "head" else part, x) for kind, x in rows.reference.items()}
    return TokenRows(part(rows.tokens), part(rows.mask), reference,
                     None if rows.positions is None else part(rows.positions), each(rows.num_tokens),
                     each(rows.num_rows), None if rows.labels is None else part(rows.labels),
                     None if rows.segments is None else part(rows.segments))
  return {name: split(rows) for name, rows in batch.items()}


def train_step(model: Model, build: Build, state: TrainState, batch: Batch, hyper: Hyper, frozen: Frozen = NOTHING,
               num_microbatches: int = 1) -> tuple[TrainState, StepLog]:
  """One AdamW step of one run.

  Args:
    model: architecture.
    build: hyper-parameters -> objective, called with the traced values.
    state: state before the step.
    batch: data set name -> rows.
    hyper: "learning_rate", "weight_decay" and the objective's own, each a scalar.
    frozen: what is not trained.
    num_microbatches: the rows are worked through in this many parts, whose gradients are added up; losses
      are divided by the counts of the whole step, so that the result is that of one part. `optax.microbatch` splits
      arguments of one leading axis alike; data sets here have numbers of rows of their own, and statistics besides.
  """
  objective = build(hyper)

  def loss_fn(params: Params, part: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    forward = remember(lambda at, rows: model_outputs(model, whole(at, *frozen), rows))
    return objective.value(forward, params, part, state.objective_state)

  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if num_microbatches == 1:
    (loss, terms), grads = value_and_grad(state.params, batch)
  else:
    if not objective.divisible:
      raise ValueError("this objective takes its step in one part")

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
      return jax.tree.map(jnp.add, sums, value_and_grad(state.params, part)), None
    parts = split_rows({name: batch[name] for name in objective.rows}, num_microbatches)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(lambda: value_and_grad(state.params, first))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((loss, terms), grads), _ = jax.lax.scan(add, zeros, parts)
  tx = optimizer(hyper["learning_rate"], hyper["weight_decay"])
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  after = objective.update(state.objective_state, terms, params)
  return (TrainState(params, opt_state, after, state.step + 1),
          StepLog(loss, terms, optax.tree.norm(grads)))


@functools.lru_cache(maxsize=PROGRAMS)
def make_step(model: Model, build: Build, mesh: Mesh, num_microbatches: int = 1
              ) -> Callable[..., tuple[TrainState, StepLog]]:
  """The jitted step over stacked runs; of equal arguments the same, with what it has compiled.

  Returns:
    (state, batch, hyper, index=None, frozen=Frozen()) -> (state, log). The state passed in is donated;
    `index` is data set name -> places `[runs, B]` of the step's rows.
  """
  def one(run: tuple, shared: Params | None) -> tuple[TrainState, StepLog]:
    state, batch, hyper, index, own = run
    return train_step(model, build, state, take_rows(batch, index), hyper, Frozen(own, shared), num_microbatches)
  mapped = map_runs(one, mesh)
  axes = model.axes()

  def step(state: TrainState, batch: Batch, hyper: Hyper, index: Any = None, frozen: Frozen = NOTHING
           ) -> tuple[TrainState, StepLog]:
    after, log = mapped((state, batch, hyper, index, frozen.own), frozen.shared)
    # The state stays where it lies, so that it can be donated and the next step is the same program.
    return jax.lax.with_sharding_constraint(after, weight_shardings(after, axes, mesh, stacked=True)), log
  return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=PROGRAMS)
def _begin(build: Build) -> Callable[[Params, Hyper], TrainState]:
  """One function for one objective: what is jitted is looked up by it."""
  begin: Callable[[Params, Hyper], TrainState] = jax.vmap(lambda params, hyper: init_state(params, build(hyper)))
  return begin


def make_begin(build: Build, axes: Mapping[str, tuple[str, ...]], mesh: Mesh
               ) -> Callable[[Params, Hyper], TrainState]:
  """(stacked parameters, stacked hyper-parameters) -> stacked state at step 0, laid out over the mesh."""
  begin = _begin(build)

  def start(params: Params, hyper: Hyper) -> TrainState:
    shardings = weight_shardings(jax.eval_shape(begin, params, hyper), axes, mesh, stacked=True)
    return jax.jit(begin, out_shardings=shardings)(params, hyper)
  return start


@functools.lru_cache(maxsize=PROGRAMS)
def make_readout(model: Model, build: Build, mesh: Mesh) -> Callable[[TrainState, Hyper], Params]:
  """(stacked state, stacked hyper-parameters) -> the stacked parameters that the method releases; see `make_step`."""
  axes = model.axes()

  def one(run: tuple[TrainState, Hyper], _: None) -> Params:
    state, hyper = run
    return released(build(hyper), state.params, state.objective_state)

  @jax.jit
  def read(state: TrainState, hyper: Hyper) -> Params:
    out = map_runs(one, mesh)((state, hyper), None)
    return jax.lax.with_sharding_constraint(out, weight_shardings(out, axes, mesh, stacked=True))
  return read
