"""Training a small decoder from random weights, on one device, before any audit."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.training.ended import AllEnded, Ended, What, finite_runs
from relearn_jax.training.step import StepLog, TrainState, init_state, train_step

# Called after each step, counted from 1, with (step, its log, its learning rate, its batch).
OnStep = Callable[[int, StepLog, float, np.ndarray], None]


def pretrain(model: Model, batches: Sequence[np.ndarray], *, learning_rate: float, warmup_steps: int, seed: int,
             field: str, weight_decay: float = 1e-4, on_step: OnStep = lambda *_: None) -> Params:
  """AdamW with linear warmup and cosine decay to zero, a step a batch.

  Args:
    model: architecture; its initial weights are drawn from `seed`.
    batches: right-padded tokens `[B, T]` each, padding 0; every token but the first is predicted.
    learning_rate: the peak.
    warmup_steps: steps from zero to the peak.
    seed: decides the initial weights.
    field: what the learning rate is called in the configuration, for messages.
    weight_decay: of AdamW; optax's default.
    on_step: see `OnStep`.

  Raises:
    AllEnded: the loss or the gradient of a step, or a weight at the end, is not finite.
  """
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, len(batches))
  objective = nll("text")

  @jax.jit(donate_argnums=0)
  def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, StepLog]:
    mask = jnp.pad((tokens[:, 1:] != 0).astype(jnp.float32), ((0, 0), (1, 0)))
    hyper = {"learning_rate": schedule(state.step), "weight_decay": weight_decay}
    return train_step(model, lambda _: objective, state, {"text": TokenRows(tokens, mask)}, hyper)

  state = jax.jit(lambda key: init_state(model.init(key), objective))(jax.random.key(seed))
  rates = np.asarray(jax.vmap(schedule)(jnp.arange(len(batches))))

  def end(number: int, what: What) -> AllEnded:
    return AllEnded([Ended("base", "pretrain", number, what)], field, learning_rate)

  def look(number: int, log: StepLog) -> None:
    if not np.isfinite(log.loss):
      raise end(number, "loss")
    if not np.isfinite(log.grad_norm):
      raise end(number, "gradient")
  before: tuple[int, StepLog] | None = None
  for number, tokens in enumerate(batches, 1):
    state, log = step(state, jnp.asarray(tokens))
    on_step(number, log, float(rates[number - 1]), tokens)
    if before:  # one step late, so that the device never waits
      look(*before)
    before = number, log
  if before:
    look(*before)
  if not finite_runs(jax.tree.map(lambda leaf: leaf[None], state.params))[0]:
    raise end(len(batches), "weights")
  return state.params
