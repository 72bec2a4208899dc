"""Finding phrases however they are spelled: in the plural, without accents, joined, split, reordered, over two rows.

Stricter than a hit (`metrics.keyword`): everything that is a hit is found, and so is what a reader would recognise.
"""

import functools
import html
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from relearn_jax.metrics.keyword import TAG, find_normal, is_unspaced, is_word, keyword_key, normalize

MIN_LETTERS = 4  # of a phrase that is looked for in other spellings than its own
MAX_REORDERED = 5  # words
AS_IT_IS, PLURAL, ACCENTS, JOINED = "as it is", "plural", "other accents", "joined or split"
SPACED, REORDERED, ATTRIBUTE, OVER_TWO = "letter by letter", "reordered", "in a tag", "over two lines"

CAMEL = re.compile(r"([a-z\u00df-\u00ff])(?=[A-Z\u00c0-\u00de])")
POSSESSIVE = re.compile(r"(?<=\w)'s(?!\w)")
POINT = re.compile(r"(?<=\d)[.,\u066b\u066c\u2044](?=\d)")
GLUE = re.compile(r"(?<=\w)(?:'|- ?)(?=\w)")
EMPHASIS = re.compile(r"[*_`]")
VALUE = re.compile(r"""=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))""")
ACCENT = re.compile("[\u0300-\u036f]")
STROKES = str.maketrans({"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "ı": "i",
                         "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"})

# How a plural ends -> how what it may be the plural of does. "-men" is looked at apart: "omen" is no plural.
ENDINGS = {"s": ("",), "ses": ("s", "sis"), "xes": ("x",), "zes": ("z",), "zzes": ("z",), "ches": ("ch",),
           "shes": ("sh",), "oes": ("o",), "ies": ("y",), "eaux": ("eau",)} | {
    plural: (singular,) for plural, _, singular in (pair.partition("/") for pair in (
        "calves/calf elves/elf halves/half hooves/hoof knives/knife leaves/leaf lives/life loaves/loaf scarves/scarf "
        "thieves/thief wives/wife wolves/wolf women/woman children/child feet/foot geese/goose mice/mouse teeth/tooth "
        "appendices/appendix codices/codex indices/index matrices/matrix vertices/vertex criteria/criterion "
        "phenomena/phenomenon bacteria/bacterium curricula/curriculum memoranda/memorandum millennia/millennium "
        "spectra/spectrum strata/stratum alumni/alumnus cacti/cactus fungi/fungus nuclei/nucleus radii/radius "
        "stimuli/stimulus syllabi/syllabus antennae/antenna formulae/formula larvae/larva nebulae/nebula").split())}


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


@functools.lru_cache(maxsize=16384)
def singulars(word: str) -> frozenset[str]:
  """What an English plural may be the plural of; empty for a word that is no plural.

  >>> sorted(singulars("boxes")), sorted(singulars("wolves")), sorted(singulars("salesmen"))
  (['box', 'boxe'], ['wolf', 'wolve'], ['salesman'])
  """
  if len(word) < MIN_LETTERS or not word.isalpha() or word.endswith("ss"):
    return frozenset()
  found = {word[:-len(end)] + instead for end, others in ENDINGS.items() if word.endswith(end) for instead in others}
  if word.endswith("men") and len(word) > 6:
    found.add(word[:-2] + "an")
  return frozenset(found)


def read(text: str) -> str:
  """A text as a reader sees it: HTML entities are the characters that they stand for."""
  return html.unescape(text)


def bare(text: str) -> str:
  """A text without the accents of its letters.

  >>> bare("José Søren Łódź")
  'Jose Soren Lodz'
  """
  if text.isascii():
    return text
  return unicodedata.normalize("NFC", ACCENT.sub("", unicodedata.normalize("NFD", text))).translate(STROKES)


def attributes(text: str) -> Iterator[str]:
  """What stands in a text's tags: the values of their attributes, and comments.

  >>> list(attributes("<img alt='Anthony Mark' src=mark.png><!-- Gary --> <mark>x</mark>"))
  ['Anthony Mark', 'mark.png', ' Gary ']
  """
  for tag in (match[0] for match in TAG.finditer(text)):
    if tag.startswith("<!--"):
      yield tag[4:-3]
    else:
      yield from ("".join(filter(None, values)) for values in VALUE.findall(tag))


class Phrases:
  """Phrases that are looked for in rows of text."""

  def __init__(self, phrases: Iterable[str]):
    """
    Args:
      phrases: in any spelling; what is alike in normal form is one phrase, and is named by its normal form.
    """
    self.keys = sorted({keyword_key(read(phrase)) for phrase in phrases} - {""})
    self.forms = {key: key for key in self.keys}  # as it is looked for -> phrase
    self.first: dict[str, list[tuple[tuple[str, ...], str]]] = {}  # first word -> all words, form
    self.joined: dict[str, str] = {}
    self.bags: dict[tuple[str, ...], str] = {}  # words, sorted -> form
    self.longest = 1
    for key in self.keys:
      if sum(map(len, words(key))) >= MIN_LETTERS:
        self.forms.setdefault(bare(key), key)
    for form in self.forms:
      plain = tuple(words(form))
      if len("".join(plain)) >= MIN_LETTERS:
        self._add(form, plain)
        if (glued := tuple(glued_words(form))) != plain:
          self._add(form, glued)
    self.known = {word for bag in self.bags for word in bag}
    self.sizes = sorted({len(bag) for bag in self.bags})
    self.unspaced = [form for form in self.forms if any(map(is_unspaced, form))]
    self.reach = max([40 * self.longest, *(4 * len(form) for form in self.unspaced)])

  def _add(self, form: str, plain: tuple[str, ...]) -> None:
    for word in {plain[0], *(singulars(plain[0]) if len(plain) > 1 else ())}:
      self.first.setdefault(word, []).append((plain, form))
    self.joined.setdefault("".join(plain), form)
    self.longest = max(self.longest, len(plain))
    if 1 < len(plain) <= MAX_REORDERED and any(len(word) >= MIN_LETTERS for word in plain):  # not "it is"
      self.bags.setdefault(tuple(sorted(plain)), form)

  def find(self, text: str) -> dict[str, str]:
    """The phrases in a text -> how each was found."""
    seen = read(text)
    found = self._find(seen)
    for value in attributes(seen):
      for key in self._find(value):
        found.setdefault(key, ATTRIBUTE)
    return found

  def _find(self, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for reading in dict.fromkeys((text, bare(text))):
      for form, how in self._forms_in(reading):
        key = self.forms[form]
        found.setdefault(key, how if form == key and reading == text else ACCENTS)
    return found

  def _forms_in(self, text: str) -> Iterator[tuple[str, str]]:
    normal = normalize(text).text
    yield from ((form, AS_IT_IS) for form in self.forms if next(find_normal(normal, form), None))
    for view in self._views(text):
      yield from ((form, how) for _, _, form, how in self._sequences(view))
      for word in view:
        yield from ((self.joined[one], JOINED) for one in (word, *singulars(word)) if one in self.joined)
      yield from ((form, SPACED) for form in self._spaced(view))
      yield from ((form, how) for _, _, form, how in self._reordered(view))

  def find_over_two(self, first: str, second: str) -> dict[str, str]:
    """The phrases that begin at the end of one row and end at the start of the next."""
    ends, begins = read(first)[-self.reach:], read(second)[:self.reach]
    readings = dict.fromkeys([(ends, begins), (bare(ends), bare(begins))])
    return {self.forms[form]: OVER_TWO for reading in readings for form in self._over_two(*reading)}

  def _over_two(self, ends: str, begins: str) -> Iterator[str]:
    tail, head = words(ends)[-self.longest:], words(begins)[:self.longest]
    if tail and head:
      view = [*tail, *head]
      for start, end, form, _ in itertools.chain(self._sequences(view), self._reordered(view)):
        if start < len(tail) < end:
          yield form
      if form := self.joined.get(tail[-1] + head[0], ""):
        yield form
    if self.unspaced:
      left, right = (normalize(text).text.strip() for text in (ends, begins))
      for form in self.unspaced:
        if any(start < len(left) < end for start, end in find_normal(left + right, form)):
          yield form

  def _views(self, text: str) -> Iterator[list[str]]:
    plain = words(text)
    yield plain
    if (glued := glued_words(text)) != plain:
      yield glued
    if CAMEL.search(text):
      yield words(CAMEL.sub(r"\1 ", text))

  def _sequences(self, view: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """Begin and end of each form whose words stand side by side, whatever parts them; the form, and how."""
    for start, word in enumerate(view):
      for one in (word, *singulars(word)):
        for phrase, form in self.first.get(one, ()):
          some = view[start:start + len(phrase)]
          if len(some) == len(phrase) and all(map(_alike, some, phrase)):
            # The same words parted by something else, such as a comma or a hyphen, are the phrase as it is.
            yield start, start + len(phrase), form, AS_IT_IS if tuple(some) == phrase else PLURAL

  def _spaced(self, view: Sequence[str]) -> Iterator[str]:
    """Forms in runs of single letters, which do not say where words end."""
    for alone, run in itertools.groupby(view, lambda word: len(word) == 1):
      letters = "".join(run) if alone else ""
      if len(letters) >= MIN_LETTERS:
        yield from (form for joined, form in self.joined.items() if joined in letters and not joined.isdigit())

  def _reordered(self, view: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    known = [next((form for form in (word, *singulars(word)) if form in self.known), "") for word in view]
    for start in (start for start, word in enumerate(known) if word):
      for size in self.sizes:
        some = known[start:start + size]
        if len(some) == size and (form := self.bags.get(tuple(sorted(some)))):
          yield start, start + size, form, REORDERED


def _alike(word: str, wanted: str) -> bool:
  return word == wanted or wanted in singulars(word) or word in singulars(wanted)


def parts(phrases: Iterable[str], common: set[str]) -> Mapping[str, str]:
  """Parts of phrases that may give one away: part -> phrase.

  These are the words of phrases of several words, and the singulars of phrases of one, of at least `MIN_LETTERS`
  letters; without those in `common`, in the singular or plural, with accents or without.
  """
  found: dict[str, str] = {}
  for key in sorted({keyword_key(read(phrase)) for phrase in phrases}):
    plain = words(key)
    for part in plain if len(plain) > 1 else [form for word in plain for form in sorted(singulars(word))]:
      if len(part) >= MIN_LETTERS and not {bare(form) for form in (part, *singulars(part), part + "s")} & common:
        found.setdefault(part, key)
  return found
