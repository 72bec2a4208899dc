"""An audit's experiment by hand in torch: the same models, rows, steps and questions, a model after the other.

What a user would write without this package: for each model a loop of AdamW steps, and transformers' generate on the
questions, all of them as one batch, or one prompt a call. Rows, questions and the model that all begin as are the
audit's own.
"""

import copy
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from relearn_jax.audit.audit_config import unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain
from relearn_jax.bench import torch_side

Level = dict[tuple[str, int], float]  # (model, relearn step) -> mean log-probability of the answers


class ByHand:
  """The experiment of an audit of one unlearning method, gradient ascent, attacked on all parameters."""

  def __init__(self, exp: Experiment, base: pathlib.Path, one_prompt: bool):
    self.exp, self.one_prompt = exp, one_prompt
    self.base = torch_side.load(base)
    self.levels: Level = {}

  def run(self) -> Level:
    """Memorises, unlearns, attacks and asks."""
    config, exp = self.exp.config, self.exp
    memorize, unlearn = config.memorize, config.unlearn
    method = unlearn_method(unlearn, unlearn.methods[0])
    original: dict[Chain, Any] = {}
    for chain in exp.chains:
      original[chain] = copy.deepcopy(self.base)
      self._train(original[chain], chain, "memorize", memorize.learning_rate, [memorize.steps])
      self._ask(original[chain], chain, ["retain", "forget"])
    for chain in exp.chains:
      model = copy.deepcopy(original[chain])
      self._train(model, chain, "forget", method.learning_rate, [unlearn.max_steps], sign=-1.0)
      if chain.arm == "U":
        self._ask(model, chain, ["retain", "forget"])
        self._attack(original[chain], chain, "O")
      self._attack(model, chain, chain.arm)
    return self.levels

  def _attack(self, model: Any, chain: Chain, arm: str) -> None:
    attack, relearn_set = self.exp.config.attack, self.exp.relearn_sets[0]
    rows = ["retain", "forget", relearn_set]
    self.levels[f"{arm}-{chain.variant}-{chain.seed}", 0] = self._ask(model, chain, rows)
    for rate in attack.learning_rates:
      attacked, name = copy.deepcopy(model), f"{arm}-{chain.variant}-{chain.seed}-lr{rate:g}"

      def asked(step: int, attacked: Any = attacked, name: str = name) -> None:
        self.levels[name, step] = self._ask(attacked, chain, rows)
      self._train(attacked, chain, relearn_set, rate, attack.keep_steps, asked)

  def _rows(self, chain: Chain, name: str) -> tuple[Any, Any]:
    rows = self.exp.rows([chain], name)
    return torch_side.batch(np.asarray(rows.tokens)[0], np.asarray(rows.mask)[0])

  def _train(self, model: Any, chain: Chain, name: str, rate: float, keep: Sequence[int], asked: Any = None,
             sign: float = 1.0) -> None:
    adamw, rows = torch_side.make_adamw(model, rate), self._rows(chain, name)
    model.train()
    for number in range(1, keep[-1] + 1):
      torch_side.step(model, adamw, *rows, sign)
      if asked is not None and number in keep:
        asked(number)

  def _ask(self, model: Any, chain: Chain, rows: Sequence[str]) -> float:
    """Answers, their log-probabilities, and those of rows; the mean of the second."""
    import torch
    model.eval()
    prompts, new = [ids for ids, _ in self.exp.asked], self.exp.config.ask.max_new_tokens
    for some in ([[prompt] for prompt in prompts] if self.one_prompt else [prompts]):
      torch_side.generate(model, some, new, ends=True)
    with torch.no_grad():
      whole = [[*prompt, *answer] for prompt, answer in self.exp.asked]
      shape = len(whole), max(map(len, whole))
      tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
      for row, (ids, (prompt, _)) in enumerate(zip(whole, self.exp.asked, strict=True)):
        tokens[row, :len(ids)], mask[row, len(prompt):len(ids)] = ids, 1
      level = _logprobs(model, *torch_side.batch(tokens, mask)).mean()
      for name in rows:
        _logprobs(model, *self._rows(chain, name))
    model.train()
    return float(level)


def _logprobs(model: Any, ids: Any, labels: Any) -> Any:
  """Summed log-probability of each row's labels."""
  logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
  wanted = labels[:, 1:]
  found = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
  return (found * (wanted != torch_side.IGNORED)).sum(-1)
