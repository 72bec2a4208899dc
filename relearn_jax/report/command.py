"""`relearn report`: a workdir's reports again from its stored rows, and its closing words; no model is needed."""

import json
import pathlib
import shutil

from relearn_jax.audit.rows import read_rows
from relearn_jax.report import comparison, tables
from relearn_jax.report.render import report_from_rows


def report(workdir: pathlib.Path) -> str:
  """Renders the report of an audit or a comparison again; returns its closing words.

  Raises:
    InputError: the stored rows do not exist or cannot be read.
  """
  if _is_comparison(workdir):
    comparison.render_again(workdir)
  else:
    report_from_rows(workdir)
  return closing(workdir)


def closing(workdir: pathlib.Path) -> str:
  """What the terminal shows at the end of an audit or a comparison, at its width."""
  if _is_comparison(workdir):
    return f"{comparison.closing(workdir)}\n\nReport: {workdir / 'comparison.html'}"
  _, facts = read_rows(workdir / "results.parquet")
  width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
  words = tables.closing(json.loads((workdir / "summary.json").read_text()), facts, width)
  return f"{words}\n\nReport: {workdir / 'report.html'}"


def _is_comparison(workdir: pathlib.Path) -> bool:
  return (workdir / "comparison.json").exists()
