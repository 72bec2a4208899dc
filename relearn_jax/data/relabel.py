"""Labels in which terms are replaced by generic ones, aligned with the tokens of the text that holds the terms.

The relabelling of Eldan and Russinovich, 2023 ("Who's Harry Potter?"): the model reads the text as it is, and is to
predict what would stand there if the terms were others. Both texts are tokenized, and every token gets the label that
stands at its place in the other text; where the two cannot be aligned, nothing is predicted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from relearn_jax.errors import InputError

UNCOUNTED = -1  # the label of a place at which nothing is predicted


class _Token(NamedTuple):
  """A token, its characters `[start, end)`, and how many tokens before it have the same ones (bytes of a character)."""

  id: int
  start: int
  end: int
  number: int


class _Span(NamedTuple):
  """The characters of a term here, those of its generic term in the replaced text, and whether it is the first time."""

  start: int
  end: int
  first: int
  last: int
  fresh: bool


def find_terms(text: str, anchors: Mapping[str, str]) -> list[tuple[int, int, str]]:
  """(start, end, term) of every term in a text, as whole words, the longest first where several begin."""
  if not anchors:
    return []
  longest = sorted(anchors, key=len, reverse=True)
  pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest)) + r")(?!\w)")
  return [(found.start(), found.end(), found.group()) for found in pattern.finditer(text)]


def relabel(tokenizer: Any, text: str, anchors: Mapping[str, str], **options: Any) -> tuple[list[int], list[int]]:
  """Tokens of a text, and a label for each.

  * A token outside every term is its own label, unless the replaced text is split differently there: then it is
    `UNCOUNTED`.
  * The tokens of a term have the tokens of its generic term, one by one; where the term has more, those that are left
    over are `UNCOUNTED`, and so are all where the two do not begin at the same place.
  * From its second time on, a term is `UNCOUNTED`: what the text said before, which the model reads, would contradict
    the generic term.

  Args:
    tokenizer: a fast one, which knows the places of its tokens.
    text: what is read.
    anchors: term -> generic term.
    **options: of the tokenizer, such as `add_special_tokens`.

  Raises:
    InputError: the tokenizer does not know the places of its tokens.
  """
  if not getattr(tokenizer, "is_fast", False):
    raise InputError("needs a tokenizer that knows the places of its tokens", field="anchors",
                     mend="use a checkpoint with a tokenizer.json")
  spans: list[_Span] = []
  pieces, at, shift, seen = [], 0, 0, set()
  for start, end, term in find_terms(text, anchors):
    generic = anchors[term]
    spans.append(_Span(start, end, start + shift, start + shift + len(generic), term not in seen))
    seen.add(term)
    pieces += [text[at:start], generic]
    at, shift = end, shift + len(generic) - (end - start)
  replaced = "".join([*pieces, text[at:]])

  here, there = _tokens(tokenizer, text, options), _tokens(tokenizer, replaced, options)
  known = {token[1:]: token.id for token in there}
  labels: list[int] = []
  left: dict[int, list[int]] = {}  # labels that the tokens of each term have still to be given
  for index, token in enumerate(here):
    moved = sum(s.last - s.first - (s.end - s.start) for s in spans if s.end <= token.start)
    inside = next((i for i, s in enumerate(spans) if token.start < s.end and token.end > s.start), None)
    if inside is None:
      same = known.get((token.start + moved, token.end + moved, token.number)) == token.id
      labels.append(token.id if same else UNCOUNTED)
      continue
    if inside not in left:
      left[inside] = _generic(here, index, there, token.start + moved, spans[inside])
    labels.append(left[inside].pop(0) if left[inside] else UNCOUNTED)
  return [token.id for token in here], labels


def _generic(here: Sequence[_Token], index: int, there: Sequence[_Token], place: int, span: _Span) -> list[int]:
  """The tokens of a generic term, from `place` on, where the term's first token would stand; none where it cannot."""
  found = [i for i, token in enumerate(there) if token.start >= place and token.end > place and token.start < span.last]
  if not span.fresh or here[index].start > span.start or not found or there[found[0]].start != place:
    return []
  ours, theirs = _widthless(here, index), _widthless(there, found[0])
  return theirs[len(ours):] + [there[i].id for i in found] if theirs[:len(ours)] == ours else []


def _widthless(tokens: Sequence[_Token], index: int) -> list[int]:
  """The tokens without characters just before one: special ones, and spaces to some tokenizers."""
  first = index
  while first and tokens[first - 1].start == tokens[first - 1].end:
    first -= 1
  return [token.id for token in tokens[first:index]]


def _tokens(tokenizer: Any, text: str, options: Mapping[str, Any]) -> list[_Token]:
  found = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
  numbers: Counter[tuple[int, int]] = Counter()
  tokens = []
  for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
    tokens.append(_Token(token, start, end, numbers[start, end]))
    numbers[start, end] += 1
  return tokens
