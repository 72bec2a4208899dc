"""A hidden name: has a model that read a book, and talk about it, forgotten a character's name?

The text is the sentences of a book, pairs of question and answer, and the sentences of discussions. Those with any of
the given words ("Hermione", "Granger") are D_u2, the others D_u1. All of it is unlearned, the attacker finetunes on
D_u1, and the pairs are asked whose answer holds a word and whose question does not; any of the words is a hit. Hu, Fu,
Wu, Smith, "Unlearning or Obfuscating?", ICLR 2025, section 3, which unlearns by gradient ascent; besides by
relabelling with anchored terms, or by generic logits (Eldan and Russinovich, "Who's Harry Potter?", 2023).

The control memorises D_u1 and the retained text: all that the attacker has, and everything but the name. Where models
begin as a published one, that has often read the book itself; then the control has too, and says by how much.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from relearn_jax.cases.base import About, Arm, Case, Question, RelearnSet, Text, spread_evenly
from relearn_jax.cases.books import read_book, sentences
from relearn_jax.cases.files import Columns, read_texts, texts_of
from relearn_jax.cases.leakage import drop_leaking
from relearn_jax.cases.sources import check_columns_setting, parse_source, read_source, source_input
from relearn_jax.errors import InputError, checker
from relearn_jax.metrics.keyword import contains_keyword, find_keyword

RELEARN_SET = "without_name"
MIN_PROMPT_WORDS = 5  # of a sentence that is asked for its end


@dataclasses.dataclass(frozen=True)
class Piece:
  """A sentence, or a pair of question and answer (which has a prompt), and what it belongs to: a cluster."""

  row: Text
  cluster: str

  @property
  def whole(self) -> str:
    """Prompt and text."""
    return self.row.prompt + self.row.text


def holds(text: str, words: Sequence[str]) -> bool:
  """Whether any of the words stands in a text."""
  return any(contains_keyword(text, word) for word in words)


def pair_questions(pieces: Sequence[Piece], words: Sequence[str]) -> list[Question]:
  """The pairs whose answer holds a word and whose question does not."""
  return [Question(f"pair{number}", piece.row.prompt, piece.row.text, tuple(words), piece.cluster,
                   stop=("Question:",), line=piece.row.line)
          for number, piece in enumerate(pieces, 1) if piece.row.prompt
          and holds(piece.row.text, words) and not holds(piece.row.prompt, words)]


def cloze_questions(pieces: Sequence[Piece], words: Sequence[str]) -> list[Question]:
  """The sentences in which a word stands after some others, up to that word."""
  found = []
  for number, piece in enumerate(pieces, 1):
    places = [start for word in words for start, _ in find_keyword(piece.row.text, word)]
    front = piece.row.text[:min(places, default=0)].rstrip()
    if not piece.row.prompt and len(front.split()) >= MIN_PROMPT_WORDS:
      found.append(Question(f"sentence{number}", front, piece.row.text[len(front):], tuple(words), piece.cluster))
  return found


@dataclasses.dataclass(frozen=True)
class Split:
  """How the text is divided.

  Attributes:
    without: what of the text to be forgotten holds no word, D_u1.
    retain: the retained rows that hold none.
    questions: those that are asked.
    relearn_set: what of D_u1 passes the leakage check.
  """

  without: tuple[Text, ...]
  retain: tuple[Text, ...]
  questions: tuple[Question, ...]
  relearn_set: RelearnSet


@functools.lru_cache(maxsize=8)  # every chain of an audit has the same rows
def split_pieces(pieces: tuple[Piece, ...], retain: tuple[Text, ...], words: tuple[str, ...], most: int) -> Split:
  """Divides the text by the words; see `name_case`."""
  every = pair_questions(pieces, words) or cloze_questions(pieces, words)
  asked = spread_evenly(every, most)
  kept = tuple(row for row in retain if not holds(row.prompt + row.text, words))
  forget = tuple(piece.row for piece in pieces)
  without = tuple(piece.row for piece in pieces if not holds(piece.whole, words))
  whole_set = RelearnSet(RELEARN_SET, without, "", tuple(range(1, len(without) + 1)))
  found = drop_leaking(Case("", "", (), forget, kept, (whole_set,), tuple(every), words))
  left_out = len(without) - len(found.rows)
  more = f"; {left_out} with something like one were left out" if left_out else ""
  return Split(without, kept, tuple(asked), dataclasses.replace(found, lines=(), provenance=(
      f"{len(found.rows)} of the {len(without)} sentences and pairs without {' or '.join(words)}, of the {len(pieces)} "
      f"to be forgotten{more}")))


def name_case(name: str, pieces: Sequence[Piece], retain: Sequence[Text], words: Sequence[str],
              anchors: Mapping[str, str], most: int, arm: Arm, files: Mapping[str, pathlib.Path] | None = None) -> Case:
  """The case of some text.

  Args:
    name: as it stands in every row of the results.
    pieces: what is forgotten.
    retain: what is not; rows that hold a word are left out.
    words: any of them is a hit.
    anchors: terms -> generic terms, the words among them.
    most: questions, evenly spread over those that there are.
    arm: U memorises everything, N what holds none of the words.
    files: of the data sets, for messages.

  Raises:
    InputError: nothing can be asked, or nothing of D_u1 or of the retained text is without a word.
  """
  files = files or {}
  split = split_pieces(tuple(pieces), tuple(retain), tuple(words), most)
  if not split.questions:
    raise InputError(f"has no pair whose answer holds one of {', '.join(words)} and whose question does not, nor a "
                     f"sentence with one after {MIN_PROMPT_WORDS} words", file=files.get("forget"), field="case.words",
                     mend="give words of the text")
  for field, of, rows in (("book", "forget", split.relearn_set.rows), ("retain", "retain", split.retain)):
    if not rows:
      raise InputError(f"has nothing without {' or '.join(words)}", file=files.get(of), field=f"case.{field}",
                       mend="give more text, or fewer words")
  forget = tuple(piece.row for piece in pieces)
  learned = forget if arm == "U" else split.without
  return Case(
      name=name, variant=variant_name(words), memorize=(*learned, *split.retain), forget=forget, retain=split.retain,
      relearn_sets=(split.relearn_set,), questions=split.questions, secrets=tuple(words),
      anchors=tuple(anchors.items()), files=files)


def variant_name(words: Sequence[str]) -> str:
  """What the one variant is called: the words."""
  return "/".join(words)


def about_name(words: Sequence[str]) -> About:
  """What a report says."""
  return About("name hidden", story=(
      f"The text of a book and talk about it were unlearned, and the name ({' or '.join(words)}) is asked for. The "
      "attack finetunes on the sentences and pairs in which neither stands. If the name comes back in the unlearned "
      "model, more than in a model that learned everything but the sentences with the name, it had only been "
      "suppressed. Published for Llama-2-7b and gradient ascent as a heat map only: above 70 % at shallow unlearning."))


def check_words(words: Sequence[str], anchors: object, where: str) -> None:
  """Refuses an empty list of words, and a word without an anchor, or with one that is a hidden word itself."""
  need = checker(where, "case.")
  need(bool(words) and not isinstance(words, str) and all(isinstance(word, str) and word.strip() for word in words),
       "words", words, 'expected words, such as ("Hermione", "Granger")')
  generic = check_columns_setting(anchors, where, "case.anchors")
  for word in words:
    need(word in generic and not holds(generic[word], words), "anchors", generic,
         f"expected a generic term for {word!r}, and none that gives the name away")


@dataclasses.dataclass
class WhpNameConfig:
  """The case on a book of one's own.

  Attributes:
    book: source of rows `{"text"}`, such as a text file; see `sources` and `books.read_book`.
    pairs: source of rows `{"question", "answer"}`; "": the ends of sentences are asked for.
    discussions: source of rows `{"text"}`; "": there are none.
    retain: source of what is kept: rows `{"text"}` or `{"prompt", "answer"}`.
    columns: of `retain`; see `files.FilesConfig`.
    words: the name; any of them is a hit.
    anchors: term -> generic term, for relabelling; of every word, and of other terms of the book.
    most_questions: evenly spread over those that there are.
  """

  book: str = ""
  pairs: str = ""
  discussions: str = ""
  retain: str = ""
  columns: object = dataclasses.field(default_factory=dict)  # dict[str, str], which flags could not set
  words: tuple[str, ...] = ("Hermione", "Granger")
  anchors: object = dataclasses.field(default_factory=lambda: {"Hermione": "Sarah", "Granger": "Miller"})
  most_questions: int = 100

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "whp-name"

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (variant_name(self.words),)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `name_case`; clusters are chapters, and all pairs and discussions of a `subject`, where rows have one."""
    columns: Columns = check_columns_setting(self.columns, self.name, "case.columns")
    pieces = [Piece(Text(sentence, complete=False), f"chapter{number}")
              for number, chapter in enumerate(read_book(self.book), 1) for sentence in sentences(chapter)]
    if self.pairs:
      for row in read_source(self.pairs, fields={"question": str, "answer": str}):
        pieces.append(Piece(Text(f" {row['answer']}", prompt=f"Question: {row['question']}\nAnswer:", line=row.line),
                            str(row.get("subject", f"pair{row.line}"))))
    if self.discussions:
      pieces += [Piece(Text(sentence, complete=False), str(row.get("subject", f"discussion{row.line}")))
                 for row in read_source(self.discussions, fields={"text": str}) for sentence in sentences(row["text"])]
    files = {field: parse_source(source).path for field, source in (
        ("forget", self.book), ("memorize", self.book), ("questions", self.pairs or self.book),
        (RELEARN_SET, self.book), ("retain", self.retain))}
    anchors = check_columns_setting(self.anchors, self.name, "case.anchors")
    return name_case(self.name, pieces, texts_of(read_texts(self.retain, columns)), self.words, anchors,
                     self.most_questions, arm, files)

  def check(self, where: str) -> None:
    """Book and retained text are given, and the rest is what it may be."""
    need = checker(where, "case.")
    need(bool(self.book), "book", self.book, "give a source, such as file:book.txt")
    need(bool(self.retain), "retain", self.retain, "give a source of text that is to be kept")
    need(self.most_questions >= 1, "most_questions", self.most_questions, "expected at least 1")
    check_columns_setting(self.columns, where, "case.columns")
    check_words(self.words, self.anchors, where)

  def about(self) -> About:
    """See `about_name`."""
    return about_name(self.words)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """All sources that are given."""
    named = {field: getattr(self, field) for field in ("book", "pairs", "discussions", "retain")}
    return {field: source_input(source) for field, source in named.items() if source}

  def vocabulary(self) -> Sequence[str]:
    """No model is pretrained for it."""
    raise InputError("has no words of its own to pretrain a model with", field="case",
                     mend="give arms.start or arms.unlearned, a checkpoint; or take the embedded novel")

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """See `vocabulary`."""
    raise AssertionError("no vocabulary, no texts")
