"""Scores that a judge gave: their names, their range, and how they are shown. They stand among the rows of results.

A rating cannot be computed from an answer, so it is no `Metric` with a score of its own; a missing one is NaN.
"""

import dataclasses

from relearn_jax.errors import InputError
from relearn_jax.metrics.choices import CHOICE_METRICS
from relearn_jax.metrics.scores import METRICS, Asked, Metric, Stored

PREFIX = "judge:"


@dataclasses.dataclass(frozen=True)
class Scale:
  """How a judge's scores, which lie between 0 and 1, are shown.

  Attributes:
    low, high: what 0 and 1 stand for.
    decimals: that are shown.
  """

  low: float
  high: float
  decimals: int

  def shown(self, value: float) -> float:
    """A score as the judge would say it.

    >>> Scale(1, 10, 1).shown(0.5)
    5.5
    """
    return self.low + value * (self.high - self.low)


def is_rating(metric: str) -> bool:
  """Whether a metric of the results is a judge's."""
  return metric.startswith(PREFIX)


def _not_here(question: Asked, stored: Stored) -> float:
  raise InputError("is a judge's, and cannot be computed from answers", field="metric", mend="run `relearn judge`")


RATED = Metric("judge's rating", _not_here)


def find_metric(name: str) -> Metric | None:
  """The metric of that name, a judge's or one of options too; None where values of the name have no range."""
  return (METRICS | CHOICE_METRICS).get(name, RATED if is_rating(name) else None)
