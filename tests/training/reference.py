"""Unlearning in torch, written from the formulas and from nothing of ours; writes what test_step.py compares with.

Needs torch and transformers (`pip install -e '.[parity]'`); run from the repository root:

  python -m tests.training.reference

It writes `curves.json`: the losses before each of 6 AdamW steps on a golden checkpoint, and the norm
of the change of all weights after them, for each method.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
CHECKPOINT = HERE.parent / "models" / "golden" / "multi_head_tied"
CURVES = HERE / "curves.json"
STEPS = 6
COMMON = {"learning_rate": 2e-3, "weight_decay": 0.1}
HYPER = COMMON | {"retain_weight": 0.7, "beta": 0.2}
REINFORCE = {"steps": 3, "learning_rate": 1e-2, "weight_decay": 0.0}  # the second model of whp
FIRST_ID, VOCAB, WIDTH = 4, 96, 16


def rows() -> dict[str, Any]:
  """Tokens and counts of the data sets: rows of several lengths, a prompt that does not count; some have labels."""
  rng, made = np.random.default_rng(3), {}
  for name, lengths in (("forget", (14, 9, 7)), ("retain", (11, 16))):
    made[name] = random_rows(rng, lengths)
  for name, seed, lengths in (("idk", 4, (8, 12, 10)), ("alternate", 5, (15, 6, 9))):
    made[name] = random_rows(np.random.default_rng(seed), lengths, prompts=made["forget"][0])
  return made | {"relabelled": relabel(np.random.default_rng(6), *made["forget"])}


def random_rows(rng: np.random.Generator, lengths: Sequence[int], prompts: np.ndarray | None = None
                ) -> tuple[np.ndarray, np.ndarray]:
  """Rows of random tokens; row i has a prompt of 1 + 2i tokens that do not count, those of `prompts` where given."""
  tokens, mask = np.zeros((len(lengths), WIDTH), np.int32), np.zeros((len(lengths), WIDTH), np.float32)
  for i, length in enumerate(lengths):
    tokens[i, :length] = rng.integers(FIRST_ID, VOCAB, length)
    mask[i, 1 + 2 * i:length] = 1
    if prompts is not None:
      tokens[i, :1 + 2 * i] = prompts[i, :1 + 2 * i]
  return tokens, mask


def relabel(rng: np.random.Generator, tokens: np.ndarray, mask: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The same tokens with two places fewer that count, and labels that differ from them at four that do."""
  places, mask, labels = np.argwhere(mask), mask.copy(), tokens.copy()
  chosen = [tuple(place) for place in rng.permutation(places)[:6]]
  for place in chosen[:2]:
    mask[place] = 0
  for place in chosen[2:]:
    ids = VOCAB - FIRST_ID
    labels[place] = FIRST_ID + (tokens[place] - FIRST_ID + rng.integers(1, ids)) % ids
  return tokens, mask, labels


def load(dtype: str = "float32", **options: Any) -> Any:
  from transformers import LlamaForCausalLM
  return LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, **options)


def make_adamw(model: Any, learning_rate: float, weight_decay: float) -> Any:
  import torch
  return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8,
                           weight_decay=weight_decay)


def descend(model: Any, adamw: Any, loss: Any) -> None:
  """One step on all weights; those that the loss does not touch have a gradient of zero, so they only decay."""
  import torch
  params = list(model.parameters())
  for param, grad in zip(params, torch.autograd.grad(loss, params, materialize_grads=True), strict=True):
    param.grad = grad
  adamw.step()


def softplus(x: Any) -> Any:
  import torch
  return -torch.nn.functional.logsigmoid(-x)


class Run:
  """The model in training, its frozen start, the data, and the quantities that losses are made of.

  Place t-1 of everything by token is about token t, so all of it is one shorter than the rows.
  """

  def __init__(self, method: str, **options: Any):
    import torch
    self.model, self.frozen = load(**options), load(**options).requires_grad_(False)
    for param in self.frozen.parameters():
      param.mul_(REFERENCE_SCALE.get(method, 1.0))
    self.data = {name: tuple(torch.tensor(array) for array in arrays) for name, arrays in rows().items()}
    self.hyper, self.step = hyper(method), 0
    self.lam, self.labels = self.hyper.get("dual"), None  # what pdu and whp keep between steps

  def params(self) -> dict[str, Any]:
    return dict(self.model.named_parameters())

  def logits(self, name: str, model: Any = None, params: dict[str, Any] | None = None) -> Any:
    """Logits of a data set by the model in training, by another one, or with other weights."""
    import torch
    tokens, model = self.tokens(name), model or self.model
    inputs = {"attention_mask": (tokens != 0).long()}
    return torch.func.functional_call(model, params or {}, (tokens,), inputs).logits[:, :-1]

  def hidden(self, name: str, model: Any) -> Any:
    """What the first half of the layers gives at every token, at the token's own place."""
    layers, caught = model.model.layers, []
    middle = layers[max(1, round(0.5 * len(layers))) - 1]
    hook = middle.register_forward_hook(lambda _, inputs, output: caught.append(output))
    self.logits(name, model)
    hook.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]

  def tokens(self, name: str) -> Any:
    return self.data[name][0].long()

  def counts(self, name: str) -> Any:
    return self.data[name][1][:, 1:]

  def mean(self, name: str, values: Any) -> Any:
    """Mean over all tokens of a data set that count."""
    return (values * self.counts(name)).sum() / self.counts(name).sum()

  def logp(self, name: str, model: Any = None, params: dict[str, Any] | None = None, labels: Any = None) -> Any:
    """Log-probabilities of the tokens, or of other labels at their places."""
    labels = self.tokens(name)[:, 1:] if labels is None else labels
    return self.logits(name, model, params).log_softmax(-1).gather(-1, labels[..., None])[..., 0]

  def nll(self, name: str, **other: Any) -> Any:
    return self.mean(name, -self.logp(name, **other))

  def row_gain(self, name: str, params: dict[str, Any] | None = None) -> Any:
    """By how much each row's summed log-probability is above that of the frozen start."""
    counts = self.counts(name)
    return (self.logp(name, params=params) * counts).sum(-1) - (self.logp(name, self.frozen) * counts).sum(-1)

  def kl(self, name: str, temperature: float = 1.0) -> Any:
    """Token mean of the divergence of the model from the frozen start."""
    ours = (self.logits(name) / temperature).log_softmax(-1)
    start = (self.logits(name, self.frozen) / temperature).log_softmax(-1)
    return temperature ** 2 * self.mean(name, (start.exp() * (start - ours)).sum(-1))

  def npo(self, params: dict[str, Any] | None = None) -> Any:
    beta = self.hyper["beta"]
    return 2 / beta * softplus(beta * self.row_gain("forget", params)).mean()

  def retain(self) -> Any:
    return self.hyper["retain_weight"] * self.nll("retain")


def simnpo(run: Run) -> Any:
  h, counts = run.hyper, run.counts("forget")
  row_nll = -(run.logp("forget") * counts).sum(-1) / counts.sum(-1)
  return h["forget_weight"] * 2 / h["beta"] * softplus(-h["beta"] * (row_nll - h["delta"])).mean() + run.retain()


def idk_nll(run: Run) -> Any:
  names = "idk", "retain"
  return (sum(-(run.logp(name) * run.counts(name)).sum() for name in names)
          / sum(run.counts(name).sum() for name in names))


def prefer(run: Run, better: str) -> Any:
  beta = run.hyper["beta"]
  return 2 / beta * softplus(-beta * (run.row_gain(better) - run.row_gain("forget"))).mean() + run.retain()


def cross_entropy(logits: Any, target: Any) -> Any:
  return -(target * logits.log_softmax(-1)).sum(-1)


def undial(run: Run) -> Any:
  start = run.logits("forget", run.frozen)
  places = run.tokens("forget")[:, 1:, None]
  lowered = start.scatter(-1, places, start.gather(-1, places) - run.hyper["beta"])
  return run.mean("forget", cross_entropy(run.logits("forget"), lowered.softmax(-1))) + run.retain()


def wga(run: Run) -> Any:
  logp = run.logp("forget")
  return -run.mean("forget", logp.detach().exp() ** run.hyper["beta"] * -logp) + run.retain()


def satimp(run: Run) -> Any:
  logp, h = run.logp("forget"), run.hyper
  p = logp.detach().exp()
  weight = p ** h["beta1"] * (1 - p) ** h["beta2"]
  return -h["forget_weight"] * run.mean("forget", weight * -logp) + run.retain()


def ceu(run: Run) -> Any:
  """Towards the model's own guess without the true token, from each row's second token that counts."""
  logits, counts = run.logits("forget"), run.counts("forget")
  without = logits.detach().scatter(-1, run.tokens("forget")[:, 1:, None], float("-inf"))
  later = counts * (counts.cumsum(-1) > 1)
  return (cross_entropy(logits, without.softmax(-1)) * later).sum() / later.sum()


def pdu(run: Run) -> Any:
  """Flat logits under the constraint NLL(retain) <= epsilon, whose multiplier grows with the step."""
  logits, h = run.logits("forget"), run.hyper
  excess, lam = run.nll("retain") - h["epsilon"], run.lam
  if run.step >= h["dual_warmup"]:
    run.lam = max(0.0, lam + h["dual_rate"] * excess.item())
  return run.mean("forget", (logits.amax(-1) - logits.mean(-1)) ** 2) + lam * excess


def scrub(run: Run) -> Any:
  h = run.hyper
  epoch = run.step // h["period"]
  if epoch % 2 == 0 and epoch < 2 * h["max_phases"]:
    return -run.kl("forget", h["temperature"])
  return h["kl_weight"] * run.kl("retain", h["temperature"]) + run.retain()


def rmu(run: Run) -> Any:
  """Token t counts here at its own place t."""
  import jax
  import torch

  def far(name: str, target: Any) -> Any:
    mask = run.data[name][1]
    return (((run.hidden(name, run.model) - target) ** 2).mean(-1) * mask).sum() / mask.sum()

  direction = np.array(jax.random.uniform(jax.random.key(0), (run.model.config.hidden_size,), "float32"))
  steered = torch.tensor(run.hyper["steering"] * direction / np.linalg.norm(direction))
  return far("forget", steered) + run.hyper["retain_weight"] * far("retain", run.hidden("retain", run.frozen))


def whp_logits(run: Run) -> Any:
  """Labels: the likeliest token once what a reinforced model raises is lowered."""
  if run.step == 0:
    reinforced = load()
    adamw = make_adamw(reinforced, REINFORCE["learning_rate"], REINFORCE["weight_decay"])
    for _ in range(int(REINFORCE["steps"])):
      descend(reinforced, adamw, run.nll("forget", model=reinforced))
    start, raised = run.logits("forget", run.frozen), run.logits("forget", reinforced).detach()
    run.labels = (start - run.hyper["alpha"] * (raised - start).relu()).argmax(-1)
  return run.nll("forget", labels=run.labels)


def sam_npo_gd(run: Run) -> Any:
  import torch
  params = run.params()
  grads = torch.autograd.grad(run.npo(), list(params.values()))
  scale = run.hyper["rho"] / sum((grad ** 2).sum() for grad in grads) ** 0.5
  moved = {name: param + scale * grad for (name, param), grad in zip(params.items(), grads, strict=True)}
  return run.npo(moved) + run.retain()


def gp_npo_gd(run: Run) -> Any:
  import torch
  npo = run.npo()
  grads = torch.autograd.grad(npo, list(run.params().values()), create_graph=True)
  return npo + run.hyper["penalty"] * sum((grad ** 2).sum() for grad in grads) + run.retain()


NPO_GD = {"beta": 0.2, "retain_weight": 0.7}
TABLE: dict[str, tuple[Callable[[Run], Any], dict[str, float]]] = {
  "nll": (lambda run: run.nll("forget"), {}),
  "ga": (lambda run: -run.nll("forget"), {}),
  "gd": (lambda run: -run.nll("forget") + run.retain(), {"retain_weight": 0.7}),
  "kl": (lambda run: -run.nll("forget") + run.hyper["retain_weight"] * run.kl("retain"), {"retain_weight": 0.7}),
  "npo": (lambda run: run.npo(), {"beta": 0.2}),
  "npo_gd": (lambda run: run.npo() + run.retain(), NPO_GD),
  "npo_kl": (lambda run: run.npo() + run.hyper["retain_weight"] * run.kl("retain"), NPO_GD),
  "simnpo": (simnpo, {"beta": 0.5, "delta": 6.0, "forget_weight": 0.5, "retain_weight": 0.7}),
  "idk_nll": (idk_nll, {}),
  "idk_dpo": (lambda run: prefer(run, "idk"), NPO_GD),
  "altpo": (lambda run: prefer(run, "alternate"), NPO_GD),
  "undial": (undial, {"beta": 3.0, "retain_weight": 0.7}),
  "wga": (wga, {"beta": 0.5, "retain_weight": 0.7}),
  "satimp": (satimp, {"beta1": 0.5, "beta2": 1.0, "forget_weight": 0.3, "retain_weight": 0.7}),
  "ceu": (ceu, {}),
  "pdu": (pdu, {"dual": 2.0, "epsilon": 0.3, "dual_rate": 0.5, "dual_warmup": 2.0}),
  "scrub": (scrub, {"period": 1.0, "max_phases": 2.0, "temperature": 4.0, "kl_weight": 0.5, "retain_weight": 0.7}),
  "rmu": (rmu, {"steering": 2.0, "retain_weight": 0.7}),
  "whp_relabel": (lambda run: run.nll("relabelled", labels=run.data["relabelled"][2].long()[:, 1:]), {}),
  "whp_logits": (whp_logits, {"alpha": 5.0}),
  "task_vector": (lambda run: run.nll("forget"), {"alpha": 1.5}),
  "sam_npo_gd": (sam_npo_gd, NPO_GD | {"rho": 0.05}),
  "gp_npo_gd": (gp_npo_gd, NPO_GD | {"penalty": 0.01}),
  "wa_npo_gd": (lambda run: run.npo() + run.retain(), NPO_GD | {"average_from": 2.0, "average_every": 2.0}),
}
METHODS = tuple(TABLE)
# The frozen model's weights are so many times those of the start, where a method's first gradient would be 0 otherwise:
# AdamW makes whole steps of the rounding of that.
REFERENCE_SCALE = {"scrub": 1.05}
LOADING = {
  "gp_npo_gd": {"attn_implementation": "eager"},  # differentiated twice
}


def hyper(method: str) -> dict[str, float]:
  return COMMON | TABLE[method][1]


def read_out(method: str, weights: list[list[Any]]) -> list[Any]:
  """The weights that a method hands over, of those before the first step and after each."""
  h = hyper(method)
  if method == "task_vector":
    return [start - h["alpha"] * (last - start) for start, last in zip(weights[0], weights[-1], strict=True)]
  if method == "wa_npo_gd":
    averaged = weights[int(h["average_from"])::int(h["average_every"])]
    return [sum(leaves) / len(averaged) for leaves in zip(*averaged, strict=True)]
  return weights[-1]


def curve(method: str) -> tuple[list[float], float]:
  """Losses before each step, and the norm of the change of the weights."""
  run = Run(method, **LOADING.get(method, {}))
  adamw = make_adamw(run.model, run.hyper["learning_rate"], run.hyper["weight_decay"])
  snapshot = lambda: [param.detach().clone() for param in run.model.parameters()]
  losses, weights = [], [snapshot()]
  for run.step in range(STEPS):
    loss = TABLE[method][0](run)
    descend(run.model, adamw, loss)
    losses.append(loss.item())
    weights.append(snapshot())
  moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(read_out(method, weights), weights[0], strict=True))
  return losses, moved ** 0.5


if __name__ == "__main__":
  CURVES.write_text(json.dumps({method: curve(method) for method in METHODS}, indent=1) + "\n")
