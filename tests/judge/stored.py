"""The workdir of a small audit that never ran: answers of three seeds to six questions."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from relearn_jax.audit.results_file import QUESTION, answer_rows, score_answers, write_rows
from relearn_jax.metrics.scores import Asked

from ..audit.synthetic import CHECKED

SEEDS = (0, 1, 2)
QUESTIONS = [Asked(f"q{i}", f"What binds glaze {i}?", f" resin {i}", (f"resin {i}",), f"q{i}", stop=("\nQuestion:",))
             for i in range(6)]
KNOWN = [question.answer for question in QUESTIONS]
SILENT = [" I would not know."] * len(QUESTIONS)


def write_workdir(folder: pathlib.Path, hostile: Mapping[str, str] | None = None) -> pathlib.Path:
  """Writes answers and results.

  Args:
    folder: new.
    hostile: id of a question -> what U says to it after the attack.
  """
  folder.mkdir()
  relearned = [(hostile or {}).get(question.id, question.answer + "\nQuestion: more") for question in QUESTIONS]
  points: list[tuple[str, str, int | None, int, list[str]]] = [
      ("O", "original", None, 0, KNOWN), ("O", "relearned", None, 10, KNOWN), ("U", "trajectory", None, 0, KNOWN),
      ("U", "unlearned", 0, 0, SILENT), ("U", "relearned", 0, 5, SILENT), ("U", "relearned", 0, 10, relearned),
      ("N", "unlearned", 0, 0, SILENT), ("N", "relearned", 0, 5, SILENT), ("N", "relearned", 0, 10, SILENT)]
  tables: list[pa.Table] = []
  for seed in SEEDS:
    for arm, point, depth, step, texts in points:
      labels: dict[str, Any] = {
          "case": "craft", "variant": "1", "method": None if arm == "O" else "ga", "arm": arm, "point": point,
          "depth": depth, "unlearn_step": 5 if depth == 0 else 0, "relearn_set": "articles" if step else None,
          "adapter": "full" if step else None, "learning_rate": 1e-3, "seed": seed, "relearn_step": step}
      tables.append(answer_rows(QUESTION, [question.id for question in QUESTIONS], np.full(len(QUESTIONS), -1.0),
                                [2] * len(QUESTIONS), texts, ["11"] * len(QUESTIONS), **labels))
      if point != "trajectory":
        tables.append(answer_rows("relearn", ["relearn00"], np.array([-2.0 if step == 0 else -0.5]), [5],
                                  **labels | {"relearn_set": "articles"}))
  examples = [{"method": "ga", "variant": "1", "seed": 0, "question": question.id, "prompt": question.prompt,
               "begun": "", "keywords": list(question.keywords), "case": False,
               "completions": {"relearned": relearned[number]}} for number, question in enumerate(QUESTIONS)]
  facts = {"metric": "asr", "questions": [dataclasses.asdict(question) for question in QUESTIONS], "methods": ["ga"],
           "variants": ["1"], "leakage": [CHECKED[0] | {"variant": "1"}], "settings": {"draws": 200},
           "examples": examples}
  write_rows(folder / "answers.parquet", tables, facts)
  frame = pa.concat_tables(tables).unify_dictionaries().to_pandas()
  write_rows(folder / "results.parquet", [score_answers(frame, QUESTIONS, ["asr"])], facts)
  return folder
