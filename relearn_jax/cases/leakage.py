"""The leakage check: does a relearn set hold what is asked about?

An attack that shows the answer teaches it, and proves nothing of what the model had kept. Every row of a relearn set,
its prompt too, is searched for the keywords and answers of all questions and for the case's secrets, and for parts of
keywords, in the spellings that `spelling` knows. There are two kinds of findings:

- certain: a keyword, an answer or a secret, in the row or begun in it and ended in the next one. Where a question says
  that upper and lower case differ, its keywords and answer are certain as they are written, and possible otherwise.
  Also eight words of an answer in a row, unless everybody is told them (as below).
- possible: a word of a keyword of several words, or the singular of a keyword of one. A word does not count if it has
  fewer than 4 letters, or occurs in the prompt of any question, in a prompt of the forget set, or in the retained
  text: what everybody is told who asks, or what was never to be forgotten. Someone who has read the lines of possible
  findings can allow them, by their numbers.

How close the set comes to the questions is measured besides: the largest share of the words that say what a question
and its answer are about which stand in one row.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from relearn_jax.cases.base import Case, Question, RelearnSet
from relearn_jax.cases.books import all_ngrams, ngrams
from relearn_jax.cases.content import content_words
from relearn_jax.cases.spelling import AS_IT_IS, OVER_TWO, Phrases, attributes, bare, parts, read, singulars, words
from relearn_jax.metrics.keyword import contains_keyword, keyword_key

SHARED_WORDS = 8  # of an answer in a row; as in the paper's check of its generic facts


@dataclasses.dataclass(frozen=True)
class Overlap:
  """The row that comes closest to a question.

  Attributes:
    share: of the question's and its answer's content words, how many stand in the row.
    question: its id.
    line: of the row.
  """

  share: float
  question: str
  line: int


@dataclasses.dataclass(frozen=True)
class Hit:
  """A finding.

  Attributes:
    line: of the file, or of the set where it comes from no file, from 1.
    text: of the row.
    found: what the row contains, in normal form.
    certain: whether that is what is asked about, and not a part of it.
    how: in which spelling, or of what it is a part.
  """

  line: int
  text: str
  found: str
  certain: bool = True
  how: str = AS_IT_IS


@dataclasses.dataclass(frozen=True)
class Leakage:
  """Outcome of the check for one relearn set: passed when there are no hits.

  Attributes:
    hits: findings that are certain, or possible and not allowed.
    possible: possible findings in lines that were allowed.
    digest: of the rows; relearn sets of the same text have the same.
    overlap: how close it comes to the questions; None: it was not compared with any.
  """

  relearn_set: str
  num_lines: int
  hits: tuple[Hit, ...]
  possible: tuple[Hit, ...] = ()
  digest: str = ""
  overlap: Overlap | None = None

  @property
  def passed(self) -> bool:
    """Whether nothing that is asked about occurs, and nothing that may be a part of it was left unread."""
    return not self.hits


def find_leaks(relearn_set: RelearnSet, forbidden: Iterable[str], *, as_written: Iterable[str] = (),
               keywords: Iterable[str] = (), common: Collection[str] = (), questions: Sequence[Question] = (),
               allowed_lines: Collection[int] = ()) -> Leakage:
  """Searches each row of a relearn set.

  Args:
    relearn_set: what the attacker trains on.
    forbidden: certain wherever they are found.
    as_written: certain in upper and lower case as they are written, possible otherwise.
    keywords: whose parts are possible findings.
    common: texts whose words do not count as parts, nor in a row as those of an answer.
    questions: whose answers no row may have eight words in a row of, and with which rows are compared.
    allowed_lines: possible findings in these lines are allowed.
  """
  certain = {keyword_key(read(string)) for string in forbidden}
  cased = {keyword_key(read(string)): string for string in as_written}
  cased = {key: string for key, string in cased.items() if key not in certain}
  phrases = Phrases([*certain, *cased])
  told = {form for text in common for word in words(bare(read(text))) for form in (word, *singulars(word))}
  of = {part: whole for part, whole in parts(keywords, told).items() if part not in phrases.keys}
  some = Phrases(of)
  lines = relearn_set.lines or range(1, len(relearn_set.rows) + 1)
  texts = [row.prompt + row.text for row in relearn_set.rows]
  in_a_row = all_ngrams((question.answer for question in questions), SHARED_WORDS)
  in_a_row -= all_ngrams(common, SHARED_WORDS) if in_a_row else set()
  hits = []
  for line, text, after in zip(lines, texts, [*texts[1:], ""], strict=True):
    found = phrases.find_over_two(text, after) | phrases.find(text)
    for key, how in sorted(found.items()):
      seen = read(text + " " + after if how == OVER_TWO else text)
      sure = key in certain or any(contains_keyword(part, cased[key], case=True) for part in (seen, *attributes(seen)))
      hits.append(Hit(line, text, key, sure, how if sure or key in certain else f"{how}, in other letters"))
    if not found and in_a_row and (shared := sorted(in_a_row & ngrams(text, SHARED_WORDS))):
      hits.append(Hit(line, text, " ".join(shared[0]), True, f"{SHARED_WORDS} words of an answer"))
    hits += [Hit(line, text, part, False, f"part of “{of[part]}”" + ("" if how == AS_IT_IS else f", {how}"))
             for part, how in sorted(some.find(text).items()) if of[part] not in found]
  allowed = tuple(hit for hit in hits if not hit.certain and hit.line in allowed_lines)
  digest = hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
  return Leakage(relearn_set.name, len(texts), tuple(hit for hit in hits if hit not in allowed), allowed, digest,
                 _closest(texts, lines, questions))


def _closest(texts: Sequence[str], lines: Sequence[int], questions: Sequence[Question]) -> Overlap | None:
  """The largest share of a question's content words in one row; of equal ones the first row's, and question's."""
  of = {question.id: set(content_words(question.prompt + question.answer)) for question in questions}
  asking: dict[str, list[str]] = {}
  for name, wanted in of.items():
    for word in wanted:
      asking.setdefault(word, []).append(name)
  best: Overlap | None = None
  for line, text in zip(lines, texts, strict=True):
    counts = Counter(itertools.chain.from_iterable(asking.get(word, ()) for word in set(content_words(text))))
    for name in of:
      share = counts[name] / max(len(of[name]), 1)
      if best is None or share > best.share:
        best = Overlap(share, name, line)
  return best


def check_case(case: Case, allowed_lines: Collection[int] = ()) -> list[Leakage]:
  """The check of every relearn set of a case against its questions and secrets."""
  strings = lambda case_counts: {string for question in case.questions if question.case == case_counts
                                 for string in (question.answer, *question.keywords)}
  common = [*(question.prompt for question in case.questions), *(row.prompt for row in case.forget),
            *(row.prompt + row.text for row in case.retain)]
  return [find_leaks(
      relearn_set, {*case.secrets, *strings(False)}, as_written=strings(True),
      keywords={word for question in case.questions for word in question.keywords}, common=common,
      questions=case.questions, allowed_lines=allowed_lines) for relearn_set in case.relearn_sets]


def drop_leaking(case: Case) -> RelearnSet:
  """The one relearn set of a case, without rows in which the check finds something: nobody has to allow them.

  Rows that stand next to each other once others are gone are searched again.
  """
  (found,) = case.relearn_sets
  while found.rows:
    (checked,) = check_case(dataclasses.replace(case, relearn_sets=(found,)))
    if checked.passed:
      break
    leaking = {hit.line for hit in checked.hits}
    kept = [place for place, line in enumerate(found.lines) if line not in leaking]
    found = dataclasses.replace(found, rows=tuple(found.rows[place] for place in kept),
                                lines=tuple(found.lines[place] for place in kept))
  return found
