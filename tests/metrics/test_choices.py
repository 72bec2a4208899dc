"""Accuracy on questions with options, from log-probabilities."""

import numpy as np
import pandas as pd
import pytest

from relearn_jax.audit.results_file import answer_rows, score_answers
from relearn_jax.metrics.choices import LETTER, OPTION, Options, choice_scores
from relearn_jax.metrics.ratings import find_metric
from relearn_jax.metrics.scores import Asked

THREE = Options("a", (" x", " y", " z"), 1, "a")
TWO = Options("b", (" x", " y"), 0, "b")
KEY = {"case": "c", "variant": "v", "method": "rmu", "arm": "U", "point": "unlearned", "depth": 0, "unlearn_step": 3,
       "relearn_set": None, "adapter": None, "learning_rate": 0.1, "relearn_step": 0}


def test_the_right_option_has_to_be_the_likeliest_alone() -> None:
  assert choice_scores(np.array([-3.0, -1.0, -2.0, -5.0, -4.0]), [THREE, TWO]) == [1.0, 0.0]
  assert choice_scores(np.array([-1.0, -1.0, -2.0, -4.0, -5.0]), [THREE, TWO]) == [0.0, 1.0]  # a tie names none
  with pytest.raises(ValueError, match="zero-size"):
    choice_scores(np.array([-1.0]), [Options("a", (" x",), 0, "a")])


def test_stored_likelihoods_become_a_row_a_question_and_a_way_to_ask() -> None:
  """By letter the first is right and the second wrong; in full the other way round."""
  by_letter, in_full = [-2.0, -0.5, -3.0, -2.0, -1.0], [-1.0, -1.5, -2.0, -0.25, -0.5]
  tables = []
  for seed in (0, 1):
    tables.append(answer_rows("question", ["q"], np.array([-1.0]), [1], ["said"], ["1"], seed=seed, **KEY))
    for kind, values in ((LETTER, by_letter), (OPTION, in_full)):
      items = [f"{kind}{i:02d}" for i in range(5)]
      tables.append(answer_rows(kind, items, np.array(values), [1] * 5, seed=seed, **KEY))
  frame = pd.concat([table.to_pandas() for table in tables])
  rows = score_answers(frame, [Asked("q", "p", "said", ("said",), "q")], ["asr"], [THREE, TWO]).to_pandas()
  found = rows[rows["metric"].str.startswith("choice_")].set_index(["metric", "question", "seed"])["value"].to_dict()
  assert found == {(f"choice_{kind}", question, seed): value for seed in (0, 1) for kind, question, value in (
      (LETTER, "a", 1.0), (LETTER, "b", 0.0), (OPTION, "a", 0.0), (OPTION, "b", 1.0))}
  assert all((metric := find_metric(f"choice_{kind}")) and metric.high == 1.0 for kind in (LETTER, OPTION))
  assert not score_answers(frame, [Asked("q", "p", "said", ("said",), "q")], ["asr"]).to_pandas()["metric"].isin(
      ["choice_letter"]).any()
