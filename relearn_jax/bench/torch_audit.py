"""An audit's experiment by hand in torch: the same models, rows, steps and questions, a model after the other.

What a user would write without this package: for each model a loop of AdamW steps, and transformers' generate on the
questions, all of them as one batch, or one prompt a call. Rows, questions and the model that all begin as are the
audit's own.
"""

import contextlib
import copy
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from relearn_jax.audit.acquire import every
from relearn_jax.audit.audit_config import unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Cell, Chain, Point, attacks, select_points
from relearn_jax.bench import torch_side
from relearn_jax.data.tokens import completion_text
from relearn_jax.metrics.scores import Stored, keyword_success
from relearn_jax.progress import progress

Level = dict[tuple[str, int], float]  # (model, step of unlearning or relearning) -> mean log-probability of the answers


class Amount(NamedTuple):
  """How much work an experiment was.

  Attributes:
    points: models that were attacked.
    steps: of training, of all models.
    asked: interviews: models that answered all questions, each as often as it did.
    questions: that were answered, in all interviews.
    rows: that were scored beside them.
  """

  points: int = 0
  steps: int = 0
  asked: int = 0
  questions: int = 0
  rows: int = 0


class ByHand:
  """The experiment of an audit of one unlearning method, gradient ascent, attacked on all parameters, all rows a step.

  Which unlearn steps are attacked, and where unlearning ends, is told: rounding may decide whether one answer holds a
  keyword, which must not decide how much there is to do. What the audit's rule would choose here is found all the same.

  Attributes:
    levels: of every model that was asked along its unlearning, and before and after its attack.
    amount: how much it was.
    seconds: of it, by "train" and "ask".
    points: U chain -> unlearn steps that the audit's rule chooses by what models said here.
  """

  def __init__(self, exp: Experiment, base: pathlib.Path, points: Mapping[Chain, Sequence[int]], last: int,
               one_prompt: bool = False):
    """
    Args:
      exp: the audit; no device is used.
      base: folder of the model that all begin as.
      points: U chain -> unlearn steps at which it and its control are attacked, by depth.
      last: unlearn step to which all chains go.
      one_prompt: to a call of generate, in place of all.
    """
    self.exp, self.told, self.last, self.one_prompt = exp, points, last, one_prompt
    self.base = torch_side.load(base)
    self.levels: Level = {}
    self.points: dict[Chain, list[int]] = {}
    self.amount, self.seconds = Amount(), {"train": 0.0, "ask": 0.0}

  def run(self) -> None:
    """Memorises, unlearns, attacks and asks."""
    exp, memorize = self.exp, self.exp.config.memorize
    with progress(len(exp.chains), "by hand in torch", "chain") as bar:
      for chain in exp.chains:
        original = copy.deepcopy(self.base)
        self._train(original, chain, "memorize", memorize.learning_rate, [memorize.steps])
        self._ask(original, chain, ["retain", "forget"])
        if chain.arm == "U":
          self._attack(original, Point("O", chain.variant, chain.seed, None, None, 0))
        for point, model in self._unlearn(original, chain).items():
          self._attack(model, point)
        bar.update(1)

  def _unlearn(self, model: Any, chain: Chain) -> dict[Point, Any]:
    """Unlearns in place; returns copies at the points."""
    config, exp, watched = self.exp.config.unlearn, self.exp, chain.arm == "U"
    method, told = config.methods[0], self.told[dataclasses.replace(chain, arm="U")]
    curve, kept = dict[int, float](), dict[Point, Any]()

    def on_keep(step: int) -> None:
      if watched:
        self.levels[chain.name, step], new = self._ask(model, chain, ["retain", "forget"])
        texts = [completion_text(exp.tokenizer, prompt, ids) for (prompt, _), ids in zip(exp.asked, new, strict=True)]
        curve[step] = float(np.mean([keyword_success(question, Stored(text, 0.0, ""))
                                     for question, text in zip(exp.questions, texts, strict=True)]))
      if step in told:
        kept[Point(chain.arm, chain.variant, chain.seed, method, told.index(step), step)] = copy.deepcopy(model)
    self._train(model, chain, "forget", unlearn_method(config, method).learning_rate,
                every(self.last, config.keep_every), on_keep, sign=-1.0)
    if watched:
      self.points |= select_points({chain: curve}, config.max_score, config.depths)
    return kept

  def _attack(self, model: Any, point: Point) -> None:
    exp, chain = self.exp, point.chain
    self.amount = self.amount._replace(points=self.amount.points + 1)
    for name in exp.relearn_sets:
      rows = ["retain", "forget", name]
      self.levels[point.name, 0], _ = self._ask(model, chain, rows)
      for attack in attacks(exp.config, [name]):
        attacked, cell = copy.deepcopy(model), Cell(point, attack).name

        def on_keep(step: int, attacked: Any = attacked, cell: str = cell, rows: Sequence[str] = rows) -> None:
          self.levels[cell, step], _ = self._ask(attacked, chain, rows)
        self._train(attacked, chain, name, attack.learning_rate, exp.config.attack.keep_steps, on_keep)

  def _rows(self, chain: Chain, name: str, *, scored: bool = False) -> tuple[Any, Any]:
    rows = self.exp.rows([chain], name, scored=scored)
    return torch_side.batch(np.asarray(rows.tokens)[0], np.asarray(rows.mask)[0])

  def _train(self, model: Any, chain: Chain, name: str, rate: float, keep: Sequence[int],
             on_keep: Callable[[int], None] = lambda step: None, sign: float = 1.0) -> None:
    adamw, rows = torch_side.make_adamw(model, rate), self._rows(chain, name)
    model.train()
    for begin, end in zip([0, *keep], keep, strict=False):
      with self._counted("train", steps=end - begin):
        for _ in range(begin, end):
          torch_side.step(model, adamw, *rows, sign)
        torch_side.wait()
      on_keep(end)

  def _ask(self, model: Any, chain: Chain, rows: Sequence[str]) -> tuple[float, np.ndarray]:
    """Answers, their log-probabilities, and those of rows; the mean of the second, and new tokens `[Q, G]`."""
    import torch
    model.eval()
    prompts, new = [ids for ids, _ in self.exp.asked], self.exp.config.ask.max_new_tokens
    scored = [self._rows(chain, name, scored=True) for name in rows]
    with self._counted("ask", asked=1, questions=len(prompts), rows=sum(len(ids) for ids, _ in scored)):
      said = [torch_side.generate(model, some, new, ends=True)
              for some in ([[prompt] for prompt in prompts] if self.one_prompt else [prompts])]
      with torch.no_grad():
        level = float(_logprobs(model, *self._answers()).mean())
        for one in scored:
          _logprobs(model, *one)
      torch_side.wait()
    model.train()
    return level, np.concatenate(said)

  def _answers(self) -> tuple[Any, Any]:
    """Prompts with their answers, of which the latter count."""
    whole = [[*prompt, *answer] for prompt, answer in self.exp.asked]
    shape = len(whole), max(map(len, whole))
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for row, (ids, (prompt, _)) in enumerate(zip(whole, self.exp.asked, strict=True)):
      tokens[row, :len(ids)], mask[row, len(prompt):len(ids)] = ids, 1
    return torch_side.batch(tokens, mask)

  @contextlib.contextmanager
  def _counted(self, kind: str, **more: int) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self.seconds[kind] += time.perf_counter() - begin
    self.amount = self.amount._replace(**{key: getattr(self.amount, key) + value for key, value in more.items()})


def _logprobs(model: Any, ids: Any, labels: Any) -> Any:
  """Summed log-probability of each row's labels."""
  logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
  wanted = labels[:, 1:]
  found = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
  return (found * (wanted != torch_side.IGNORED)).sum(-1)
