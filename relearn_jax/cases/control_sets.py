"""Control sets: what of a relearn set brings a secret back, its meaning, its form, or any training at all?

Beside each relearn set stand sets of the same size, made from it by rule, with which the same attack is made: as many
rows, of as many tokens each, for as many steps. Hu, Fu, Wu, Smith (ICLR 2025) compare such sets in their synthetic
case: gibberish brought 9 % of the answers back, correlated English text 100 %.

- gibberish: words drawn at random. Where the tokenizer knows whole words only they are words of its vocabulary, else
  letters.
- unrelated: generic text, about something else in other words.
- same_syntax: the relearn set with other names in place of its own, each name always by the same one.
- same_topic: the words that say what a row is about, out of order and without the words that link them.
"""

import dataclasses
import itertools
import string
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from relearn_jax.cases.base import RelearnSet, Text
from relearn_jax.cases.content import FUNCTION_WORDS
from relearn_jax.cases.novel import FAMILY, GIVEN
from relearn_jax.cases.spelling import words
from relearn_jax.errors import InputError

PREFIX = "control-"  # of a control set's name
ENDS = (".", "!", "?", ":", "”", '"')
MARKS = string.punctuation + "“”‘’…–—"


@dataclasses.dataclass(frozen=True)
class Stock:
  """What control sets are made of.

  Attributes:
    count: tokens of a text.
    vocabulary: the words of a tokenizer that knows whole words only; (): any text can be read.
    generic: texts about something else; (): there are none.
    forbidden: words that no set may have, in normal form: those of secrets and keywords.
  """

  count: Callable[[str], int]
  vocabulary: Sequence[str] = ()
  generic: Sequence[str] = ()
  forbidden: frozenset[str] = frozenset()

  def free(self, every: Sequence[str]) -> list[str]:
    """The words that are not forbidden."""
    return [word for word in every if not self.forbidden & set(words(word))]


def control_set(kind: str, relearn_set: RelearnSet, stock: Stock, seed: int = 0) -> RelearnSet:
  """A control set of a relearn set.

  Args:
    kind: one of the four.
    relearn_set: which rows it has as many of, of as many tokens each.
    stock: what it is made of.
    seed: decides what is drawn.

  Raises:
    InputError: it cannot be made: there is no generic text, or no name to be replaced.
  """
  rng = np.random.default_rng([seed, KINDS.index(kind), 41])
  streams = _MAKE[kind](relearn_set.rows, stock, rng)
  rows = tuple(_row(row, stream, stock.count) for row, stream in zip(relearn_set.rows, streams, strict=False))
  size = lambda some: sum(stock.count(row.prompt) + stock.count(row.text) for row in some)
  return RelearnSet(f"{PREFIX}{kind}", rows, (
      f"control set ({kind.replace('_', ' ')}), made by rule from {relearn_set.name!r}: {len(rows)} rows with "
      f"{size(rows)} tokens, beside {len(relearn_set.rows)} with {size(relearn_set.rows)}"))


def _row(row: Text, stream: Iterator[str], count: Callable[[str], int]) -> Text:
  """A row with words of a stream in place of its own, in prompt and text as many tokens as there were."""
  prompt, stream = _fit(stream, row.prompt, count) if row.prompt else ("", stream)
  return Text(_fit(stream, row.text, count)[0], row.complete, prompt)


def _fit(stream: Iterator[str], like: str, count: Callable[[str], int]) -> tuple[str, Iterator[str]]:
  """Words of a stream as long as they have at most as many tokens as a text, at least one; and what is left of it."""
  space, budget = like[:len(like) - len(like.lstrip())], count(like)
  found = [next(stream)]
  for word in stream:
    if count(space + " ".join([*found, word])) > budget:
      stream = itertools.chain([word], stream)
      break
    found.append(word)
  return space + " ".join(found), stream


def _gibberish(rows: Sequence[Text], stock: Stock, rng: np.random.Generator) -> Iterator[Iterator[str]]:
  known = stock.free(stock.vocabulary)
  letters = lambda: "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(2, 10))))

  def draw() -> Iterator[str]:
    while True:
      yield known[int(rng.integers(len(known)))] if known else letters()
  return itertools.repeat(draw())


def _unrelated(rows: Sequence[Text], stock: Stock, rng: np.random.Generator) -> Iterator[Iterator[str]]:
  free = [text for text in stock.generic if not stock.forbidden & set(words(text))]
  if not free:
    raise InputError("has 'unrelated', and there is no generic text" + (
        " without the words that are asked for" if stock.generic else ""), field="attack.controls",
        mend="give a source of text in ask.generic, or leave it out")
  order = [free[place] for place in rng.permutation(len(free))]
  for number in itertools.count():  # every row begins with a text of its own
    yield itertools.chain.from_iterable(order[place % len(order)].split()
                                        for place in itertools.count(number % len(order)))


def _names(rows: Sequence[Text]) -> list[str]:
  """Words that are written with a capital letter, and not because a sentence begins there."""
  plain, found = set[str](), dict[str, None]()
  for row in rows:
    every = (row.prompt + row.text).split()
    for before, word in zip(["."] + every, every, strict=False):
      bare = word.strip(MARKS)
      if bare[:1].islower():
        plain.add(bare)
      elif bare[:1].isupper() and len(bare) > 1 and not before.endswith(ENDS):
        found[bare] = None
  return [name for name in found if name.lower() not in plain | FUNCTION_WORDS]


def _same_syntax(rows: Sequence[Text], stock: Stock, rng: np.random.Generator) -> Iterator[Iterator[str]]:
  names = _names(rows)
  is_name = lambda word: word[:1].isupper() and word.isalpha() and word.lower() not in FUNCTION_WORDS
  others = stock.free([word for word in stock.vocabulary or (*GIVEN, *FAMILY) if is_name(word) and word not in names])
  if not names or not others:
    raise InputError("has 'same_syntax', and " + ("the relearn set has no name" if not names else
                     "the vocabulary has no other names"), field="attack.controls", mend="leave it out")
  drawn = [others[place] for place in rng.permutation(len(others))]
  new = {name: drawn[number % len(drawn)] for number, name in enumerate(names)}

  def replaced(word: str) -> str:
    bare = word.strip(MARKS)
    return word.replace(bare, new[bare]) if bare in new else word
  for start in range(len(rows)):  # where other names are shorter, a row goes on with the next one
    following = (rows[(start + more) % len(rows)] for more in itertools.count())
    yield (replaced(word) for row in following for word in (row.prompt + row.text).split())


def _same_topic(rows: Sequence[Text], stock: Stock, rng: np.random.Generator) -> Iterator[Iterator[str]]:
  for row in rows:
    every = (row.prompt + row.text).split()
    content = [word for word in every if (bare := word.strip(MARKS).lower()) and bare not in FUNCTION_WORDS] or every
    yield itertools.cycle([content[place] for place in rng.permutation(len(content))])


_MAKE = {"gibberish": _gibberish, "unrelated": _unrelated, "same_syntax": _same_syntax, "same_topic": _same_topic}
KINDS = tuple(_MAKE)
