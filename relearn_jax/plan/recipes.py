"""What a recipe asks of a step: passes, copies of what is trained, what is kept of frozen models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from relearn_jax.objectives.core import Need
from relearn_jax.objectives.recipe import Recipe
from relearn_jax.plan.work import Leaf, Work, adapter_leaves, count, leaves


class Cost(NamedTuple):
  """What a defence makes of the part that it stands around.

  Attributes:
    passes: forward and backward passes in place of one.
    kept: how often as much is kept for the backward pass.
    inner: how often as much is kept as without remat, beside that, with the logits of all counted tokens.
    copies: fp32 numbers in memory at the peak, beside parameters, gradients and moments, for each that is trained.
  """

  passes: float = 1.0
  kept: float = 1.0
  inner: float = 0.0
  copies: int = 0


def defence_cost(recipe: Recipe) -> Cost:
  """The cost of a recipe's defence.

  sam makes two passes, one after the other, and holds the moved weights; the compiler has room for what both keep.
  smoothing makes `draws` passes one after the other, each with its forward pass again, so 4 / 3 of it; it holds the
  moved weights and their gradient beside the sum. gradient_penalty differentiates a gradient, which is about three
  passes; it keeps what two of them keep, and what the inner backward pass computes, which no remat spares, about twice
  what a pass keeps without remat; it holds the inner gradient. What is kept was fitted to `memory_analysis` on CPU, of
  a Llama of 5 M parameters.
  """
  if recipe.defence == "smoothing":
    return Cost(passes=recipe.hyper["draws"] * 4 / 3, copies=2)
  return {"sam": Cost(passes=2, kept=2, copies=1), "gradient_penalty": Cost(passes=3, kept=2, inner=2, copies=1)}.get(
      recipe.defence, Cost())


def state_copies(recipe: Recipe, trained: Sequence[Leaf]) -> int:
  """Copies of what is trained that the objective's state holds; single numbers are left out."""
  abstract = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in trained}
  state = jax.eval_shape(recipe.objective.init, abstract)
  return sum(leaf.size for leaf in jax.tree.leaves(state)) // count(trained)


def step_fields(recipe: Recipe, seen: Mapping[str, int], held: Mapping[str, int], work: Work) -> dict[str, Any]:
  """Fields of a training step's `Work` that follow from the objective.

  Args:
    recipe: the method with its defence.
    seen: data set -> rows of a step.
    held: data set -> rows of which statistics of frozen models are kept.
    work: the model, and what is trained.
  """
  objective, cost = recipe.objective, defence_cost(recipe)
  defended = recipe.published.forget(recipe.hyper).rows
  plain = recipe.published.retain(recipe.hyper).rows if recipe.published.retain else frozenset()
  inside, outside = sum(seen[name] for name in defended), sum(seen[name] for name in plain)
  share = lambda times, rest=1: (inside * times + outside * rest) / (inside + outside)
  trained = (adapter_leaves(work.config, work.lora_rank, work.lora_targets) if work.adapter == "lora"
             else leaves(work.config))
  return {"passes": share(cost.passes), "kept": share(cost.kept), "inner": share(cost.inner, 0),
          "copies": cost.copies + state_copies(recipe, trained), **reference_fields(objective.needs, held)}


def reference_fields(needs: Iterable[Need], held: Mapping[str, int]) -> dict[str, Any]:
  """Fields of `Work` for what is kept of frozen models.

  Args:
    needs: of the objective.
    held: data set -> its rows.
  """
  rows = lambda *kinds: [held[need.rows] for need in needs if need.kind in kinds]
  return {"kl": bool(rows("hidden")), "reference_rows": sum(rows("hidden", "layer")),
          "reference_heads": max(1, len(rows("hidden"))), "statistic_rows": sum(rows("logprobs", "generic"))}
