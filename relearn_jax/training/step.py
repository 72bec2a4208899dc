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
from relearn_jax.objectives.core import Batch, Need, Objective, Outputs, TokenRows, count_rows
from relearn_jax.objectives.methods import Hyper
from relearn_jax.parallel.mesh import map_runs, weight_shardings

Build = Callable[[Hyper], Objective]


class Frozen(NamedTuple):
  """Weights that are not trained: a run's own, `[runs, ...]` if stacked, or those that all runs share.

  Both are None where all parameters are trained; then nothing is frozen.
  """

  own: Params | None = None
  shared: Params | None = None


NOTHING = Frozen()


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
  return TrainState(params, optimizer(0.0, 0.0).init(params), objective.init(), jnp.zeros((), jnp.int32))


def model_outputs(model: Model, params: Params, rows: TokenRows) -> Outputs:
  """Log-probability of every token given those before it (0 at the first), and hidden states."""
  hidden, head = model.hidden(params, rows.tokens), model.head(params)
  logprobs = per_token(lambda targets, hidden: token_logprobs(hidden, head, targets), rows.tokens, rows.positions,
                       model.config.vocab_size, hidden)
  return Outputs(logprobs, hidden, head)


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
                     each(rows.num_rows))
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
    num_microbatches: the rows are worked through in so many parts, whose gradients are added up; losses
      are divided by the counts of the whole step, so that the result is that of one part.
  """
  objective = build(hyper)

  def loss_fn(params: Params, part: Batch) -> tuple[Float[Array, ""], Any]:
    weights = whole(params, *frozen)
    outputs = {name: model_outputs(model, weights, part[name]) for name in sorted(objective.rows)}
    loss, terms, after = objective.value(outputs.__getitem__, part, state.objective_state)
    return loss, (terms, after)

  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if num_microbatches == 1:
    (loss, (terms, after)), grads = value_and_grad(state.params, batch)
  else:
    if jax.tree.leaves(state.objective_state):
      raise ValueError("an objective with a state of its own takes its step in one part")

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
      (loss, (terms, _)), grads = value_and_grad(state.params, part)
      return jax.tree.map(jnp.add, sums, (loss, terms, grads)), None
    parts = split_rows({name: batch[name] for name in objective.rows}, num_microbatches)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(lambda: value_and_grad(state.params, first))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0][0], shapes[0][1][0], shapes[1]))
    (loss, terms, grads), _ = jax.lax.scan(add, zeros, parts)
    after = state.objective_state
  tx = optimizer(hyper["learning_rate"], hyper["weight_decay"])
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return (TrainState(params, opt_state, after, state.step + 1),
          StepLog(loss, terms, optax.tree.norm(grads)))


def make_step(model: Model, build: Build, mesh: Mesh, num_microbatches: int = 1
              ) -> Callable[..., tuple[TrainState, StepLog]]:
  """The jitted step over stacked runs.

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


def make_begin(objective: Objective, axes: Mapping[str, tuple[str, ...]], mesh: Mesh
               ) -> Callable[[Params], TrainState]:
  """Stacked parameters -> stacked state at step 0, laid out over the mesh."""
  begin = jax.vmap(lambda params: init_state(params, objective))

  def start(params: Params) -> TrainState:
    shardings = weight_shardings(jax.eval_shape(begin, params), axes, mesh, stacked=True)
    return jax.jit(begin, out_shardings=shardings)(params)
  return start


def add_references(model: Model, params: Params, batch: Batch, needs: frozenset[Need], mesh: Mesh,
                   frozen: Frozen = NOTHING, num_microbatches: int = 1) -> Batch:
  """Computes what an objective wants of the reference model, once, and puts it beside the rows.

  Args:
    model: architecture.
    params: the reference's parameters (or adapters), stacked `[runs, ...]`; they may be donated afterwards.
    batch: data set name -> stacked rows.
    needs: the objective's declaration.
    mesh: where the runs lie.
    frozen: what is not trained.
    num_microbatches: rows are worked through in so many parts.
  """
  def one(kinds: tuple[str, ...], run: tuple, shared: Params | None) -> dict[str, Any]:
    params, rows, own = run
    weights = whole(params, own, shared)

    def part(rows: TokenRows) -> dict[str, Array]:
      outputs = model_outputs(model, weights, rows)
      found = {"logprobs": outputs.logprobs, "hidden": outputs.hidden}
      return {kind: found[kind] for kind in kinds}
    if num_microbatches == 1:
      found: dict[str, Any] = part(rows)
    else:
      parts = jax.lax.map(part, split_rows({"x": rows}, num_microbatches)["x"])
      found = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), parts)
    if "hidden" in kinds and own is None and shared is None:
      found["head"] = jax.tree.map(lambda x: x + 0.0, model.head(weights))  # a copy: the head itself is trained
    return found

  after = dict(batch)
  for name in sorted({need.rows for need in needs}):
    kinds = tuple(sorted(need.kind for need in needs if need.rows == name))
    compute = jax.jit(map_runs(functools.partial(one, kinds), mesh))
    after[name] = batch[name]._replace(reference=compute((params, batch[name], frozen.own), frozen.shared))
  return after
