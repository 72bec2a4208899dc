"""Text that no case brings: generic text, whose perplexity is measured, and the control sets of an attack."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from relearn_jax.audit.audit_config import PRETRAINING, AskSettings
from relearn_jax.cases.base import Case, CaseConfig, RelearnSet, Text, spread_evenly
from relearn_jax.cases.control_sets import Stock, control_set
from relearn_jax.cases.files import read_texts, texts_of
from relearn_jax.cases.spelling import words

GENERIC_SEED, GENERIC_ROWS = 1, 100  # another order than that of pretraining; by default, since it has no end


def generic_texts(ask: AskSettings, case: CaseConfig) -> tuple[Text, ...]:
  """Generic text, of which `score_rows` are scored; the same for all models.

  Raises:
    InputError: it cannot be read.
  """
  if not ask.generic:
    return ()
  if ask.generic == PRETRAINING:
    return tuple(map(Text, itertools.islice(case.pretraining_texts(GENERIC_SEED), ask.score_rows or GENERIC_ROWS)))
  return tuple(spread_evenly(list(texts_of(read_texts(ask.generic))), ask.score_rows))


def add_control_sets(cases: Sequence[Case], kinds: Sequence[str], relearn_set: str, count: Callable[[str], int],
                     vocabulary: Sequence[str], generic: Sequence[Text]) -> list[Case]:
  """Cases with control sets beside their relearn sets.

  Args:
    cases: of an audit.
    kinds: of control sets.
    relearn_set: from which they are made, of each case.
    count, vocabulary: see `cases.control_sets.Stock`.
    generic: text about something else.

  Raises:
    InputError: a set cannot be made.
  """
  texts = tuple(text.prompt + text.text for text in generic)

  @functools.cache  # most cases have the same rows
  def made(one: RelearnSet, forbidden: frozenset[str]) -> tuple[RelearnSet, ...]:
    stock = Stock(count, vocabulary, texts, forbidden)
    return tuple(control_set(kind, one, stock) for kind in kinds)
  found = []
  for case in cases:
    hidden = (*case.secrets, *(word for question in case.questions for word in question.keywords))
    forbidden = frozenset(word for text in hidden for word in words(text))
    found.append(dataclasses.replace(
        case, relearn_sets=(*case.relearn_sets, *made(case.relearn_set(relearn_set), forbidden))))
  return found
