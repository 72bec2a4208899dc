"""A case from JSON lines files: what a person brings who audits a model of their own."""

import pathlib
from collections.abc import Sequence

from relearn_jax.cases.base import Case, Question, RelearnSet, Text
from relearn_jax.data.jsonl import Row, check_row, read_jsonl
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import contains_keyword, keyword_key

FIELDS = {"id": str, "prompt": str, "answer": str, "keywords": list}


def read_texts(path: pathlib.Path) -> list[Row]:
  """The rows of a file, each of either form.

  Raises:
    InputError: naming file, line and field: a row of neither form or of both, an empty text, or a `complete` that is
      no boolean or stands beside an answer.
  """
  rows = read_jsonl(path, {})
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
  return rows


def whole_text(row: Row) -> str:
  """All of a row's text: the prompt and its answer, or the text."""
  return str(row["text"]) if "text" in row else str(row["prompt"]) + str(row["answer"])


def is_complete(row: Row) -> bool:
  """Whether a row's text ends where the row does: that of an answer does, any other where its `complete` says so."""
  return bool(row.get("complete", "answer" in row))


def read_questions(path: pathlib.Path) -> tuple[list[Row], tuple[Question, ...]]:
  """Questions `{"id", "prompt", "answer", "keywords"}`, each a cluster of its own unless it names a `cluster`.

  Optional besides: `case` (true: keywords count as they are written only) and `stop` (a completion ends before the
  first of these strings).

  Returns:
    The rows as they stand in the file, and the questions.

  Raises:
    InputError: naming file, line and field: something is missing or empty, or a keyword already stands in its
      prompt, where a completion that repeats the question would hit it.
  """
  rows = read_jsonl(path, FIELDS)
  questions = []
  for row in rows:
    fail = lambda field, problem, mend, line=row.line: InputError(problem, file=path, line=line, field=field, mend=mend)
    words = row["keywords"]
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
                              tuple(stop)))
  if len({question.id for question in questions}) < len(questions):  # 1 and "1"
    raise InputError("differ in type only", file=path, field="id", mend="give every row an id of its own")
  return rows, tuple(questions)


def _texts(rows: Sequence[Row]) -> tuple[Text, ...]:
  return tuple(Text(whole_text(row), is_complete(row)) for row in rows)


def _prompted(rows: Sequence[Row]) -> tuple[Text, ...]:
  return tuple(Text(str(row["answer"]), prompt=str(row["prompt"])) if "answer" in row
               else Text(whole_text(row), is_complete(row)) for row in rows)


def read_case(name: str, forget: pathlib.Path, retain: pathlib.Path, relearn: pathlib.Path, questions: pathlib.Path
              ) -> tuple[Case, dict[str, list[Row]]]:
  """The case that four files describe, and their rows by field.

  Raises:
    InputError: see `read_texts` and `read_questions`.
  """
  rows = {"forget": read_texts(forget), "retain": read_texts(retain), "relearn": read_texts(relearn)}
  asked, found = read_questions(questions)
  case = Case(
      name=name, variant=relearn.stem, memorize=(), forget=_prompted(rows["forget"]), retain=_texts(rows["retain"]),
      relearn_sets=(RelearnSet(relearn.stem, _texts(rows["relearn"]), f"the rows of {relearn.name}",
                               tuple(row.line for row in rows["relearn"])),),
      questions=found)
  return case, {**rows, "questions": asked}
