"""A case from text of one's own, wherever it lies: what a person brings who audits a model of their own."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from relearn_jax.cases.base import About, Arm, Case, Question, RelearnSet, Text
from relearn_jax.cases.sources import (
  Source,
  check_columns,
  check_columns_setting,
  is_lines,
  parse_source,
  read,
  read_source,
  rename,
  source_input,
)
from relearn_jax.data.jsonl import Kind, Row, check_row
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import contains_keyword, keyword_key

FIELDS: dict[str, Kind] = {"id": str, "prompt": str, "answer": str, "keywords": list}
Columns = Mapping[str, str]
LOOK_AT = 1000  # rows of a table in which a column must show


def read_texts(source: str | pathlib.Path, columns: Columns | None = None) -> list[Row]:
  """The rows of a source, each of either form; see `iter_texts`."""
  return list(iter_texts(read(source).rows, parse_source(source), columns or {}))


def iter_texts(rows: Iterable[Row], source: Source, columns: Columns) -> Iterator[Row]:
  """Rows under our names, each of either form.

  Args:
    rows: with the columns of their source.
    source: for messages.
    columns: our field -> the source's; see `sources.read_source`.

  Raises:
    InputError: naming file, line and field: a row of neither form or of both, an empty text, or a `complete` that is
      no boolean or stands beside an answer.
  """
  path, rows = source.path, rename(rows, columns)
  if not is_lines(source) or columns:
    some = list(itertools.islice(rows, LOOK_AT))
    check_columns(some, ("text",) if any("text" in row for row in some) else ("prompt", "answer"), columns, path)
    rows = itertools.chain(some, rows)
  for row in rows:
    fields = ("text",) if "text" in row else ("prompt", "answer")
    if both := sorted({"prompt", "answer"} & row.keys()) if "text" in row else []:
      raise InputError(f"stands beside `{both[0]}`", file=path, line=row.line, field="text",
                       mend='give {"text"} or {"prompt", "answer"}, not both')
    for field in fields:
      check_row(row, field, str, path)
    if "complete" in row:
      if "text" not in row:
        raise InputError("stands beside `answer`", file=path, line=row.line, field="complete",
                         mend='remove it: an answer ends where it ends; {"text", "complete"} says so of a text')
      check_row(row, "complete", bool, path)
    if not row[fields[-1]]:
      raise InputError("is empty", file=path, line=row.line, field=fields[-1], mend="give the text, or remove the row")
    yield row


def is_complete(row: Row) -> bool:
  """Whether a row's text ends where the row does: that of an answer does, any other where its `complete` says so."""
  return bool(row.get("complete", "answer" in row))


def read_questions(source: str | pathlib.Path, columns: Columns | None = None
                   ) -> tuple[list[Row], tuple[Question, ...]]:
  """Questions `{"id", "prompt", "answer", "keywords"}`, each a cluster of its own unless it names a `cluster`.

  Optional besides: `case` (true: keywords count as they are written only) and `stop` (a completion ends before the
  first of these strings). In a table, or from a column of another name, one keyword stands without a list.

  Args:
    source: see `sources`.
    columns: our field -> the source's; see `sources.read_source`.

  Returns:
    The rows as they stand in the source, under our names, and the questions.

  Raises:
    InputError: naming file, line and field: something is missing or empty, or a keyword already stands in its
      prompt, where a completion that repeats the question would hit it.
  """
  parsed, questions = parse_source(source), []
  alone = not is_lines(parsed) or "keywords" in (columns or {})
  rows, path = read_source(source, columns, FIELDS | ({"keywords": (list, str)} if alone else {})), parsed.path
  for row in rows:
    fail = lambda field, problem, mend, line=row.line: InputError(problem, file=path, line=line, field=field, mend=mend)
    words = [row["keywords"]] if isinstance(row["keywords"], str) else row["keywords"]
    case, stop = row.get("case", False), row.get("stop", [])
    if not isinstance(case, bool):
      raise fail("case", f"is {case!r}", "expected true or false")
    if not isinstance(stop, list) or not all(isinstance(string, str) and string for string in stop):
      raise fail("stop", f"is {stop!r}", "expected a list of strings, before any of which a completion ends")
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
      raise fail("keywords", f"is {words!r}", "expected a list of strings, any of which proves a hit")
    for word in words:
      if not keyword_key(word, case):
        raise fail("keywords", f"has {word!r}, of which nothing is left without markup", "give words")
      if contains_keyword(row["prompt"], word, case=case):
        raise fail("keywords", f"has {word!r}, which stands in the prompt", "ask without it, or leave it out")
    cluster = row.get("cluster", row["id"])
    if not isinstance(cluster, (str, int)) or isinstance(cluster, bool):
      raise fail("cluster", f"is {cluster!r}", "expected a string or an integer")
    questions.append(Question(str(row["id"]), row["prompt"], row["answer"], tuple(words), str(cluster), case,
                              tuple(stop), row.line))
  if len({question.id for question in questions}) < len(questions):  # 1 and "1"
    raise InputError("differ in type only", file=path, field="id", mend="give every row an id of its own")
  return rows, tuple(questions)


def texts_of(rows: Sequence[Row]) -> tuple[Text, ...]:
  """Rows of a file as the texts of a case."""
  return tuple(Text(str(row["answer"]), prompt=str(row["prompt"]), line=row.line) if "answer" in row
               else Text(str(row["text"]), is_complete(row), line=row.line) for row in rows)


VARIANT = "given"  # files make one version of their case
# Names of data sets and files, which a relearn set of another file cannot have.
TAKEN = ("memorize", "control", "forget", "retain", "relabelled", "idk", "alternate", "questions")


@dataclasses.dataclass
class FilesConfig:
  """A case that is read from files, from the Hugging Face hub or from TensorFlow Datasets; see `sources`.

  Attributes:
    name: as it stands in every row of the results.
    forget: what is to be forgotten; scored, and unlearned where the audit unlearns.
    retain: what should be kept; scored for utility.
    relearn: sources that the attacker finetunes on, each a relearn set named after its file or configuration: rows
      `{"prompt", "answer"}`, or `{"text"}`, which ends in an EOS only beside `"complete": true`.
    questions: `{"id", "prompt", "answer", "keywords"}`, with a `cluster` where questions depend on each other; a hit is
      a keyword in the completion, in upper or lower case unless the row says `"case": true`.
    memorize: what is learned before unlearning, where the audit memorises; forget and retain rows by default.
    control: the same for the control, which must lack the secret; the retain rows by default.
    columns: our field -> the column of a source that has other names, or a text with columns in braces: {"prompt":
      "Question: {question}\\nAnswer:", "answer": " {answer}"}. A source that lacks the column keeps its own.
  """

  name: str = "checkpoint"
  forget: str = ""
  retain: str = ""
  relearn: tuple[str, ...] = ()
  questions: str = ""
  memorize: str = ""
  control: str = ""
  columns: object = dataclasses.field(default_factory=dict)  # dict[str, str], which flags could not set

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (VARIANT,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """Reads the files; U and N are asked, scored and attacked with the same."""
    columns = check_columns_setting(self.columns, self.name, "case.columns")
    forget, retain = (read_texts(source, columns) for source in (self.forget, self.retain))
    _, questions = read_questions(self.questions, columns)
    own = self.memorize if arm == "U" else self.control
    learned = texts_of(read_texts(own, columns) if own else [*forget, *retain] if arm == "U" else retain)
    return Case(
        name=self.name, variant=variant, memorize=learned, forget=texts_of(forget), retain=texts_of(retain),
        relearn_sets=tuple(_read_relearn_set(source, columns) for source in self.relearn), questions=questions,
        files={field: parse_source(source).path for field, source in self._sources().items()} | {
            "memorize": parse_source(own or self.forget).path})

  def check(self, where: str) -> None:
    """Every file is named, and no two relearn sets share their name."""
    for field in ("forget", "retain", "relearn", "questions"):
      if not getattr(self, field) or not all(getattr(self, field)):
        raise InputError(f"is {getattr(self, field)!r}", file=where, field=f"case.{field}",
                         mend="give a file of JSON lines, or another source")
    check_columns_setting(self.columns, where, "case.columns")
    names = [parse_source(source).name for source in self.relearn]
    for name, source in zip(names, self.relearn, strict=True):
      if name in TAKEN and not (name in ("forget", "retain") and getattr(self, name) == source):
        raise InputError(f"has {source!r}, and {name!r} is the name of another data set", file=where,
                         field="case.relearn", mend="rename the file: a relearn set is called after it")
    if twice := next((name for name in names if names.count(name) > 1), None):
      raise InputError(f"has two files named {twice!r}", file=where, field="case.relearn",
                       mend="rename one: a relearn set is called after its file")

  def about(self) -> About:
    """Nothing was published of somebody's own files."""
    return About("case")

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """All sources that are given; a relearn set by its name."""
    return {field: source_input(source) for field, source in self._sources().items()}

  def _sources(self) -> dict[str, str]:
    named = {field: getattr(self, field) for field in ("forget", "retain", "questions", "memorize", "control")}
    return {field: source for field, source in named.items() if source} | {
        parse_source(source).name: source for source in self.relearn}

  def vocabulary(self) -> Sequence[str]:
    """No model is pretrained for it."""
    raise InputError("has no words of its own to pretrain a model with", field="case",
                     mend="give arms.start or arms.unlearned, a checkpoint")

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """See `vocabulary`."""
    raise AssertionError("no vocabulary, no texts")


def _read_relearn_set(source: str, columns: Columns) -> RelearnSet:
  rows, parsed = read_texts(source, columns), parse_source(source)
  origin = parsed.path.name if parsed.kind == "file" else source
  return RelearnSet(parsed.name, texts_of(rows), f"the rows of {origin}{_collected(rows)}",
                    tuple(row.line for row in rows))


def _collected(rows: Sequence[Row]) -> str:
  """From which models and by which prompts rows were collected, where they say so; see `relearn collect`."""
  notes = [row["collected"] for row in rows if isinstance(row.get("collected"), dict)]
  if not notes:
    return ""
  told = lambda key: ", ".join(dict.fromkeys(str(note.get(key, "?"))[:100] for note in notes))
  return f", of which {len(notes)} were collected from {told('model')} (prompts {told('prompts')}; on {told('topic')})"
