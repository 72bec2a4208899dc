"""Labels in which terms are replaced by generic ones, aligned with the tokens of the text that holds the terms.

The relabelling of Eldan and Russinovich, 2023 ("Who's Harry Potter?"): the model reads the text as it is, and is to
predict what would stand there if the terms were others. Both texts are tokenized, and every token gets the label that
stands at its place in the other text; where the two cannot be aligned, nothing is predicted.
"""

import re
from collections.abc import Mapping
from typing import Any

from relearn_jax.errors import InputError

UNCOUNTED = -1  # the label of a place at which nothing is predicted


def find_terms(text: str, anchors: Mapping[str, str]) -> list[tuple[int, int, str]]:
  """(start, end, term) of every term in a text, as whole words, the longest first where several begin."""
  if not anchors:
    return []
  longest = sorted(anchors, key=len, reverse=True)
  pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest)) + r")(?!\w)")
  return [(found.start(), found.end(), found.group()) for found in pattern.finditer(text)]


def relabel(tokenizer: Any, text: str, anchors: Mapping[str, str], **options: Any) -> tuple[list[int], list[int]]:
  """Tokens of a text, and a label for each.

  * A token outside every term has the label that begins at its place in the replaced text: itself, unless the two texts
    are split differently there, in which case it is `UNCOUNTED`.
  * The tokens of a term have the tokens of its generic term, one by one; where the term has more, those that are left
    over are `UNCOUNTED`.
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
  terms, pieces, at, shift = find_terms(text, anchors), [], 0, 0
  spans = []  # (start, end) here, (start, end) in the replaced text, whether it is the first of its kind
  seen: set[str] = set()
  for start, end, term in terms:
    generic = anchors[term]
    spans.append(((start, end), (start + shift, start + shift + len(generic)), term not in seen))
    seen.add(term)
    pieces += [text[at:start], generic]
    at, shift = end, shift + len(generic) - (end - start)
  replaced = "".join([*pieces, text[at:]])

  here, there = _tokens(tokenizer, text, options), _tokens(tokenizer, replaced, options)
  by_start = {start: token for token, start, end in there if end > start}
  special = [token for token, start, end in there if end == start]
  labels = []
  used: dict[int, int] = {}  # tokens that each span has given labels to
  moved = 0
  for token, start, end in here:
    if end == start:  # a special token, which stands in both texts
      labels.append(token if token in special else UNCOUNTED)
      continue
    inside = next((i for i, ((a, b), _, _) in enumerate(spans) if start < b and end > a), None)
    if inside is None:
      moved = sum((d - c) - (b - a) for (a, b), (c, d), _ in spans if b <= start)
      labels.append(by_start.get(start + moved, UNCOUNTED))
      continue
    _, (first, last), fresh = spans[inside]
    generic_tokens = [other for other, c, d in there if d > c and c < last and d > first]
    number = used.get(inside, 0)
    used[inside] = number + 1
    labels.append(generic_tokens[number] if fresh and number < len(generic_tokens) else UNCOUNTED)
  return [token for token, _, _ in here], labels


def _tokens(tokenizer: Any, text: str, options: Mapping[str, Any]) -> list[tuple[int, int, int]]:
  """(id, start, end) of each token; start = end for special ones."""
  found = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
  return [(token, start, end) for token, (start, end) in
          zip(found["input_ids"], found["offset_mapping"], strict=True)]
