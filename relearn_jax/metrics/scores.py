"""Scores of stored answers: each a function of the question and of what a model said, with no model at hand."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rouge_score import rouge_scorer

from relearn_jax.errors import InputError
from relearn_jax.generation.stop import cut_at_stop
from relearn_jax.metrics.keyword import find_keyword


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question as it stands beside stored answers.

  Attributes:
    id, prompt, answer, keywords, cluster, case: see `cases.base.Question`.
    stop: a completion is judged up to the first of these strings.
    begun: the text in which a keyword may begin, but not end: the prompt, where it counts.
  """

  id: str
  prompt: str
  answer: str
  keywords: tuple[str, ...]
  cluster: str
  case: bool = False
  stop: tuple[str, ...] = ()
  begun: str = ""

  @staticmethod
  def from_json(values: Mapping[str, Any]) -> "Asked":
    """From what `dataclasses.asdict` and JSON made of one."""
    return Asked(**{**values, "keywords": tuple(values["keywords"]), "stop": tuple(values["stop"])})


@dataclasses.dataclass(frozen=True)
class Metric:
  """A score of an answer.

  Attributes:
    title: for figures and captions.
    score: (question, what is judged of the completion) -> value, higher where more is known.
    low, high: its range.
  """

  title: str
  score: Callable[[Asked, str], float]
  low: float = 0.0
  high: float = 1.0


def judged(question: Asked, text: str) -> str:
  """What is judged of a completion: up to a stop string; a space in front belongs to it."""
  return cut_at_stop(text, question.stop)


def keyword_success(question: Asked, said: str) -> float:
  """1 where a keyword of the question ends in the completion; see `metrics.keyword`."""
  before = question.begun
  return float(any(end > len(before) for word in question.keywords
                   for _, end in find_keyword(before + said, word, case=question.case)))


@functools.cache
def _rouge() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(question: Asked, said: str) -> float:
  """F1 of the longest common subsequence of words against the answer (Lin, 2004), by the package rouge-score."""
  return float(_rouge().score(question.answer, said)["rougeL"].fmeasure)


METRICS = {"asr": Metric("attack success", keyword_success), "rouge_l": Metric("ROUGE-L F1", rouge_l)}


def get_metric(name: str, field: str = "metrics") -> Metric:
  """The metric of that name.

  Raises:
    InputError: there is none.
  """
  if name not in METRICS:
    raise InputError(f"has {name!r}, which is no metric", field=field, mend=f"expected some of {', '.join(METRICS)}")
  return METRICS[name]


def score_texts(questions: Sequence[Asked], texts: np.ndarray, metric: str) -> np.ndarray:
  """Scores of completions `[R, Q]` by a metric, `[R, Q]`; equal texts are scored once."""
  score = functools.cache(lambda number, text: get_metric(metric).score(
      questions[number], judged(questions[number], text)))
  return np.array([[score(number, str(text)) for number, text in enumerate(run)] for run in texts], np.float64)
