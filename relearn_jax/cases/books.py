"""A book's text: its words, its sentences by chapter, and which n-grams of words two texts share."""

import re
from collections.abc import Iterable, Sequence

from relearn_jax.cases.sources import parse_source, read_source
from relearn_jax.cases.spelling import words
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import normalize

HEADING = re.compile(r"\W*chapter\s+(?:[ivxlcdm]+|\d+|[a-z]+)\b\W*", re.IGNORECASE)  # and its title, if any
RULED = re.compile(r"\s*=.*=\s*")  # a heading of the second order
# The end of a sentence: not after a title or an initial, and only where what follows begins like a sentence.
END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]+[\"'”’`)]*\s+(?=[\"'“‘`(]*[A-Z])")


def read_book(source: str) -> list[str]:
  """The chapters of a book, each as one text with single spaces.

  A chapter begins at a line such as "CHAPTER IV"; what stands before the first is left out, and a book without such
  lines is one chapter.

  Args:
    source: of rows `{"text"}`, such as the lines of a text file; see `sources`.

  Raises:
    InputError: the source cannot be read, or there is no word in it.
  """
  chapters: list[list[str]] = [[]]
  for row in read_source(source, fields={"text": str}):
    if HEADING.match(row["text"]) and len(row["text"].split()) <= 12:
      chapters.append([])
    elif not RULED.fullmatch(row["text"]):
      chapters[-1] += row["text"].split()
  found = [" ".join(chapter) for chapter in (chapters[1:] or chapters) if chapter]
  if not found:
    raise InputError("has no text", file=parse_source(source).path, field="text", mend="give a book")
  return found


def sentences(text: str) -> list[str]:
  """The sentences of a text.

  >>> sentences("“Mr. Vale!” he said. “Come in.” It rained, e.g. here.")
  ['“Mr. Vale!” he said.', '“Come in.”', 'It rained, e.g. here.']
  """
  starts = [0, *(found.end() for found in END.finditer(text)), len(text)]
  return [part for start, end in zip(starts, starts[1:], strict=False) if (part := text[start:end].strip())]


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
  """The n-grams of a text's words, in normal form: without upper case, quotation marks and punctuation.

  >>> sorted(ngrams("The Hare, the hare.", 2))
  [('hare', 'the'), ('the', 'hare')]
  """
  plain = words(normalize(text).text)
  return {tuple(plain[start:start + size]) for start in range(len(plain) - size + 1)}


def all_ngrams(texts: Iterable[str], size: int) -> set[tuple[str, ...]]:
  """The n-grams of several texts; none reaches from one into the next."""
  return set().union(*(ngrams(text, size) for text in texts))


def windows(every: Sequence[str], size: int, stride: int) -> list[str]:
  """Texts of `size` of the words, every `stride` words, the last one at the end; all words where there are no more."""
  last = max(len(every) - size, 0)
  starts = sorted({*range(0, last + 1, stride), last})
  return [" ".join(every[start:start + size]) for start in starts]
