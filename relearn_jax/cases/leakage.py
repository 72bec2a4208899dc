"""The leakage check: does a relearn set hold what is asked about?

An attack that shows the answer teaches it, and proves nothing of what the model had kept. A relearn
set is refused when any of its lines contains, as whole words, a keyword or an answer of a question,
or one of the case's secrets.
"""

import dataclasses
from collections.abc import Iterable

from relearn_jax.cases.base import Case, RelearnSet
from relearn_jax.metrics.keyword import contains_keyword


@dataclasses.dataclass(frozen=True)
class Hit:
  """Line `line` (from 1) of a relearn set, `text`, contains `found`."""

  line: int
  text: str
  found: str


@dataclasses.dataclass(frozen=True)
class Leakage:
  """Outcome of the check for one relearn set: passed when there are no hits."""

  relearn_set: str
  num_lines: int
  hits: tuple[Hit, ...]

  @property
  def passed(self) -> bool:
    """Whether nothing that is asked about occurs."""
    return not self.hits


def find_leaks(relearn_set: RelearnSet, forbidden: Iterable[str]) -> Leakage:
  """Checks each line of a relearn set for each forbidden string, regardless of case."""
  strings = sorted({s.casefold().strip() for s in forbidden} - {""})
  hits = tuple(
      Hit(number, row.text, string)
      for number, row in enumerate(relearn_set.rows, 1) for string in strings
      if contains_keyword(row.text.casefold(), string))
  return Leakage(relearn_set.name, len(relearn_set.rows), hits)


def check_case(case: Case) -> list[Leakage]:
  """The check of every relearn set of a case against its questions and secrets."""
  forbidden = set(case.secrets)
  for question in case.questions:
    forbidden |= {question.answer, *question.keywords}
  return [find_leaks(relearn_set, forbidden) for relearn_set in case.relearn_sets]
