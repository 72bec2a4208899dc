"""Log-probabilities against values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.model import Head


@pytest.mark.parametrize("target,probability", [(0, 0.25), (1, 0.75)])
def test_logprobs_by_hand(target: int, probability: float) -> None:
  hidden, head = jnp.array([[[1.0, 0.0]]]), jnp.array([[0.0, 5.0], [np.log(3.0), -2.0]])  # logits (0, ln 3)
  got = token_logprobs(hidden, Head(head), jnp.array([[target]]))
  np.testing.assert_allclose(got, [[np.log(probability)]], rtol=1e-6)


def test_logits_beyond_the_range_of_exp_stay_finite() -> None:
  hidden, head = jnp.array([[1.0]]), jnp.array([[200.0], [-200.0]])
  np.testing.assert_allclose(token_logprobs(hidden, Head(head), jnp.array([1])), [-400.0])
