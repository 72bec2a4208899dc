"""Finding phrases in a text however they are spelled: in the plural, joined, split, reordered, or over two rows.

Stricter than a hit (`metrics.keyword`): everything that is a hit is found, and so is what a reader would recognise.
"""

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from relearn_jax.metrics.keyword import TAG, find_normal, is_unspaced, is_word, keyword_key, normalize

MIN_LETTERS = 4  # of a phrase that is looked for in other spellings than its own
MAX_REORDERED = 5  # words
AS_IT_IS, PLURAL, JOINED, REORDERED, OVER_TWO = "as it is", "plural", "joined or split", "reordered", "over two lines"

CAMEL = re.compile(r"([a-z\u00df-\u00ff])(?=[A-Z\u00c0-\u00de])")
POSSESSIVE = re.compile(r"(?<=\w)'s(?!\w)")
POINT = re.compile(r"(?<=\d)[.,\u066b\u066c\u2044](?=\d)")
GLUE = re.compile(r"(?<=\w)(?:'|- ?)(?=\w)")
EMPHASIS = re.compile(r"[*_`]")


def words(text: str) -> list[str]:
  """The words of a text in normal form, without the ends of possessives; "1.5" is one word.

  >>> words("Mark's d'Anthony, 1.5")
  ['mark', 'd', 'anthony', '1\\x005']
  """
  normal = POINT.sub("\0", POSSESSIVE.sub(" ", normalize(text).text))
  return "".join(c if c == "\0" or is_word(c) else " " for c in normal).split()


def glued_words(text: str) -> list[str]:
  """The words of a text in which hyphens, apostrophes and markup within words are left out.

  >>> glued_words("Al-Kuwaiti, O'Brien, <i>An</i>thony, hyphen-\\nated")
  ['alkuwaiti', 'obrien', 'anthony', 'hyphenated']
  """
  normal = normalize(EMPHASIS.sub("", TAG.sub("", text))).text
  return words(GLUE.sub("", POSSESSIVE.sub(" ", normal)))


def singulars(word: str) -> set[str]:
  """What an English plural may be the plural of; empty for what is none.

  >>> sorted(singulars("boxes"))
  ['box', 'boxe']
  """
  if len(word) < MIN_LETTERS or not word.isalpha() or not word.endswith("s") or word.endswith("ss"):
    return set()
  found = {word[:-1]}
  if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
    found.add(word[:-2])
  if word.endswith("ies"):
    found.add(word[:-3] + "y")
  return found


def read(text: str) -> str:
  """A text as a reader sees it: HTML entities are the characters that they stand for."""
  return html.unescape(text)


class Phrases:
  """Phrases that are looked for in rows of text."""

  def __init__(self, phrases: Iterable[str]):
    """
    Args:
      phrases: in any spelling; what is alike in normal form is one phrase, and is named by its normal form.
    """
    self.keys = sorted({keyword_key(read(phrase)) for phrase in phrases} - {""})
    self.unspaced = [key for key in self.keys if any(map(is_unspaced, key))]
    self.first: dict[str, list[tuple[tuple[str, ...], str]]] = {}  # first word -> all words, phrase
    self.joined: dict[str, str] = {}
    self.bags: dict[tuple[str, ...], str] = {}  # words, sorted -> phrase
    self.longest = 1
    for key in self.keys:
      plain = tuple(words(key))
      if len("".join(plain)) >= MIN_LETTERS:
        self._add(key, plain)
        if (glued := tuple(glued_words(key))) != plain:
          self._add(key, glued)
    self.known = {word for bag in self.bags for word in bag}
    self.sizes = sorted({len(bag) for bag in self.bags})

  def _add(self, key: str, plain: tuple[str, ...]) -> None:
    self.first.setdefault(plain[0], []).append((plain, key))
    self.joined.setdefault("".join(plain), key)
    self.longest = max(self.longest, len(plain))
    if 1 < len(plain) <= MAX_REORDERED and any(len(word) >= MIN_LETTERS for word in plain):  # not "it is"
      self.bags.setdefault(tuple(sorted(plain)), key)

  def find(self, text: str) -> dict[str, str]:
    """The phrases in a text -> how each was found."""
    seen = read(text)
    normal = normalize(seen).text
    found = {key: AS_IT_IS for key in self.keys if next(find_normal(normal, key), None)}
    for view in self._views(seen):
      for _, _, key, how in self._sequences(view):
        found.setdefault(key, how)
      for word in view:
        for form in (word, *singulars(word)):
          if form in self.joined:
            found.setdefault(self.joined[form], JOINED)
      for key in self._reordered(view):
        found.setdefault(key, REORDERED)
    return found

  def find_over_two(self, first: str, second: str) -> dict[str, str]:
    """The phrases that begin at the end of one row and end at the start of the next."""
    found: dict[str, str] = {}
    tail, head = words(read(first)[-40 * self.longest:])[-self.longest:], words(read(second)[:40 * self.longest])
    if tail and head:
      for start, end, key, _ in self._sequences([*tail, *head[:self.longest]]):
        if start < len(tail) < end:
          found[key] = OVER_TWO
      if key := self.joined.get(tail[-1] + head[0], ""):
        found[key] = OVER_TWO
    if self.unspaced:
      reach = max(map(len, self.unspaced))
      ends, begins = (normalize(read(text)).text.strip() for text in (first[-4 * reach:], second[:4 * reach]))
      for key in self.unspaced:
        if any(start < len(ends) < end for start, end in find_normal(ends + begins, key)):
          found[key] = OVER_TWO
    return found

  def _views(self, text: str) -> Iterator[list[str]]:
    plain = words(text)
    yield plain
    if (glued := glued_words(text)) != plain:
      yield glued
    if CAMEL.search(text):
      yield words(CAMEL.sub(r"\1 ", text))

  def _sequences(self, view: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """Begin and end of each phrase whose words stand side by side, whatever parts them; the phrase, and how."""
    for start, word in enumerate(view):
      for form in (word, *singulars(word)):
        for phrase, key in self.first.get(form, ()):
          some = view[start:start + len(phrase)]
          if len(some) == len(phrase) and all(w == p or p in singulars(w) for w, p in zip(some, phrase, strict=True)):
            # The same words parted by something else, such as a comma or a hyphen, are the phrase as it is.
            yield start, start + len(phrase), key, AS_IT_IS if tuple(some) == phrase else PLURAL

  def _reordered(self, view: Sequence[str]) -> Iterator[str]:
    known = [next((form for form in (word, *singulars(word)) if form in self.known), "") for word in view]
    for start in (start for start, word in enumerate(known) if word):
      for size in self.sizes:
        some = known[start:start + size]
        if len(some) == size and (key := self.bags.get(tuple(sorted(some)))):
          yield key


def parts(phrases: Iterable[str], common: set[str]) -> Mapping[str, str]:
  """Parts of phrases that may give one away: part -> phrase.

  These are the words of phrases of several words, and the singulars of phrases of one, of at least `MIN_LETTERS`
  letters; without those in `common`, in the singular or plural.
  """
  found: dict[str, str] = {}
  for key in sorted({keyword_key(read(phrase)) for phrase in phrases}):
    plain = words(key)
    for part in plain if len(plain) > 1 else [form for word in plain for form in sorted(singulars(word))]:
      if len(part) >= MIN_LETTERS and not {part, *singulars(part), part + "s"} & common:
        found.setdefault(part, key)
  return found
