"""Unlearning in torch, written from the formulas and from nothing of ours; writes what test_step.py compares with.

Needs torch and transformers (`pip install -e '.[parity]'`); run from the repository root:

  python -m tests.training.reference

It writes `curves.json`: the losses before each of 6 AdamW steps on a golden checkpoint, and the norm
of the change of all weights after them, for each method.
"""

import json
import pathlib
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
CHECKPOINT = HERE.parent / "models" / "golden" / "multi_head_tied"
CURVES = HERE / "curves.json"
METHODS, STEPS = ("nll", "ga", "gd", "kl", "npo"), 6
HYPER = {"learning_rate": 2e-3, "weight_decay": 0.1, "retain_weight": 0.7, "beta": 0.2}


def rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Tokens and counts of two data sets: rows of several lengths, a prompt that does not count."""
  rng, made = np.random.default_rng(3), {}
  for name, lengths in (("forget", (14, 9, 7)), ("retain", (11, 16))):
    tokens, mask = np.zeros((len(lengths), 16), np.int32), np.zeros((len(lengths), 16), np.float32)
    for i, length in enumerate(lengths):
      tokens[i, :length] = rng.integers(4, 96, length)
      mask[i, 1 + 2 * i:length] = 1
    made[name] = tokens, mask
  return made


def curve(method: str) -> tuple[list[float], float]:
  """Losses before each step, and the norm of the change of the weights."""
  import torch
  from transformers import LlamaForCausalLM

  def load() -> Any:
    return LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

  data = {name: (torch.tensor(tokens).long(), torch.tensor(mask)) for name, (tokens, mask) in rows().items()}
  model, frozen = load(), load()

  def logprobs(which: Any, name: str) -> Any:
    tokens, mask = data[name]
    attend = (tokens != 0).long()
    return torch.log_softmax(which(tokens, attention_mask=attend).logits[:, :-1], -1), tokens[:, 1:], mask[:, 1:]

  def chosen(which: Any, name: str) -> Any:
    logp, targets, mask = logprobs(which, name)
    return logp.gather(-1, targets[..., None])[..., 0] * mask, mask

  def mean_nll(name: str) -> Any:
    logp, mask = chosen(model, name)
    return -logp.sum() / mask.sum()

  def loss() -> Any:
    if method == "nll":
      return mean_nll("forget")
    if method == "ga":
      return -mean_nll("forget")
    if method == "gd":
      return -mean_nll("forget") + HYPER["retain_weight"] * mean_nll("retain")
    if method == "kl":
      logp, _, mask = logprobs(model, "retain")
      with torch.no_grad():
        ref = logprobs(frozen, "retain")[0]
      divergence = torch.nn.functional.kl_div(logp, ref, log_target=True, reduction="none").sum(-1)
      return -mean_nll("forget") + HYPER["retain_weight"] * (divergence * mask).sum() / mask.sum()
    s = chosen(model, "forget")[0].sum(-1)
    with torch.no_grad():
      s_ref = chosen(frozen, "forget")[0].sum(-1)
    return -2 / HYPER["beta"] * torch.nn.functional.logsigmoid(-HYPER["beta"] * (s - s_ref)).mean()

  adamw = torch.optim.AdamW(model.parameters(), lr=HYPER["learning_rate"], betas=(0.9, 0.999), eps=1e-8,
                            weight_decay=HYPER["weight_decay"])
  losses = []
  for _ in range(STEPS):
    value = loss()
    adamw.zero_grad()
    value.backward()
    adamw.step()
    losses.append(value.item())
  moved = sum(float(((a.detach() - b.detach()) ** 2).sum())
              for a, b in zip(model.parameters(), frozen.parameters(), strict=True))
  return losses, moved ** 0.5


if __name__ == "__main__":
  CURVES.write_text(json.dumps({method: curve(method) for method in METHODS}, indent=1) + "\n")
