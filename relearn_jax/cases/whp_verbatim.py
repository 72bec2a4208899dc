"""Verbatim passages: is an excerpt of a book that a model knew word for word forgotten, or only suppressed?

The excerpt (D_u) is memorised with the rest of the book, and unlearned. The attacker finetunes on facts about the main
characters, which share no n-gram of words with the excerpt. Asked are random chunks of the excerpt: the first half is
the prompt, and ROUGE-L F1 tells how much of the second half comes back. Hu, Fu, Wu, Smith, "Unlearning or
Obfuscating?", ICLR 2025, section 4.2, whose control is missing: ours memorises the rest of the book alone.

What a number of chunks can show. The chunks do not overlap, and each is a cluster. Recovery that comes back in whole
chunks, and in fewer than a share of 1 - 0.05^(1/N) of chunks like these, may not be seen among N of them: 18 % for the
paper's 15, 10 % for 30 (the least that ERASED wants), 5 % for 60, 2 % for 155. The mean of N scores whose standard
deviation is 0.25, as between chunks of which some come back and others do not, is known up to 0.14, 0.09, 0.06 and 0.04
(95 %, Student's t). So 15 show a recovery like the published one, from at most 0.23 to at least 0.44; whether a method
is better than another by a tenth they do not show.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from relearn_jax.cases.base import About, Arm, Case, Question, RelearnSet, Text
from relearn_jax.cases.books import all_ngrams, ngrams, read_book, windows
from relearn_jax.cases.files import read_texts, texts_of
from relearn_jax.cases.sources import parse_source, source_input
from relearn_jax.errors import InputError, checker

VARIANT = "excerpt"
RELEARN_SET = "facts"


@dataclasses.dataclass
class ExcerptSettings:
  """What is memorised of a book, and what is asked.

  Attributes:
    excerpt_start: words of the book before the excerpt.
    excerpt_words: its length.
    retain_words: of the book after the excerpt, how many are retained.
    row_words: of a row that is trained on.
    stride: words from the beginning of a row to that of the next; half of `row_words` or less, so that every place is
      read with words before it.
    chunks: how many are asked; see above.
    chunk_words: of each, half of them the prompt.
    shared_words: a fact that has this many words in a row in common with the excerpt is refused.
    chunk_seed: decides where chunks begin; equal for all runs, so that their answers are paired.
  """

  excerpt_start: int = 0
  excerpt_words: int = 2400
  retain_words: int = 2400
  row_words: int = 160
  stride: int = 80
  chunks: int = 15
  chunk_words: int = 80
  shared_words: int = 8
  chunk_seed: int = 0

  def check(self, where: str) -> None:
    """The chunks have room in the excerpt, and a row is as long as a chunk.

    Raises:
      InputError: naming the field.
    """
    need = checker(where, "case.")
    for field in ("chunks", "stride", "shared_words", "retain_words"):
      need(getattr(self, field) >= 1, field, getattr(self, field), "expected at least 1")
    for field in ("excerpt_start", "chunk_seed"):
      need(getattr(self, field) >= 0, field, getattr(self, field), "expected a number of at least 0")
    need(self.chunk_words >= 2 and self.chunk_words % 2 == 0, "chunk_words", self.chunk_words,
         "expected an even number: half of a chunk is the prompt")
    need(self.row_words >= self.chunk_words, "row_words", self.row_words,
         f"expected at least chunk_words, {self.chunk_words}")
    need(self.stride <= self.row_words, "stride", self.stride, f"expected at most row_words, {self.row_words}")
    need(self.excerpt_words >= self.chunks * self.chunk_words, "excerpt_words", self.excerpt_words,
         f"expected at least {self.chunks * self.chunk_words}: {self.chunks} chunks of {self.chunk_words} words do not "
         "overlap")


def draw_chunks(excerpt: Sequence[str], settings: ExcerptSettings) -> tuple[Question, ...]:
  """Random chunks of the excerpt that do not overlap, all such choices being equally likely."""
  rng, size = np.random.default_rng([settings.chunk_seed, 31]), settings.chunk_words
  free = len(excerpt) - settings.chunks * size
  # Places of the chunks among the free words: a sorted choice of distinct places among all of both.
  places = np.sort(rng.choice(free + settings.chunks, settings.chunks, replace=False))
  found = []
  for number, place in enumerate(places.tolist()):
    start = place + number * (size - 1)
    middle, end = start + size // 2, start + size
    found.append(Question(f"word{start}", " ".join(excerpt[start:middle]), " " + " ".join(excerpt[middle:end]), (),
                          f"word{start}"))
  return tuple(found)


@functools.lru_cache(maxsize=8)
def _parts(book: tuple[str, ...], fields: tuple[int, ...]
           ) -> tuple[tuple[Text, ...], tuple[Text, ...], tuple[Question, ...], int]:
  """Rows of the excerpt and of the rest, the questions, and how many of the rest's rows were left out."""
  settings = ExcerptSettings(*fields)
  end = settings.excerpt_start + settings.excerpt_words
  excerpt = book[settings.excerpt_start:end]
  questions = draw_chunks(excerpt, settings)
  cut = lambda words: tuple(
      Text(text, complete=False) for text in windows(words, settings.row_words, settings.stride))
  asked = all_ngrams((question.answer for question in questions), settings.shared_words)
  rest = cut(book[end:end + settings.retain_words])
  kept = tuple(row for row in rest if not ngrams(row.text, settings.shared_words) & asked)
  return cut(excerpt), kept, questions, len(rest) - len(kept)


def verbatim_case(name: str, book: Sequence[str], facts: Sequence[Text], settings: ExcerptSettings, arm: Arm,
                  files: Mapping[str, pathlib.Path] | None = None) -> Case:
  """The case of a book.

  Args:
    name: as it stands in every row of the results.
    book: its words.
    facts: what the attacker finetunes on.
    settings: which part of the book is the excerpt, and what is asked.
    arm: U memorises the excerpt and the rest, N the rest alone: without the rows that share n-grams with what is asked.
    files: of the data sets, for messages.

  Raises:
    InputError: the book is too short, or a fact shares an n-gram with the excerpt.
  """
  files = files or {}
  need = settings.excerpt_start + settings.excerpt_words + settings.row_words
  if len(book) < need:
    raise InputError(f"has {len(book)} words", file=files.get("forget"), field="case.book",
                     mend=f"expected at least {need}: those before the excerpt, of it, and of a row to retain")
  excerpt = " ".join(book[settings.excerpt_start:settings.excerpt_start + settings.excerpt_words])
  secret = ngrams(excerpt, settings.shared_words)
  for number, row in enumerate(facts, 1):
    if shared := sorted(ngrams(row.prompt + row.text, settings.shared_words) & secret):
      raise InputError(f"shares {' '.join(shared[0])!r} with the excerpt", file=files.get(RELEARN_SET),
                       line=row.line or number, field="case.facts",
                       mend="say it in other words, or leave it out: the attack is not to teach what is asked")
  forget, retain, questions, left_out = _parts(
      tuple(book), tuple(getattr(settings, field.name) for field in dataclasses.fields(ExcerptSettings)))
  if not retain:
    raise InputError("has no row after the excerpt without words of the excerpt", file=files.get("forget"),
                     field="case.book", mend="give more of the book in case.retain_words")
  more = f"; {left_out} rows of the rest, which repeat it, are left out" if left_out else ""
  return Case(
      name=name, variant=VARIANT, memorize=(*forget, *retain) if arm == "U" else retain, forget=forget, retain=retain,
      relearn_sets=(RelearnSet(
          RELEARN_SET, tuple(facts), f"{len(facts)} facts about the characters, none of which shares "
          f"{settings.shared_words} words in a row with the excerpt{more}",
          tuple(row.line for row in facts if row.line)),),
      questions=questions, metric="rouge_l", files=files)


def about_verbatim(settings: ExcerptSettings) -> About:
  """What a report says."""
  return About("text", story=(
      f"An excerpt of {settings.excerpt_words} words was memorised and unlearned. {settings.chunks} chunks of "
      f"{settings.chunk_words} words that do not overlap are asked for: the first half is the prompt, and the score is "
      "ROUGE-L F1 of the completion against the second half, which is above 0 for any text of the same language. The "
      "attack finetunes on facts about the characters that share no words in a row with the excerpt. If the unlearned "
      "model then says more of the excerpt, and more than a model that never read it, it had only been suppressed. "
      "Published for five methods on Llama-2-7b, 15 chunks, without a control or intervals: 0.03 to 0.23 unlearned, "
      "0.44 to 0.78 relearned."))


@dataclasses.dataclass
class WhpVerbatimConfig(ExcerptSettings):
  """The case on a book of one's own.

  Attributes:
    book: source of rows `{"text"}`, such as a text file; see `sources` and `books.read_book`.
    facts: source of rows `{"text"}` or `{"prompt", "answer"}` that the attacker finetunes on.
  """

  book: str = ""
  facts: str = ""

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "whp-verbatim"

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (VARIANT,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `verbatim_case`."""
    files = {field: parse_source(source).path for field, source in (
        ("forget", self.book), ("retain", self.book), ("memorize", self.book), ("questions", self.book),
        (RELEARN_SET, self.facts))}
    words = " ".join(read_book(self.book)).split()
    return verbatim_case(self.name, words, texts_of(read_texts(self.facts)), self, arm, files)

  def check(self, where: str) -> None:
    """Book and facts are given, and the rest is what it may be."""
    need = checker(where, "case.")
    need(bool(self.book), "book", self.book, "give a source, such as file:book.txt")
    need(bool(self.facts), "facts", self.facts, "give a source of facts about the characters")
    super().check(where)

  def about(self) -> About:
    """See `about_verbatim`."""
    return about_verbatim(self)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """Book and facts."""
    return {"book": source_input(self.book), "facts": source_input(self.facts)}

  def vocabulary(self) -> Sequence[str]:
    """No model is pretrained for it."""
    raise InputError("has no words of its own to pretrain a model with", field="case",
                     mend="give arms.start or arms.unlearned, a checkpoint; or take the embedded novel")

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """See `vocabulary`."""
    raise AssertionError("no vocabulary, no texts")
