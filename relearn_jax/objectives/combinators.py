"""Combinators: objectives made of objectives. Sums and phases, and defences that are meant to survive relearning."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from relearn_jax.models.model import Params
from relearn_jax.objectives.core import Batch, Forward, Objective, State, Terms, Value

Scalar = Float[Array, ""] | float
TINY = 1e-12


def ascend(objective: Objective) -> Objective:
  """The negated objective: minimising it raises the loss it was made of."""
  return scale(-1.0, objective)


def scale(weight: Scalar, objective: Objective) -> Objective:
  """`weight` times an objective; the terms are logged unscaled."""
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    loss, terms = objective.value(forward, params, batch, state)
    return weight * loss, terms
  return dataclasses.replace(objective, value=value)


def released(objective: Objective, params: Params, state: State) -> Params:
  """The parameters that an objective releases."""
  return params if objective.readout is None else objective.readout(params, state)


def _merge(first: Terms, second: Terms) -> Terms:
  if clash := first.keys() & second.keys():
    raise ValueError(f"two terms of a sum are both called {sorted(clash)}")
  return {**first, **second}


def _packs(*objectives: Objective) -> frozenset[str]:
  """The data sets of which each objective that reads them takes means over tokens alone."""
  every = frozenset[str]().union(*(o.rows for o in objectives))
  return every - frozenset[str]().union(*(o.rows - o.packs for o in objectives))


def add(*objectives: Objective) -> Objective:
  """The sum of objectives, each with its own state. Terms must have different names.

  >>> from relearn_jax.objectives.losses import nll
  >>> gradient_difference = add(ascend(nll("forget")), nll("retain"))
  >>> sorted(gradient_difference.rows)
  ['forget', 'retain']
  """
  def value(forward: Forward, params: Params, batch: Batch, states: State) -> Value:
    total: Any = jnp.zeros(())
    merged: Terms = {}
    for objective, state in zip(objectives, states, strict=True):
      loss, terms = objective.value(forward, params, batch, state)
      total, merged = total + loss, _merge(merged, terms)
    return total, merged

  def update(states: State, terms: Terms, params: Params) -> State:
    return tuple(o.update(state, terms, params) for o, state in zip(objectives, states, strict=True))

  def readout(params: Params, states: State) -> Params:
    for objective, state in zip(objectives, states, strict=True):
      params = released(objective, params, state)
    return params
  return Objective(
      lambda params: tuple(objective.init(params) for objective in objectives), value,
      frozenset().union(*(o.needs for o in objectives)), frozenset().union(*(o.rows for o in objectives)),
      update, readout if any(o.readout for o in objectives) else None, all(o.divisible for o in objectives),
      _packs(*objectives))


def alternate(first: Objective, second: Objective, period: Scalar, phases: Scalar) -> Objective:
  """One objective and the other in turn, then the second alone.

  Step k, counted from 0, is in phase k // period; the first objective has the phases 0, 2, 4, ..., as long as it has
  had fewer than `phases`, and the second has all others. The state of the one that rests does not change; the terms of
  both are logged at every step. Neither may release other weights than those that are trained.
  """
  def is_first(step: Int[Array, ""]) -> Array:
    phase = jnp.floor(step / period)
    return (jnp.mod(phase, 2) == 0) & (phase < 2 * phases)

  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    step, one, other = state
    loss, terms = first.value(forward, params, batch, one)
    loss_other, terms_other = second.value(forward, params, batch, other)
    return jnp.where(is_first(step), loss, loss_other), _merge(terms, terms_other)

  def update(state: State, terms: Terms, params: Params) -> State:
    step, one, other = state
    here = is_first(step)
    pick = lambda yes, new, old: jax.tree.map(lambda a, b: jnp.where(yes, a, b), new, old)
    return (step + 1, pick(here, first.update(one, terms, params), one),
            pick(~here, second.update(other, terms, params), other))
  if first.readout or second.readout:
    raise ValueError("a phase cannot release weights of its own; put the alternation inside")
  return Objective(
      lambda params: (jnp.zeros((), jnp.int32), first.init(params), second.init(params)), value,
      first.needs | second.needs, first.rows | second.rows, update, divisible=first.divisible and second.divisible,
      packs=_packs(first, second))


def sharpness_aware(objective: Objective, rho: Scalar) -> Objective:
  """The objective at the worst of the weights near by: loss(w + rho g / |g|), g its gradient at w, which is fixed.

  |g| is over all that is trained. The gradient of this value is the one of Foret et al., 2021 (SAM); around the forget
  term of a method it is the defence of Fan et al., 2025 ("Towards LLM Unlearning Resilient to Relearning Attacks"),
  where the other terms stay at w: `add(sharpness_aware(npo("forget", beta), rho), nll("retain"))`. The perturbed
  weights exist inside the step alone, so that nothing drifts by adding and taking away.
  """
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    loss = lambda at: objective.value(forward, at, batch, state)[0]
    grads = jax.grad(loss)(jax.lax.stop_gradient(params))
    by = rho / jnp.maximum(optax.tree.norm(grads), TINY)
    moved = jax.tree.map(lambda p, g: p + jax.lax.stop_gradient(by * g).astype(p.dtype), params, grads)
    return objective.value(forward, moved, batch, state)
  return dataclasses.replace(objective, value=value, divisible=False)


def random_smoothing(objective: Objective, radius: Scalar, draws: int, seed: Scalar = 0) -> Objective:
  """The mean of the objective over `draws` of w + N(0, radius^2), drawn anew at each step from (seed, step, draw).

  Source: Fan et al., 2025, who take three draws of radius 1e-4 around the forget term. Terms are means too.
  """
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    step, inner = state
    key = jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), step)

    def draw(number: Array) -> Value:
      leaves, form = jax.tree.flatten(params)
      keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
      noise = lambda leaf, key: radius * jax.random.normal(key, leaf.shape, leaf.dtype)
      moved = [leaf + noise(leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
      return objective.value(forward, jax.tree.unflatten(form, moved), batch, inner)
    # One after the other, each computed again in the backward pass: the memory of one draw.
    return jax.tree.map(lambda values: jnp.mean(values, 0), jax.lax.map(jax.checkpoint(draw), jnp.arange(draws)))
  return dataclasses.replace(
      objective, init=lambda params: (jnp.zeros((), jnp.int32), objective.init(params)), value=value,
      update=lambda state, terms, params: (state[0] + 1, objective.update(state[1], terms, params)),
      readout=_inner_readout(objective, 1))


def _inner_readout(objective: Objective, place: int) -> Callable[[Params, State], Params] | None:
  """Of an objective whose state lies at a place of the combinator's."""
  inner = objective.readout
  return None if inner is None else lambda params, state: inner(params, state[place])


def gradient_penalty(objective: Objective, weight: Scalar) -> Objective:
  """The objective plus weight * |g|^2, g its gradient with respect to all that is trained.

  The penalty is differentiated itself, so that flat places are sought. (Published code for this defence of Fan et al.,
  2025, takes the norm as a plain number, which has no gradient.)
  """
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    loss = lambda at: objective.value(forward, at, batch, state)
    (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(params)
    penalty = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    return value + weight * penalty, _merge(terms, {"gradient_norm2": jnp.asarray(penalty)})
  return dataclasses.replace(objective, value=value, divisible=False)


def weight_average(objective: Objective, start: Scalar, every: Scalar) -> Objective:
  """Trains as the objective does, and releases the mean of the weights after steps start, start + every, ...

  Before `start` the trained weights are released. A second copy of what is trained is kept. Source: Izmailov et al.,
  2018; as a defence against relearning Fan et al., 2025.
  """
  def init(params: Params) -> State:
    zero = jnp.zeros((), jnp.int32)
    return {"step": zero, "count": zero, "mean": jax.tree.map(jnp.copy, params), "inner": objective.init(params)}

  def update(state: State, terms: Terms, params: Params) -> State:
    step = state["step"] + 1
    take = (step >= start) & (jnp.mod(step - start, every) == 0)
    count = state["count"] + take.astype(jnp.int32)
    share = take / jnp.maximum(count, 1)
    return {"step": step, "count": count, "inner": objective.update(state["inner"], terms, params),
            "mean": jax.tree.map(lambda m, p: m + share * (p - m), state["mean"], params)}

  def readout(params: Params, state: State) -> Params:
    some = state["count"] > 0
    return released(objective, jax.tree.map(lambda p, m: jnp.where(some, m, p), params, state["mean"]), state["inner"])
  return dataclasses.replace(
      objective, init=init, update=update, readout=readout,
      value=lambda forward, params, batch, state: objective.value(forward, params, batch, state["inner"]))


def task_vector(objective: Objective, alpha: Scalar) -> Objective:
  """Trains as the objective does, and releases w0 - alpha * (w - w0), w0 the weights at step 0.

  Meant for an objective that learns what is to be forgotten. Of an adapter, whose part in the weights is b a with b = 0
  at step 0, b is turned round. A second copy of what is trained is kept. Source: Ilharco et al., 2023.
  """
  def readout(params: Params, state: State) -> Params:
    def negate(path: Any, now: Array, before: Array) -> Array:
      part = getattr(path[-1], "key", None)
      return now if part == "a" else before - alpha * (now - before)
    return jax.tree_util.tree_map_with_path(negate, released(objective, params, state[1]), state[0])
  return dataclasses.replace(
      objective, init=lambda params: (jax.tree.map(jnp.copy, params), objective.init(params)), readout=readout,
      value=lambda forward, params, batch, state: objective.value(forward, params, batch, state[1]),
      update=lambda state, terms, params: (state[0], objective.update(state[1], terms, params)))
