"""Logits of a closed form on which the published formulas were worked out in float64 elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from relearn_jax.models.model import Head
from relearn_jax.objectives.core import Outputs, TokenRows

B, T, V = 2, 6, 7
b, t, v = np.meshgrid(np.arange(B), np.arange(T), np.arange(V), indexing="ij")
LOGITS = {"forget": 2 * np.sin(b + 1.7 * t + 2.3 * v + 0.5), "retain": 2 * np.cos(0.7 * b + 1.3 * t + 1.9 * v)}
REFERENCE = {"forget": 2 * np.sin(b + 1.7 * t + 2.3 * v + 0.9),
             "retain": 2 * np.cos(0.7 * b + 1.3 * t + 1.9 * v + 0.3)}
IDS = {"forget": np.array([[0, 3, 5, 2, 6, 1], [0, 4, 4, 1, 2, 0]])}
IDS["retain"] = (IDS["forget"] + 2) % V
MASK = {"forget": np.ones((B, T)), "retain": np.ones((B, T))}
MASK["forget"][0, :2] = MASK["forget"][1, :3] = MASK["forget"][1, 5] = 0
MASK["retain"][0, :1] = MASK["retain"][1, :2] = 0


def outputs(logits: np.ndarray, ids: np.ndarray) -> Outputs:
  """Outputs of a model with these logits: the hidden states are the logits and the head is the identity."""
  logprobs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[:, :-1]
  chosen = jnp.take_along_axis(logprobs, jnp.asarray(ids)[:, 1:, None], -1)[..., 0]
  return Outputs(jnp.pad(chosen, ((0, 0), (1, 0))), jnp.asarray(logits, jnp.float32), Head(jnp.eye(V)))


def forward(name: str) -> Outputs:
  """The model in training."""
  return outputs(LOGITS[name], IDS[name])


def batch() -> dict[str, TokenRows]:
  """Both data sets, with everything that an objective may want of the reference model."""
  rows = {}
  for name in LOGITS:
    frozen = outputs(REFERENCE[name], IDS[name])
    rows[name] = TokenRows(jnp.asarray(IDS[name]), jnp.asarray(MASK[name], jnp.float32), frozen._asdict())
  return rows
