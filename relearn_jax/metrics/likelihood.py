"""Log-probabilities of tokens, the quantity that every objective and likelihood metric is made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"], targets: Int[Array, "*batch"]
                   ) -> Float[Array, "*batch"]:
  """log softmax(head @ hidden)[target], natural log, in fp32 at any precision of the inputs.

  Args:
    hidden: final hidden states; `hidden[..., t, :]` predicts the token after position t.
    head: output head.
    targets: the token to score at each position.
  """
  logits = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
