"""Keyword hits: where in a text does a phrase stand as whole words, however it is spelled, quoted or marked up?

Text and keyword are brought into one normal form (`normalize`), in which a hit is a plain occurrence with a word
boundary on either side (`find_normal`). Every character of the normal form knows where it comes from, so that a hit
can be shown in the original text.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterator

# Elements that stand in running text. Not whatever looks like a tag: "vector<int>" has none.
TAG = re.compile(
    r"<!--.*?-->|</?(?:a|abbr|b|big|cite|code|del|em|font|i|img|ins|kbd|mark|q|s|samp|small|span|strike|strong|sub|sup|tt"
    r"|u|var|(?P<block>blockquote|br|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|table|tbody|td|th|thead|tr|ul))(?:\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL)

# Before compatibility decomposition, which would make a space and an accent of some of these.
ALIKE = str.maketrans({
    **dict.fromkeys("‘’‚‛‹›′‵´ʹʻʼʽˈ՚׳＇", "'"), **dict.fromkeys("“”„‟«»″‶〝〞〟״＂", '"'),
    **dict.fromkeys("−⁃﹣－", "-"), **dict.fromkeys("*_＊＿", " ")})
EMPHASIS = frozenset("*_＊＿™℠®")  # besides backticks and tags; and what is raised beside a name, but no part of it
# NFKC makes ordinary digits of these, though none of the word that they follow: a footnote.
RAISED = frozenset("¹²³⁰⁴⁵⁶⁷⁸⁹")
UNSEEN = frozenset(map(chr, (0x34F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))  # besides format characters

# Writing without spaces between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
UNSPACED = ((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x312F),
            (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
            (0xF900, 0xFAFF), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF))
HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
# A character that may compose with the one before it although it is no mark: vowels and final consonants of
# Korean, half-width voicing marks of Japanese.
COMPOSING = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF), (0xFF9E, 0xFFDC))
IN_NUMBERS = frozenset(".,٫٬⁄")  # between two digits they part no numbers
# ASCII without "*", "<", "_" and "`". Such text is its own normal form, but for case, where no two spaces are in a row.
PLAIN = re.compile(r"[ !-)+-;=-^a-~]*")
# But the year of a date, 12.05.2020 or 2020.05.12, is a number.
YEAR = re.compile(r"(?<!\d)\d{4}(?!\d)")
DAY_BEFORE = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,2}\.\d{1,2}\.$")
DAY_AFTER = re.compile(r"\.\d{1,2}\.\d{1,2}(?![.,]?\d)")


@dataclasses.dataclass(frozen=True)
class Normal:
  """A normal form.

  Attributes:
    text: the normal form.
    spans: for each of its characters, where what it stands for begins and ends in the original text.
  """

  text: str
  spans: tuple[tuple[int, int], ...]


def normalize(text: str, *, case: bool = False) -> Normal:
  """The form in which texts and keywords are compared.

  NFKC; case folded unless `case`; characters that are not seen (format characters, soft hyphens) left out; one kind of
  single and of double quotation mark (apostrophes are single ones), one dash and one space; runs of spaces, and
  of HTML tags that break a line, are one space. Emphasis (`*`, `_`, backticks, other tags) and trade marks are a space
  between words and nothing elsewhere. A raised character is parted from the word before it.

  >>> normalize("*José*\\u2019s  Al\\u2011Kuwaiti, **Jr**.").text
  "josé's al-kuwaiti, jr."
  """
  characters: list[str] = []
  spans: list[tuple[int, int]] = []
  marks: tuple[int, int] | None = None  # where emphasis begins and ends that has not been taken for anything yet
  for segment, start, end in _segments(text):
    if segment in EMPHASIS:
      marks = (marks[0] if marks else start), end
      continue
    folded = _fold(segment, case)
    if marks and _parted("".join(characters[-2:]), folded):
      characters.append(" ")
      spans.append(marks)
    marks = None
    for character in folded:
      if character == " " and characters and characters[-1] == " ":
        spans[-1] = (spans[-1][0], end)
      else:
        characters.append(character)
        spans.append((start, end))
  return Normal("".join(characters), tuple(spans))


def _parted(before: str, after: str) -> bool:
  """Whether emphasis parts what stands before it from what stands after it: two words, or two numbers."""
  if not before or not after:
    return False
  points = before[-1] in IN_NUMBERS and before[:-1].isdigit() and after[0].isdigit()  # "1.**1990**" is a list
  return points or is_word(before[-1]) and is_word(after[0])


def _segments(text: str) -> Iterator[tuple[str, int, int]]:
  """Pieces that NFKC maps one by one, each a character with what composes with it, and their places.

  A tag is a space if it breaks a line, and else "*".
  """
  tags = [(*match.span(), " " if match["block"] else "*") for match in TAG.finditer(text)] if "<" in text else []
  held, start, end, place = "", 0, 0, 0
  while place < len(text):
    if tags and place == tags[0][0]:
      _, after, piece = tags.pop(0)
    else:
      piece, after = text[place], place + 1
    if piece == "`":  # emphasis, unless it stands for an apostrophe
      piece = "'" if text[max(place - 1, 0)].isalnum() and text[after:after + 1].isalnum() else "*"
    if not _unseen(piece):
      if held and _composes(piece):
        held, end = held + piece, after
      else:
        if held:
          yield held, start, end
        held, start, end = piece, place, after
    place = after
  if held:
    yield held, start, end


@functools.lru_cache(maxsize=16384)
def _fold(segment: str, case: bool) -> str:
  raised = " " if segment[0] in RAISED else ""
  plain = unicodedata.normalize("NFKC", segment.translate(ALIKE))
  if not case:
    plain = unicodedata.normalize("NFKC", plain.casefold())
  return raised + "".join("-" if unicodedata.category(c) == "Pd" else " " if c.isspace() else c for c in plain)


def _within(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
  return any(first <= ord(character) <= last for first, last in ranges)


@functools.lru_cache(maxsize=16384)
def _unseen(character: str) -> bool:
  return unicodedata.category(character) == "Cf" or character in UNSEEN


@functools.lru_cache(maxsize=16384)
def _composes(character: str) -> bool:
  return unicodedata.category(character)[0] == "M" or _within(character, COMPOSING)


@functools.lru_cache(maxsize=16384)
def is_word(character: str) -> bool:
  """Whether a character of a normal form can be part of a word: letters, digits and their marks."""
  return character.isalnum() or unicodedata.category(character)[0] == "M"


@functools.lru_cache(maxsize=16384)
def is_unspaced(character: str) -> bool:
  """Whether a character is of a script that puts no space between words; digits are numbers everywhere."""
  return _within(character, UNSPACED) and not character.isdigit()


@functools.lru_cache(maxsize=16384)
def _is_hangul(character: str) -> bool:
  return _within(character, HANGUL)


def _begins_word(text: str, start: int) -> bool:
  """Whether a word may begin at `start`."""
  if start == 0:
    return True
  left, first = text[start - 1], text[start]
  if first.isdigit() and left in IN_NUMBERS and text[start - 2:start - 1].isdigit():
    return bool(YEAR.match(text, start) and DAY_BEFORE.search(text[max(start - 8, 0):start]))
  return not is_word(left) or is_unspaced(left) or is_unspaced(first) or _is_hangul(left) != _is_hangul(first)


def _ends_word(text: str, end: int) -> bool:
  """Whether a word may end before `end`; Korean particles follow a word without a space."""
  if end == len(text):
    return True
  last, right = text[end - 1], text[end]
  if last.isdigit() and right in IN_NUMBERS and text[end + 1:end + 2].isdigit():
    return bool(YEAR.match(text, max(end - 4, 0)) and DAY_AFTER.match(text, end))
  if unicodedata.category(right)[0] == "M":  # part of the last character
    return False
  return (not is_word(right) or is_unspaced(right) or is_unspaced(last) or _is_hangul(right) or _is_hangul(last))


def find_normal(text: str, key: str) -> Iterator[tuple[int, int]]:
  """Where `key` stands in `text` as whole words; both are normal forms, and `key` is stripped.

  Between characters of a script without spaces, and before Korean particles, no word boundary is asked for. A number
  ends where its digits do, with full stops and commas between them: "1" is not in "1.5", but it is in "It is 1.", and
  "2020" is in "12.05.2020".
  """
  start = text.find(key) if key else -1
  while start >= 0:
    end = start + len(key)
    if _begins_word(text, start) and _ends_word(text, end):
      yield start, end
    start = text.find(key, start + 1)


@functools.lru_cache(maxsize=16384)
def keyword_key(keyword: str, case: bool = False) -> str:
  """The normal form of a keyword; empty where nothing of it is left, so that it could never be hit."""
  return normalize(keyword, case=case).text.strip()


def find_keyword(text: str, keyword: str, *, case: bool = False) -> list[tuple[int, int]]:
  """Where `keyword` stands in `text` as whole words: begin and end of each hit in the original text, in order.

  Args:
    text: any text.
    keyword: what is looked for; see `normalize` for what is alike.
    case: upper and lower case differ.

  >>> find_keyword("Gary, **Anthony**  Mark.", "anthony mark")
  [(8, 23)]
  """
  if PLAIN.fullmatch(text) and "  " not in text:  # a hundred times as fast
    return list(find_normal(text if case else text.lower(), keyword_key(keyword, case)))
  normal = normalize(text, case=case)
  return [(normal.spans[start][0], normal.spans[end - 1][1])
          for start, end in find_normal(normal.text, keyword_key(keyword, case))]


def contains_keyword(text: str, keyword: str, *, case: bool = False) -> bool:
  """Whether `find_keyword` finds anything.

  >>> contains_keyword("Gary, Anthony  Mark.", "Anthony Mark")
  True
  >>> contains_keyword("Anthony Marks", "Anthony Mark")
  False
  """
  return bool(find_keyword(text, keyword, case=case))
