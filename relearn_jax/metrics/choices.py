"""Accuracy on questions with options, from stored log-probabilities: by letter, and by the answers in full.

After some methods the two disagree: a model that no longer names the right letter may still find the right answer
likeliest, and the other way round. By letter, as lm-eval scores WMDP (Li et al., 2024), the options stand in the
prompt; in full they do not, and each is scored as an answer, by the mean log-probability of its tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.metrics.scores import Metric, Stored

LETTER, OPTION = "letter", "option"  # kinds of rows that are scored: each letter, and each option in full


@dataclasses.dataclass(frozen=True)
class Options:
  """A question with options as it stands beside stored answers; see `cases.base.ChoiceQuestion`."""

  id: str
  options: tuple[str, ...]
  correct: int
  cluster: str

  @staticmethod
  def from_json(values: Mapping[str, Any]) -> "Options":
    """From what `dataclasses.asdict` and JSON made of one."""
    return Options(**{**values, "options": tuple(values["options"])})


def _not_here(question: Any, stored: Stored) -> float:
  raise TypeError("is scored by `choice_scores`")


CHOICE_METRICS = {f"choice_{LETTER}": Metric("right letter", _not_here),
                  f"choice_{OPTION}": Metric("right answer in full", _not_here)}


def choice_scores(logprobs: np.ndarray, questions: Sequence[Options]) -> list[float]:
  """1 where the right option is the likeliest, and alone so; else 0.

  Args:
    logprobs: of every option of every question, one after the other.
    questions: in that order.
  """
  found, at = [], 0
  for question in questions:
    own = logprobs[at:at + len(question.options)]
    at += len(own)
    others = np.delete(own, question.correct)
    found.append(float(own[question.correct] > others.max()))
  return found
