"""Examples in docstrings give what they say."""

import ast
import doctest
import importlib
import pathlib

import pytest

from .command import ROOT

FILES = sorted(file.relative_to(ROOT) for file in (ROOT / "relearn_jax").rglob("*.py") if ">>> " in file.read_text())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file: pathlib.Path) -> None:
  # From the source: behind a type checker's wrapper doctest's own finder does not see a function.
  source = (ROOT / file).read_text()
  names = vars(importlib.import_module(".".join(file.with_suffix("").parts)))
  runner, report = doctest.DocTestRunner(), []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
      name = getattr(node, "name", file.stem)
      runner.run(doctest.DocTestParser().get_doctest(text, dict(names), name, str(file), 0), out=report.append)
  assert runner.tries == source.count(">>> ") and not runner.failures, "".join(report)
