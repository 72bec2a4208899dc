"""The terms that published methods are made of. Notation: see `core`."""

import jax
from jaxtyping import Array, Float

from relearn_jax.metrics.likelihood import kl_divergence, per_token
from relearn_jax.objectives.core import (
  Batch,
  Forward,
  Need,
  Objective,
  Reduction,
  Terms,
  mean_rows,
  reduce_tokens,
  stateless,
)


def nll(rows: str, reduction: Reduction = "token_mean") -> Objective:
  """Negative log-likelihood: -sum l / number of counted tokens, or -mean over rows of sum_t l.

  >>> descend = nll("retain")
  >>> sorted(descend.rows)
  ['retain']
  """
  def loss(forward: Forward, batch: Batch) -> tuple[Float[Array, ""], Terms]:
    data = batch[rows]
    value = reduce_tokens(-forward(rows).logprobs, data, reduction)
    value = mean_rows(value, data) if reduction == "sequence_sum" else value
    return value, {f"nll_{rows}": value}
  return stateless(loss, rows)


def kl_to_reference(rows: str) -> Objective:
  """KL(reference || model), averaged over the counted positions.

  The position that predicts token t counts where `mask[t]` does. TOFU's code averages over every
  position of the padded batch instead, prompts and padding included, which makes the weight depend
  on the batch's shape; ours is the mean over counted positions. Source: Maini et al., 2024 (TOFU),
  "KL minimization".
  """
  def loss(forward: Forward, batch: Batch) -> tuple[Float[Array, ""], Terms]:
    outputs, data = forward(rows), batch[rows]
    frozen = data.reference.get("head", outputs.head)  # with adapters the head is the reference's own
    divergence = per_token(
        lambda _, hidden, reference: kl_divergence(hidden, outputs.head, reference, frozen), data.tokens,
        data.positions, outputs.head.weight.shape[0], outputs.hidden, data.reference["hidden"])
    value = reduce_tokens(divergence, data, "token_mean")
    return value, {f"kl_{rows}": value}
  return stateless(loss, rows, frozenset({Need(rows, "hidden")}))


def npo(rows: str, beta: Float[Array, ""] | float) -> Objective:
  """Negative preference optimisation: (2 / beta) * mean over rows of softplus(beta * (s - s_ref)).

  s is the row's summed log-probability, s_ref the reference model's. With beta -> 0 it tends to
  gradient ascent; for any beta it is bounded below by 0, so it does not diverge. Source: Zhang et
  al., 2024, eq. 3, with `-log sigmoid(-x) = softplus(x)`. (Other code under this name uses batch
  means of token losses or raw logits in place of s; beta does not carry over from those.)
  """
  def loss(forward: Forward, batch: Batch) -> tuple[Float[Array, ""], Terms]:
    data = batch[rows]
    s = reduce_tokens(forward(rows).logprobs, data, "sequence_sum")
    s_ref = jax.lax.stop_gradient(reduce_tokens(data.reference["logprobs"], data, "sequence_sum"))
    value = mean_rows(2.0 / beta * jax.nn.softplus(beta * (s - s_ref)), data)
    return value, {f"npo_{rows}": value}
  return stateless(loss, rows, frozenset({Need(rows, "logprobs")}))
