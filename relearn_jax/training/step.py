"""One jitted training step over the runs axis.

State, batch and hyper-parameters are stacked `[runs, ...]` and the step of one run is mapped over
them, so U, N and O take the same step by construction. Learning rates and loss weights are traced:
one executable serves every cell of a shape.
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
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.core import Batch, Need, Objective, Outputs, TokenRows
from relearn_jax.objectives.methods import Hyper
from relearn_jax.parallel.mesh import map_runs

Build = Callable[[Hyper], Objective]


class TrainState(NamedTuple):
  """What training carries, of one run or stacked `[runs, ...]`; parameters and moments in fp32."""

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


def train_step(model: Model, build: Build, state: TrainState, batch: Batch, hyper: Hyper
               ) -> tuple[TrainState, StepLog]:
  """One AdamW step of one run.

  Args:
    model: architecture.
    build: hyper-parameters -> objective, called with the traced values.
    state: state before the step.
    batch: data set name -> rows.
    hyper: "learning_rate", "weight_decay" and the objective's own, each a scalar.
  """
  objective = build(hyper)

  def loss_fn(params: Params) -> tuple[Float[Array, ""], Any]:
    outputs = {name: model_outputs(model, params, batch[name]) for name in sorted(objective.rows)}
    loss, terms, after = objective.value(outputs.__getitem__, batch, state.objective_state)
    return loss, (terms, after)

  (loss, (terms, after)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  tx = optimizer(hyper["learning_rate"], hyper["weight_decay"])
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return (TrainState(params, opt_state, after, state.step + 1),
          StepLog(loss, terms, optax.tree.norm(grads)))


def make_step(model: Model, build: Build, mesh: Mesh
              ) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, StepLog]]:
  """The jitted step over stacked runs; the state passed in is donated."""
  mapped = map_runs(lambda run, _: train_step(model, build, *run), mesh)

  def step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, StepLog]:
    return mapped((state, batch, hyper), ())
  return jax.jit(step, donate_argnums=0)


def add_references(model: Model, params: Params, batch: Batch, needs: frozenset[Need], mesh: Mesh) -> Batch:
  """Computes what an objective wants of the reference model, once, and puts it beside the rows.

  Args:
    model: architecture.
    params: the reference's parameters, stacked `[runs, ...]`; they may be donated afterwards.
    batch: data set name -> stacked rows.
    needs: the objective's declaration.
    mesh: where the runs lie.
  """
  def one(kinds: tuple[str, ...], run: tuple[Params, TokenRows], _: object) -> Mapping[str, Array]:
    outputs = model_outputs(model, *run)
    found: dict[str, Any] = {}
    if "logprobs" in kinds:
      found["logprobs"] = outputs.logprobs
    if "hidden" in kinds:
      copy = jax.tree.map(lambda x: x + 0.0, outputs.head)  # the head itself is trained
      found |= {"hidden": outputs.hidden, "head": copy}
    return found

  after = dict(batch)
  for name in sorted({need.rows for need in needs}):
    kinds = tuple(sorted(need.kind for need in needs if need.rows == name))
    compute = jax.jit(map_runs(functools.partial(one, kinds), mesh))
    after[name] = batch[name]._replace(reference=compute((params, batch[name]), ()))
  return after
