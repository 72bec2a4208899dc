"""Logits of a closed form on which the published formulas were worked out in float64 elsewhere."""

from typing import Any

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
SAME = {"idk": "retain", "alternate": "retain", "relabelled": "forget"}  # sets that have another's logits and rows


def plain(name: str) -> str:
  return SAME.get(name, name)


def outputs(logits: Any, ids: Any, head: Head | None = None) -> Outputs:
  """Outputs of a model with these logits: the hidden states are the logits and the head is the identity."""
  logprobs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[:, :-1]
  chosen = jnp.take_along_axis(logprobs, jnp.asarray(ids)[:, 1:, None], -1)[..., 0]
  hidden = jnp.asarray(logits, jnp.float32)
  return Outputs(jnp.pad(chosen, ((0, 0), (1, 0))), hidden, head or Head(jnp.eye(V)), lambda depth: depth * hidden)


PARAMS = {name: jnp.asarray(logits, jnp.float32) for name, logits in LOGITS.items()}  # the logits are the weights


def forward(params: Any, rows: TokenRows) -> Outputs:
  """The model in training: rows are known by a name that stands in their reference."""
  return outputs(params[plain(rows.reference["name"])], rows.tokens if rows.labels is None else rows.labels)


def batch() -> dict[str, TokenRows]:
  """All data sets, with everything that an objective may want of frozen models."""
  rows = {}
  for name in ("forget", "retain", *SAME):
    source = plain(name)
    frozen = outputs(REFERENCE[source], IDS[source])
    reference = {"name": name, "logprobs": frozen.logprobs, "hidden": frozen.hidden, "head": frozen.head,
                 "layer": 0.5 * frozen.hidden, "generic": jnp.asarray((IDS[source] * 3 + 1) % V)}
    rows[name] = TokenRows(jnp.asarray(IDS[source]), jnp.asarray(MASK[source], jnp.float32), reference)
  return rows
