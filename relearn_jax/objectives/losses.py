"""The terms that published methods are made of. Notation: see `core`; z are logits, V the vocabulary's size.

Every function returns an `Objective`. Where a paper and the code published with it differ, the paper decides, and the
docstring says so.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relearn_jax.metrics.likelihood import per_token
from relearn_jax.models.model import Params, head_logits
from relearn_jax.objectives.combinators import Scalar
from relearn_jax.objectives.core import (
  Batch,
  Forward,
  Need,
  Objective,
  Outputs,
  Reduction,
  State,
  Terms,
  TokenRows,
  Value,
  mean_rows,
  num_tokens,
  reduce_tokens,
  stateless,
)

Logits = Float[Array, "*batch V"]


def over_vocabulary(function: Callable[..., Float[Array, "B C"]], outputs: Outputs, rows: TokenRows, *,
                    reference: bool = False) -> Float[Array, "B T"]:
  """A quantity of every counted token, from its logits, without `[B, T, V]` in memory.

  Args:
    function: (logits `[B, C, V]`, labels `[B, C]`) -> `[B, C]`; with `reference`, the frozen model's logits come third.
    outputs: of the model.
    rows: its rows.
    reference: whether the frozen model's logits are wanted, from its cached hidden states. They have no gradient.
  """
  frozen = rows.reference.get("head", outputs.head)  # with adapters the head is the reference's own

  def chunk(labels: Int[Array, "B C"], hidden: Float[Array, "B C D"], *fixed: Float[Array, "B C D"]) -> Array:
    logits = head_logits(hidden, outputs.head)
    return function(logits, labels, *(jax.lax.stop_gradient(head_logits(h, frozen)) for h in fixed))
  labels = rows.tokens if rows.labels is None else rows.labels
  fixed = (rows.reference["hidden"],) if reference else ()
  return per_token(chunk, labels, rows.positions, outputs.head.weight.shape[0], outputs.hidden, *fixed)


def nll(rows: str, reduction: Reduction = "token_mean") -> Objective:
  """Negative log-likelihood: token mean of -l, or row mean of -s.

  >>> descend = nll("retain")
  >>> sorted(descend.rows)
  ['retain']
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    value = reduce_tokens(-forward(params, data).logprobs, data, reduction)
    value = mean_rows(value, data) if reduction == "sequence_sum" else value
    return value, {f"nll_{rows}": value}
  return stateless(loss, rows, token_means=reduction == "token_mean")


def nll_union(*names: str) -> Objective:
  """Token mean of -l over several data sets as if they were one; each set's own mean is logged."""
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    sums = {name: jnp.sum(-forward(params, batch[name]).logprobs * batch[name].mask) for name in names}
    counts = {name: jnp.maximum(num_tokens(batch[name]), 1.0) for name in names}
    total: Array = sum(sums.values(), jnp.zeros(())) / sum(counts.values(), jnp.zeros(()))
    return total, {f"nll_{name}": sums[name] / counts[name] for name in names}
  return stateless(loss, *names, token_means=True)


def kl_divergence(logits: Logits, reference: Logits, temperature: Scalar = 1.0) -> Float[Array, "*batch"]:
  """T^2 KL(softmax(z_ref / T) || softmax(z / T)) in nats; T^2 keeps gradients comparable (Hinton et al., 2015).

  >>> uniform, reference = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))
  >>> round(float(kl_divergence(uniform, reference)), 4)  # 3/4 log(3/2) + 1/4 log(1/2)
  0.1308
  """
  model, fixed = jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(reference / temperature)
  return jnp.square(temperature) * jnp.sum(jnp.exp(fixed) * (fixed - model), axis=-1)


def kl_to_reference(rows: str, temperature: Scalar = 1.0) -> Objective:
  """KL(reference || model), token mean: the position that predicts token t counts where `mask[t]` does.

  TOFU's code averages over every position of the padded batch instead, prompts and padding included,
  which makes the weight depend on the batch's shape. Code that derives from SCRUB's for images takes the softmax over
  the axis of time; ours is over the vocabulary. Sources: Maini et al., 2024 (TOFU), "KL minimization"; Kurmanji et
  al., 2023 (SCRUB), who use a temperature of 4.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    divergence = over_vocabulary(lambda z, _, z_ref: kl_divergence(z, z_ref, temperature), forward(params, data), data,
                                 reference=True)
    value = reduce_tokens(divergence, data, "token_mean")
    return value, {f"kl_{rows}": value}
  return stateless(loss, rows, needs=(Need(rows, "hidden"),), token_means=True)


def _gain(forward: Forward, params: Params, data: TokenRows) -> Float[Array, " B"]:
  """s - s_ref of every row."""
  s = reduce_tokens(forward(params, data).logprobs, data, "sequence_sum")
  return s - jax.lax.stop_gradient(reduce_tokens(data.reference["logprobs"], data, "sequence_sum"))


def npo(rows: str, beta: Scalar) -> Objective:
  """Negative preference optimisation: (2 / beta) * row mean of softplus(beta * (s - s_ref)).

  With beta -> 0 it tends to gradient ascent; for any beta it is bounded below by 0, so it does not diverge. Source:
  Zhang et al., 2024, eq. 3, with `-log sigmoid(-x) = softplus(x)`. (Other code under this name uses batch
  means of token losses or raw logits in place of s; beta does not carry over from those.)
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    value = mean_rows(2.0 / beta * jax.nn.softplus(beta * _gain(forward, params, data)), data)
    return value, {f"npo_{rows}": value}
  return stateless(loss, rows, needs=(Need(rows, "logprobs"),))


def simnpo(rows: str, beta: Scalar, delta: Scalar = 0.0) -> Objective:
  """NPO without a reference: (2 / beta) * row mean of softplus(-beta * (-s / n - delta)).

  Source: Fan et al., 2024 (SimNPO), eq. 4; n are the counted tokens of the row.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    s = reduce_tokens(forward(params, data).logprobs, data, "sequence_sum")
    mean = s / jnp.maximum(jnp.sum(data.mask, -1), 1.0)
    value = mean_rows(2.0 / beta * jax.nn.softplus(beta * (mean + delta)), data)
    return value, {f"simnpo_{rows}": value}
  return stateless(loss, rows)


def dpo(chosen: str, rejected: str, beta: Scalar) -> Objective:
  """(2 / beta) * row mean of softplus(-beta * ((s - s_ref)[chosen] - (s - s_ref)[rejected])), rows in pairs.

  Row i of both sets has the same prompt. Source: Rafailov et al., 2023, with the factor 2 / beta that
  Zhang et al., 2024, use to compare it with NPO; TOFU's own code leaves it out.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    margin = _gain(forward, params, batch[chosen]) - _gain(forward, params, batch[rejected])
    value = mean_rows(2.0 / beta * jax.nn.softplus(-beta * margin), batch[rejected])
    return value, {f"dpo_{chosen}": value}
  return stateless(loss, chosen, rejected, needs=(Need(chosen, "logprobs"), Need(rejected, "logprobs")))


def weighted_nll(rows: str, weight: Callable[[Float[Array, "B T"]], Float[Array, "B T"]]) -> Objective:
  """Token mean of w(p) * -l, w without a gradient; p is the token's probability.

  Sources: Wang et al., 2025 (weighted gradient ascent: w = p^beta); Yang et al., 2025 (SatImp: w = p^beta1 (1 -
  p)^beta2, saturation and importance).
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    logprobs = forward(params, data).logprobs
    fixed = jax.lax.stop_gradient(weight(jnp.exp(logprobs)))
    value = reduce_tokens(-fixed * logprobs, data, "token_mean")
    return value, {f"weighted_nll_{rows}": value, f"nll_{rows}": reduce_tokens(-logprobs, data, "token_mean")}
  return stateless(loss, rows, token_means=True)


def undial(rows: str, beta: Scalar) -> Objective:
  """Self-distillation from adjusted logits: token mean of CE(softmax(z_ref - beta * onehot(token)), softmax(z)).

  Source: Dong et al., 2024 (UNDIAL). Published code averages over every position of the batch, padding and prompts
  too; ours over the counted ones.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    def entropy(z: Logits, labels: Array, z_ref: Logits) -> Array:
      target = jax.nn.softmax(z_ref - beta * jax.nn.one_hot(labels, z.shape[-1]))
      return -jnp.sum(target * jax.nn.log_softmax(z), -1)
    data = batch[rows]
    value = reduce_tokens(over_vocabulary(entropy, forward(params, data), data, reference=True), data, "token_mean")
    return value, {f"undial_{rows}": value}
  return stateless(loss, rows, needs=(Need(rows, "hidden"),), token_means=True)


def ce_u(rows: str, skip_first: Scalar = 1.0) -> Objective:
  """Cross-entropy with the model's own distribution from which the true token is taken out, which has no gradient.

  Token mean of CE(softmax(z with the token's logit at -inf), softmax(z)). The first counted token of each row counts
  1 - skip_first: at 1 it is left out, as published. Source: Yang, 2025 (CE-U).
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    def entropy(z: Logits, labels: Array) -> Array:
      without = jnp.where(jax.nn.one_hot(labels, z.shape[-1], dtype=bool), -jnp.inf, z)
      return -jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(without)) * jax.nn.log_softmax(z), -1)
    data = batch[rows]
    values = over_vocabulary(entropy, forward(params, data), data)
    first = (jnp.cumsum(data.mask, -1) == 1) & (data.mask > 0)
    number = jnp.sum(jnp.sum(data.mask, -1) > 0) if data.num_rows is None else data.num_rows
    count = num_tokens(data) - skip_first * number
    value = jnp.sum(values * data.mask * (1.0 - skip_first * first)) / jnp.maximum(count, 1.0)
    return value, {f"ce_u_{rows}": value}
  return stateless(loss, rows)


def logit_margin(rows: str) -> Objective:
  """Token mean of (max_v z - mean_v z)^2: small where the model prefers nothing. Source: Entesari et al., 2025 (PDU).

  Published code counts the positions of the tokens themselves; ours counts those that predict them, as all losses do.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    margin = lambda z, _: jnp.square(jnp.max(z, -1) - jnp.mean(z, -1))
    value = reduce_tokens(over_vocabulary(margin, forward(params, data), data), data, "token_mean")
    return value, {f"logit_margin_{rows}": value}
  return stateless(loss, rows, token_means=True)


def retain_constraint(rows: str, epsilon: Scalar, initial: Scalar, rate: Scalar, warmup: Scalar) -> Objective:
  """lambda * (NLL(rows) - epsilon), with a dual variable lambda >= 0 as state.

  After step k, counted from 0, lambda <- max(0, lambda + rate * (NLL - epsilon)) if k >= warmup, NLL that of the step.
  Source: Entesari et al., 2025 (PDU).
  """
  def value(forward: Forward, params: Params, batch: Batch, state: State) -> Value:
    data, (_, dual) = batch[rows], state
    loss = reduce_tokens(-forward(params, data).logprobs, data, "token_mean")
    share = jnp.sum(data.mask) / jnp.maximum(num_tokens(data), 1.0)  # of the step's tokens, in this part of it
    return dual * (loss - share * epsilon), {f"nll_{rows}": loss, "dual": share * dual}

  def update(state: State, terms: Terms, params: Params) -> State:
    step, dual = state
    after = jnp.maximum(dual + rate * (terms[f"nll_{rows}"] - epsilon), 0.0)
    return step + 1, jnp.where(step >= warmup, after, dual)
  return Objective(
      lambda params: (jnp.zeros((), jnp.int32), jnp.asarray(initial, jnp.float32)), value, frozenset(),
      frozenset({rows}), update, packs=frozenset({rows}))


def steering_vector(size: int, seed: Scalar = 0) -> Float[Array, " D"]:
  """A unit vector u / |u|, u uniform in [0, 1)^D, drawn from `seed`."""
  u = jax.random.uniform(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), (size,))
  return u / jnp.linalg.norm(u)


def misdirect(rows: str, depth: float, steering: Scalar, seed: Scalar = 0) -> Objective:
  """RMU's forget term: token mean of mean_d (h - steering * u)^2, h the output of the first `depth` of the layers.

  `depth` is a share, fixed when the step is compiled; u: see `steering_vector`. h is taken at the token itself,
  not where it is predicted. Source: Li et al., 2024 (WMDP), whose code also counts padding.
  """
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    h = _layer(forward(params, data), depth)
    distance = jnp.mean(jnp.square(h - steering * steering_vector(h.shape[-1], seed)), -1)
    value = reduce_tokens(distance, data, "token_mean")
    return value, {f"misdirect_{rows}": value}
  return stateless(loss, rows, token_means=True)


def preserve(rows: str, depth: float) -> Objective:
  """RMU's retain term: token mean of mean_d (h - h_ref)^2; see `misdirect`."""
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    moved = _layer(forward(params, data), depth) - jax.lax.stop_gradient(data.reference["layer"]).astype(jnp.float32)
    value = reduce_tokens(jnp.mean(jnp.square(moved), -1), data, "token_mean")
    return value, {f"preserve_{rows}": value}
  return stateless(loss, rows, needs=(Need(rows, "layer", depth),), token_means=True)


def _layer(outputs: Outputs, depth: float) -> Float[Array, "B T D"]:
  assert outputs.layer is not None
  return outputs.layer(depth).astype(jnp.float32)


def generic_logits(base: Logits, reinforced: Logits, alpha: Scalar) -> Logits:
  """v_base - alpha * relu(v_reinforced - v_base): what a model would say that had not seen the text.

  What the model that was reinforced on the text prefers is taken as what the text taught. Source: Eldan and
  Russinovich, 2023, eq. 1.
  """
  return base - alpha * jax.nn.relu(reinforced - base)


def generic_nll(rows: str, alpha: float) -> Objective:
  """Token mean of -log p(g), g = argmax_v of the generic logits at each place; g is computed once and cached."""
  def loss(forward: Forward, params: Params, batch: Batch) -> Value:
    data = batch[rows]
    generic = data._replace(labels=data.reference["generic"])
    value = reduce_tokens(-forward(params, generic).logprobs, data, "token_mean")
    same = reduce_tokens(jnp.equal(data.reference["generic"], data.tokens).astype(jnp.float32), data, "token_mean")
    return value, {f"nll_generic_{rows}": value, "unchanged": same}
  return stateless(loss, rows, needs=(Need(rows, "generic", alpha),), token_means=True)
