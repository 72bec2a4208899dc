"""`relearn report`: a workdir's report again from its stored rows, and its closing words; no model is needed."""

import json
import pathlib
import shutil
from collections.abc import Sequence

from relearn_jax.audit.results_file import (
  ANSWERS,
  ANSWERS_FILE,
  RESULTS_FILE,
  read_rows,
  rows_table,
  score_answers,
  write_rows,
)
from relearn_jax.metrics.choices import Options
from relearn_jax.metrics.ratings import is_rating
from relearn_jax.metrics.scores import METRICS, Asked, get_metric
from relearn_jax.report import judge_tables, tables
from relearn_jax.report.render import report_from_rows


def report(workdir: pathlib.Path, metrics: Sequence[str] = ()) -> str:
  """Renders the report of an audit again; returns its closing words.

  Args:
    workdir: of a finished audit.
    metrics: scores to add to its results, from the stored answers.

  Raises:
    InputError: stored rows do not exist or cannot be read, or there is no such metric.
  """
  for metric in metrics:
    get_metric(metric, "--metrics")
  if metrics:
    rescore(workdir, metrics)
  report_from_rows(workdir)
  return closing(workdir)


def rescore(workdir: pathlib.Path, metrics: Sequence[str]) -> None:
  """Writes results.parquet again, with the scores that it had and these."""
  answers, facts = read_rows(workdir / ANSWERS_FILE, ANSWERS)
  there, ratings = [facts["metric"]], []
  if (workdir / RESULTS_FILE).exists():
    rows, facts = read_rows(workdir / RESULTS_FILE)
    rows = rows.astype(dict.fromkeys(rows.select_dtypes("category"), object))
    given = rows["metric"].map(is_rating)
    ratings = [rows_table(rows[given])] if given.any() else []
    there += [name for name in rows["metric"][~given].unique() if name in METRICS]
  questions = [Asked.from_json(question) for question in facts["questions"]]
  choices = [Options.from_json(choice) for choice in facts.get("choices", [])]
  every = list(dict.fromkeys((*there, *metrics)))
  write_rows(workdir / RESULTS_FILE, [score_answers(answers, questions, every, choices), *ratings], facts)


def closing(workdir: pathlib.Path) -> str:
  """What the terminal shows at the end of an audit, at its width."""
  _, facts = read_rows(workdir / RESULTS_FILE)
  width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
  words = tables.closing(json.loads((workdir / "summary.json").read_text()), facts, width)
  return f"{words}\n\nReport: {workdir / 'report.html'}"


def judged_closing(workdir: pathlib.Path) -> str:
  """What the terminal shows at the end of judging."""
  found = judge_tables.every_table(json.loads((workdir / "summary.json").read_text()))
  shown = [f"{table.caption}:\n\n{tables.plain(table)}" for table in found]
  return "\n\n".join([*shown, f"Report: {workdir / 'report.html'}"])
