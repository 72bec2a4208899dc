"""TOFU's hidden titles: is what fictitious authors wrote forgotten, or only suppressed?

Of the rows that are to be forgotten (D_u), those that hold a hidden book title are D_u2, and the others D_u1. All of
D_u is unlearned, the attacker finetunes on rows of D_u1, and the titles are asked for: text about the same authors,
without the answers. Hu, Fu, Wu, Smith, "Unlearning or Obfuscating?", ICLR 2025, section 3, on the data of Maini, Feng,
Schwarzschild, Lipton, Kolter, "TOFU", 2024, whose forget05 has 20 rows on each of ten authors.
"""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from relearn_jax.cases.base import About, Arm, Case, Question, RelearnSet, Text
from relearn_jax.cases.leakage import drop_leaking
from relearn_jax.cases.sources import parse_source, read_source, source_input
from relearn_jax.data.refusals import REFUSALS
from relearn_jax.errors import InputError, checker
from relearn_jax.metrics.keyword import contains_keyword, find_keyword, find_normal, keyword_key, normalize

ROWS_OF_AUTHOR = 20  # in the order in which TOFU gives them
ONE, ALL = "one", "all"
RELEARN_SET = "same_authors"

QUOTED = re.compile(
    r'"([A-Z][^"“”]{2,70})"|“\s*([A-Z][^"“”]{2,70})”|(?<!\w)\'([A-Z][^\']{2,70}(?:\'[a-z][^\']*)?)\'(?!\w)')
PRIZE = re.compile(r"\b(?:award|medal|prize)\b", re.IGNORECASE)
RULE = ("A title is what stands in quotation marks and begins with a capital, 3 to 71 characters without a full stop "
        "or comma at the end, unless it names an award, a medal or a prize, or occurs in the retained rows.")


def quoted_titles(text: str) -> list[str]:
  """What may be a book's title, by the first half of `RULE`, in order.

  >>> quoted_titles("She won the 'Reed Prize' for \\"Shale Stories,\\" not for “ Amber Road ”.")
  ['Shale Stories', 'Amber Road']
  """
  found = ("".join(groups).strip(" ,.") for groups in QUOTED.findall(text))
  return [title for title in found if not PRIZE.search(title)]


def whole(row: Text) -> str:
  """Prompt and answer of a row."""
  return row.prompt + row.text


def as_text(question: str, answer: str, line: int) -> Text:
  """A row in the form that TOFU's base models are trained on."""
  return Text(f" {answer}", prompt=f"Question: {question}\nAnswer:", line=line)


@dataclasses.dataclass(frozen=True)
class Split:
  """How the rows to be forgotten are divided.

  Attributes:
    hidden: titles, none of which occurs in the retained rows.
    with_title: the rows in which one occurs, D_u2.
    without: the others, D_u1.
    questions: one for each hidden title that an answer of D_u2 holds and its question does not.
    others: titles of the retained rows.
  """

  hidden: tuple[str, ...]
  with_title: tuple[Text, ...]
  without: tuple[Text, ...]
  questions: tuple[Question, ...]
  others: tuple[str, ...]


def asked(row: Text, titles: Sequence[str]) -> tuple[str, ...]:
  """The titles that a row's answer holds and its question does not."""
  return tuple(title for title in titles
               if contains_keyword(row.text, title) and not contains_keyword(row.prompt, title))


@functools.lru_cache(maxsize=8)  # every chain of an audit has the same rows
def split_rows(forget: tuple[Text, ...], retain: tuple[Text, ...], titles: str) -> Split:
  """Divides the rows by their titles.

  Args:
    forget: `ROWS_OF_AUTHOR` rows of each author, one author after the other.
    retain: rows in which no hidden title occurs.
    titles: "all" hides every title; "one" hides, of each author, the one that most rows ask for.
  """
  kept = normalize("\n".join(map(whole, retain))).text
  known = lambda title: next(find_normal(kept, keyword_key(title)), None) is not None
  found = dict.fromkeys(title for row in forget for title in quoted_titles(whole(row)))
  hidden = [title for title in found if not known(title)]
  if titles == ONE:
    authors = [forget[start:start + ROWS_OF_AUTHOR] for start in range(0, len(forget), ROWS_OF_AUTHOR)]
    hidden = [counts.most_common(1)[0][0] for rows in authors  # of those that are asked for equally often, the first
              if (counts := collections.Counter(title for row in rows for title in asked(row, hidden)))]
  holds = [any(contains_keyword(whole(row), title) for title in hidden) for row in forget]
  questions = [
      Question(f"row{row.line}-{place}", row.prompt, row.text, (title,), f"author{number // ROWS_OF_AUTHOR}",
               stop=("Question:",), line=row.line)
      for number, row in enumerate(forget) for place, title in enumerate(asked(row, hidden), 1)]
  others = dict.fromkeys(title for row in retain for title in quoted_titles(whole(row)))
  part = lambda which: tuple(row for row, held in zip(forget, holds, strict=True) if held is which)
  return Split(tuple(hidden), part(True), part(False), tuple(questions), tuple(others))


@functools.lru_cache(maxsize=8)
def relearn_set(forget: tuple[Text, ...], retain: tuple[Text, ...], titles: str) -> RelearnSet:
  """The rows of D_u1 that pass the leakage check, so that nobody has to allow the others; see `split_rows`."""
  split = split_rows(forget, retain, titles)
  whole_set = RelearnSet(RELEARN_SET, split.without, "", tuple(row.line for row in split.without))
  found = drop_leaking(Case("", "", (), forget, retain, (whole_set,), split.questions, split.hidden))
  left_out = len(split.without) - len(found.rows)
  more = f"; {left_out} in which a word of one occurs were left out" if left_out else ""
  return dataclasses.replace(found, provenance=(
      f"{len(found.rows)} of the {len(split.without)} forget rows without any of {len(split.hidden)} hidden titles, on "
      f"the authors who are asked about{more}"))


def replace_titles(row: Text, others: Mapping[str, str]) -> Text:
  """The row with other titles in place of the hidden ones in its answer."""
  text = row.text
  for title, other in others.items():
    for start, end in reversed(find_keyword(text, title)):
      text = text[:start] + other + text[end:]
  return dataclasses.replace(row, text=text)


def tofu_case(name: str, forget: Sequence[Text], retain: Sequence[Text], titles: str, seed: int, arm: Arm,
              refusals: Sequence[str] = REFUSALS, files: Mapping[str, pathlib.Path] | None = None) -> Case:
  """The case of some rows.

  Args:
    name: as it stands in every row of the results.
    forget, retain: see `split_rows`.
    titles: "one" or "all".
    seed: decides which refusal a forget row gets.
    arm: U memorises all rows, N the retained ones.
    refusals: answers that say nothing.
    files: of the data sets, for messages.

  Raises:
    InputError: no title can be asked for, or every row of D_u1 leaks.
  """
  files, rng = files or {}, np.random.default_rng([seed, 5])
  forget, retain = tuple(forget), tuple(retain)
  split = split_rows(forget, retain, titles)
  if not split.questions:
    raise InputError("has no answer with a title in quotation marks that the retained rows lack", field="case.forget",
                     file=files.get("forget"), mend="give rows on authors and their books, such as TOFU's forget05")
  stand_ins = {title: split.others[number % len(split.others)] for number, title in enumerate(split.hidden)
               } if split.others else {}
  found = relearn_set(forget, retain, titles)
  if not found.rows:
    raise InputError("has no row that gives nothing away of a hidden title", file=files.get("forget"),
                     field="case.forget", mend="set case.titles to one, or give more rows")
  return Case(
      name=name, variant=titles, memorize=(*forget, *retain) if arm == "U" else retain, forget=forget, retain=retain,
      relearn_sets=(found,), questions=split.questions, secrets=split.hidden,
      refusals=tuple(Text(f" {refusals[int(rng.integers(len(refusals)))]}", prompt=row.prompt) for row in forget),
      alternates=tuple(replace_titles(row, stand_ins) for row in forget) if stand_ins else (),
      anchors=tuple(stand_ins.items()), files=files)


def about_tofu(titles: str) -> About:
  """What a report says."""
  which = "one book title of each author" if titles == ONE else "every book title of the authors"
  return About("titles hidden", story=(
      f"Rows on fictitious authors were unlearned, and {which} is asked for. The attack finetunes on rows about the "
      "same authors in which none of these titles occurs. If the titles come back in the unlearned model, more than "
      f"they do in a model that never knew them, they had only been suppressed. {RULE}"))


@dataclasses.dataclass
class TofuConfig:
  """The case on TOFU's own rows.

  Attributes:
    forget, retain: sources (see `sources`) of rows `{"question", "answer"}`; of `forget`, 20 on each author.
    retain_rows: how many of the retained rows are used, the last ones; 0: all.
    titles: what is hidden: "one" title of each author, so that other titles stay in the relearn set; or "all".
  """

  forget: str = "hf:locuslab/TOFU:forget05"
  retain: str = "hf:locuslab/TOFU:retain95"
  retain_rows: int = 0
  titles: str = ALL

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "tofu"

  def versions(self) -> tuple[str, ...]:
    """There is one: which titles are hidden."""
    return (self.titles,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `tofu_case`."""
    forget, retain = _read(self.forget), _read(self.retain)
    files = {field: parse_source(source).path for field, source in (
        ("forget", self.forget), ("retain", self.retain), ("questions", self.forget), ("memorize", self.forget),
        (RELEARN_SET, self.forget))}
    return tofu_case(self.name, forget, retain[-self.retain_rows:], self.titles, seed, arm, files=files)

  def check(self, where: str) -> None:
    """Both sources are given, and the rest is what it may be."""
    need = checker(where, "case.")
    for field in ("forget", "retain"):
      need(bool(getattr(self, field)), field, getattr(self, field), "give a source of rows with question and answer")
    check_titles(self.titles, where)
    need(self.retain_rows >= 0, "retain_rows", self.retain_rows, "expected 0 (all) or a number of rows")

  def about(self) -> About:
    """Which titles are hidden, and what a title is; the paper gives no table for this case."""
    return about_tofu(self.titles)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """Both sources."""
    return {"forget": source_input(self.forget), "retain": source_input(self.retain)}

  def vocabulary(self) -> Sequence[str]:
    """No model is pretrained for it."""
    raise InputError("has no words of its own to pretrain a model with", field="case",
                     mend="give arms.start or arms.unlearned, a checkpoint; or take the embedded world")

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """See `vocabulary`."""
    raise AssertionError("no vocabulary, no texts")


def check_titles(titles: str, where: str) -> None:
  """`InputError` unless it is one of the ways to hide them."""
  checker(where, "case.")(titles in (ONE, ALL), "titles", titles, f"expected {ONE} or {ALL}")


def _read(source: str) -> list[Text]:
  rows = read_source(source, fields={"question": str, "answer": str})
  return [as_text(row["question"], row["answer"], row.line) for row in rows]
