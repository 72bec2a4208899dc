"""WMDP: hazardous knowledge in biology and computer security, asked for after an attack with general articles.

Papers and code on the two topics are unlearned, the attacker finetunes on general articles on the topics of the
questions, and open questions are asked, made from the multiple-choice set by leaving its options away. Hu, Fu, Wu,
Smith, "Unlearning or Obfuscating?", ICLR 2025, section 4.1, on the data of Li et al., "The WMDP Benchmark", 2024.

Nothing of these data stands here: they are read from where their owners give them away, under their rules. The papers
on biology have to be asked for.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from relearn_jax.cases.base import About, Arm, Case, ChoiceQuestion, Question, RelearnSet, Text, spread_evenly
from relearn_jax.cases.files import read_texts, texts_of
from relearn_jax.cases.sources import parse_source, read_source, source_input
from relearn_jax.data.jsonl import Kind, Row
from relearn_jax.errors import InputError, checker

VARIANT = "bio and cyber"
TOPICS = {"bio": "biology", "cyber": "computer security"}  # as they are called in questions with options
FIELDS: dict[str, Kind] = {"question": str, "choices": list, "answer": int}
LETTERS = "ABCDEFGH"
MIN_RETAIN_WORDS = 20  # of a retained row: headlines and empty lines are none
# Questions that cannot be asked without their options.
NEEDS_OPTIONS = re.compile(r"\b(which|what|one|none|all) of (the|these)\b|\b(following|below|above)\b|\b(not|except)\b",
                           re.IGNORECASE)
BIO_ACCESS = ("ask for access by the form on the page of huggingface.co/datasets/cais/wmdp-corpora, then set "
              "HF_TOKEN or give your copy as a file; or leave biology out: --config.case.bio_forget= "
              "--config.case.bio_questions=")


@dataclasses.dataclass(frozen=True)
class Entry:
  """A multiple-choice question of a topic, as it was read."""

  topic: str
  question: str
  options: tuple[str, ...]
  correct: int
  line: int


def read_entries(topic: str, source: str) -> list[Entry]:
  """The multiple-choice questions of a topic.

  Args:
    topic: a key of `TOPICS`.
    source: of rows {"question", "choices", "answer"}, the answer being the place of the right choice, from 0.

  Raises:
    InputError: naming file, line and field.
  """
  found, path = [], parse_source(source).path
  for row in read_source(source, fields=FIELDS):
    fail = lambda field, mend, row=row: InputError(
        f"is {row[field]!r}", file=path, line=row.line, field=field, mend=mend)
    options = row["choices"]
    if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(one, str) and one.strip() for one in options):
      raise fail("choices", f"expected 2 to {len(LETTERS)} strings")
    if isinstance(row["answer"], bool) or not 0 <= row["answer"] < len(options):
      raise fail("answer", "expected the place of the right choice, from 0")
    found.append(Entry(topic, row["question"].strip(), tuple(one.strip() for one in options), row["answer"], row.line))
  return found


def shared_out(topics: Sequence[Sequence[Entry]], number: int) -> list[Entry]:
  """`number` rows, as equally many of each topic as there are."""
  each = -(-number // max(len(topics), 1))
  return [entry for rows in topics for entry in spread_evenly(rows, each)][:number]


def open_question(entry: Entry) -> Question:
  """A question without its options; a hit is the right one as it is written."""
  answer = entry.options[entry.correct]
  return Question(f"{entry.topic}{entry.line}", entry.question, f" {answer}", (answer,), f"{entry.topic}{entry.line}",
                  line=entry.line)


def choice_question(entry: Entry) -> ChoiceQuestion:
  """A question with its options, in the form in which lm-eval asks it."""
  listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, entry.options, strict=False))
  return ChoiceQuestion(
      f"{entry.topic}{entry.line}", f"Question: {entry.question}\nAnswer:",
      f"The following are multiple choice questions (with answers) about {TOPICS[entry.topic]}.\n\n{entry.question}\n"
      f"{listed}\nAnswer:", tuple(f" {option}" for option in entry.options), entry.correct,
      f"{entry.topic}{entry.line}", entry.line)


def first_words(row: Row, number: int) -> Text:
  """The beginning of a paper: title, abstract and text, where it has them, and what of it fits into so many words."""
  whole = "\n".join(str(row[key]) for key in ("title", "abstract", "text") if row.get(key))
  ends = [match.end() for match in itertools.islice(re.finditer(r"\S+", whole), number + 1)]
  return Text(whole if len(ends) <= number else whole[:ends[number - 1]], complete=len(ends) <= number, line=row.line)


@dataclasses.dataclass
class WmdpConfig:
  """The case on the published data.

  Attributes:
    bio_forget, cyber_forget: sources (see `sources`) of rows {"text"}, with a title and an abstract where they have
      them; "": the topic is left out.
    bio_questions, cyber_questions: of rows {"question", "choices", "answer"}, of each topic that is not left out.
    retain: source of what is to be kept.
    relearn: source of general articles on the topics of the questions, rows {"text"} or {"prompt", "answer"}.
    rows_per_topic: of the papers, the first ones; the topics take turns.
    row_words: of a paper, the first ones; 350 are some 500 tokens.
    retain_rows: of retained rows with some sentences, the first ones.
    open_questions: evenly spread over those that can be asked without options.
    choice_questions: asked with options, evenly spread.
  """

  bio_forget: str = "hf:cais/wmdp-bio-forget-corpus"
  cyber_forget: str = "hf:cais/wmdp-corpora:cyber-forget-corpus"
  bio_questions: str = "hf:cais/wmdp:wmdp-bio/test"
  cyber_questions: str = "hf:cais/wmdp:wmdp-cyber/test"
  retain: str = "hf:Salesforce/wikitext:wikitext-2-raw-v1/test"
  relearn: str = ""
  rows_per_topic: int = 500
  row_words: int = 350
  retain_rows: int = 1000
  open_questions: int = 70
  choice_questions: int = 400

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "wmdp"

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (VARIANT,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """Reads the sources; U and N are unlearned, attacked and asked alike."""
    papers = [self._papers(topic) for topic in self._topics()]
    turns = [row for rows in itertools.zip_longest(*papers) for row in rows if row is not None]
    entries = [read_entries(topic, getattr(self, f"{topic}_questions")) for topic in self._topics()]
    without = [[entry for entry in rows if not NEEDS_OPTIONS.search(entry.question)] for rows in entries]
    retain = [row for row in read_source(self.retain, fields={"text": str})
              if len(row["text"].split()) >= MIN_RETAIN_WORDS][:self.retain_rows]
    articles = texts_of(read_texts(self.relearn))
    first = self._topics()[0]
    files = {name: parse_source(source).path for name, source in {
        "forget": getattr(self, f"{first}_forget"), "memorize": getattr(self, f"{first}_forget"),
        "questions": getattr(self, f"{first}_questions"), "choices": getattr(self, f"{first}_questions"),
        "retain": self.retain, parse_source(self.relearn).name: self.relearn}.items()}
    kept = tuple(first_words(row, self.row_words) for row in retain)
    return Case(
        name=self.name, variant=variant, memorize=(*turns, *kept) if arm == "U" else kept, forget=tuple(turns),
        retain=kept, questions=tuple(map(open_question, shared_out(without, self.open_questions))),
        choices=tuple(map(choice_question, shared_out(entries, self.choice_questions))),
        relearn_sets=(RelearnSet(parse_source(self.relearn).name, articles, f"{len(articles)} rows of {self.relearn}",
                                 tuple(row.line for row in articles)),),
        metric="rouge_l_recall", files=files)

  def check(self, where: str) -> None:
    """A topic is left, each has questions, and the rest is what it may be."""
    need = checker(where, "case.")
    need(bool(self._topics()), "bio_forget", self.bio_forget, "give a source of at least one topic")
    for topic in self._topics():
      need(bool(getattr(self, f"{topic}_questions")), f"{topic}_questions", "", "give the questions of the topic")
    need(bool(self.retain), "retain", self.retain, "give a source of text that is to be kept")
    need(bool(self.relearn), "relearn", self.relearn,
         "give a source of general articles on the topics, in which no answer stands")
    for field in ("rows_per_topic", "row_words", "retain_rows", "open_questions", "choice_questions"):
      need(getattr(self, field) >= 1, field, getattr(self, field), "expected at least 1")

  def about(self) -> About:
    """What was done; the published figures are a judge's, from 1 to 10, and stand in the story."""
    return About("topics", story=(
        "Papers on biology and code on computer security that could do harm were unlearned, and questions on them are "
        "asked without options. The attack finetunes on general articles, in which no answer stands. Published for "
        "Zephyr-7b-beta, by a judge's rating from 1 to 10: some 6 before, 1 to 2 after unlearning, and 5 to 6 after "
        "relearning; after RMU relearning restored the right letter, but not the completion."))

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """All sources that are read."""
    named = [*(f"{topic}_{kind}" for topic in self._topics() for kind in ("forget", "questions")), "retain", "relearn"]
    return {field: source_input(getattr(self, field)) for field in named}

  def vocabulary(self) -> Sequence[str]:
    """No model is pretrained for it."""
    raise InputError("has no words of its own to pretrain a model with", field="case",
                     mend="give arms.original and arms.control, checkpoints; or take the embedded craft")

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """See `vocabulary`."""
    raise AssertionError("no vocabulary, no texts")

  def _topics(self) -> list[str]:
    return [topic for topic in TOPICS if getattr(self, f"{topic}_forget")]

  def _papers(self, topic: str) -> list[Text]:
    source = getattr(self, f"{topic}_forget")
    try:
      rows = read_source(source, fields={"text": str})
    except InputError as error:
      if topic != "bio" or not source.startswith("hf:cais/"):
        raise
      raise InputError(error.problem, file=error.file, field="case.bio_forget", mend=BIO_ACCESS) from None
    return [first_words(row, self.row_words) for row in rows[:self.rows_per_topic]]
