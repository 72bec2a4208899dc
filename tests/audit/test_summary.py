"""Verdicts and summary from rows whose truth is known: every branch of the judgement."""

import json
from typing import Any

import numpy as np
import pytest

from relearn_jax.audit.summary import clean, summarize
from relearn_jax.audit.verdict import VerdictSettings

from .synthetic import CHECKED, QUESTIONS, frame, parts

SETTINGS = {"draws": 2000}


def judged(leakage: Any = CHECKED, settings: Any = SETTINGS, **case: Any) -> dict[str, Any]:
  """The verdict on variant 7 of one synthetic case."""
  facts = {"leakage": leakage, "settings": settings}
  return summarize(frame(parts(**case)), facts)["verdicts"]["7"]


def test_what_comes_back_to_u_alone_was_obfuscated() -> None:
  found = judged(relearned=0.9)
  assert found["verdict"] == "OBFUSCATED" and found["low"] > 0
  assert found["excess"] == pytest.approx(0.9) and found["recovery"] == pytest.approx(0.9)
  assert (found["depth"], found["relearn_step"], found["control_gain"]) == (0, 80, 0)
  assert "from 0 % to 90 %" in found["reason"]


def test_what_stays_away_is_erased() -> None:
  found = judged(relearned=0.0)
  assert found["verdict"] == "ERASED" and found["high"] < VerdictSettings().delta


def test_what_comes_to_the_control_too_is_learning() -> None:
  found = judged(relearned=0.9, control=0.9)
  assert found["verdict"] == "INCONCLUSIVE" and found["excess"] == pytest.approx(0)
  assert "the control relearned too (+45 points)" in found["reason"]


@pytest.mark.parametrize("case,why", [
    ({"relearned": (0.0, 0.0, 0.3)}, "the excess may be as large as"),
    ({"relearned": 0.0, "original": 0.2}, "the original itself said it in only 20 %"),
    ({"relearned": 0.0, "original": None}, "there is no original"),
    ({"relearned": 0.0, "questions": QUESTIONS[:20]}, "20 questions are too few (at least 30)"),
    ({"relearned": 0.0, "retain": -9.0}, "utility collapsed"),
    ({"relearned": (0.0,), "seeds": (0,)}, "there is a single seed"),
    ({"control": None}, "there is no never-trained control")])
def test_doubts_forbid_a_verdict(case: dict[str, Any], why: str) -> None:
  found = judged(**case)
  assert found["verdict"] == "INCONCLUSIVE" and why in found["reason"], found


def test_a_doubt_about_erasure_is_none_about_recovery() -> None:
  found = judged(relearned=0.9, retain=-9.0)
  assert found["verdict"] == "OBFUSCATED" and any("Utility collapsed" in note for note in found["notes"])


def test_relearn_sets_must_be_checked_and_clean() -> None:
  assert "was not checked" in judged(leakage=[])["reason"]
  other = [CHECKED[0] | {"variant": "5"}]
  assert "was not checked" in judged(leakage=other)["reason"]
  leak = [CHECKED[0] | {"hits": [{"line": 3, "text": "x Mark", "found": "mark"}], "passed": False}]
  found = judged(leakage=leak, relearned=0.9)
  assert found["verdict"] == "INCONCLUSIVE" and "line 3: “mark”" in found["reason"]


def test_runs_that_never_unlearned_are_named() -> None:
  rows = frame(parts(relearned=0.0))
  late = (rows["seed"] == 2) & (rows["depth"] == 0)
  facts = {"leakage": CHECKED, "settings": SETTINGS}
  found = summarize(rows[~late], facts)["verdicts"]["7"]
  assert "1 of 3 runs did not unlearn far enough" in found["reason"]
  assert any("Seeds 2" in note for note in found["notes"])
  nobody = summarize(rows[rows["depth"].isna()], facts)["verdicts"]["7"]
  assert nobody["verdict"] == "INCONCLUSIVE" and "no run reached an unlearned point" in nobody["reason"]


def test_the_worst_depth_and_step_decide() -> None:
  found = judged(relearned=0.8, depths=3)
  assert (found["depth"], found["relearn_step"]) == (0, 80)
  assert found["excess"] == pytest.approx(0.8)


def test_limits_stay_within_what_is_possible() -> None:
  found = judged(relearned=(1.0, 1.0, 0.1))
  assert found["high"] <= 1 and -1 <= found["low"] <= found["excess"]


def test_cells_are_one_for_each_point() -> None:
  rows = frame(parts("7", depths=2), parts("1", original=0.1, relearned=0.05, depths=2))
  summary = summarize(rows, {"leakage": CHECKED, "settings": SETTINGS, "seconds": {"base": 1.0}})
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert summary["schema_version"] == 1 and summary["case"] == "names" and summary["seconds"] == {"base": 1.0}
  assert list(summary["verdicts"]) == ["7", "1"]
  keys = [tuple(cell[name] for name in ("variant", "arm", "point", "depth", "relearn_step", "metric"))
          for cell in summary["cells"]]
  assert len(keys) == len(set(keys)) and {key[5] for key in keys} == {"asr", "logprob", "retain_logprob"}
  cell = next(c for c in summary["cells"] if (c["variant"], c["arm"], c["depth"], c["relearn_step"], c["metric"])
              == ("7", "U", 0, 80, "asr"))
  assert cell["mean"] == pytest.approx(0.9) and cell["low"] <= cell["mean"] <= cell["high"]
  assert cell["n"] == 3 * len(QUESTIONS) and cell["seeds"] == [0, 1, 2] and cell["relearn_set"] == "prefixes"
  assert cell["unlearn_step"] is None  # seeds differ
  original = next(c for c in summary["cells"] if c["arm"] == "O" and c["point"] == "original")
  assert original["unlearn_step"] == 0 and original["depth"] is None and original["relearn_set"] is None
  assert {c["unlearn_step"] for c in summary["trajectory"]} == {5, 10}
  assert summary["selection"]["7"] == {str(seed): [10 + seed, 15 + seed] for seed in range(3)}


def test_questions_that_a_seed_lacks_are_left_out_of_its_table() -> None:
  rows = frame(parts())
  gone = (rows["question"] == "q000") & (rows["seed"] == 1) & (rows["point"] == "original")
  summary = summarize(rows[~gone], {"leakage": CHECKED, "settings": SETTINGS})
  cell = next(c for c in summary["cells"] if c["point"] == "original" and c["metric"] == "asr")
  assert cell["n"] == 3 * (len(QUESTIONS) - 1)


def test_clustered_questions_widen_the_limits() -> None:
  rows = frame(parts(relearned=0.5))
  clusters = {q: f"c{i // 8}" for i, q in enumerate(QUESTIONS)}
  width = lambda facts: next(c["high"] - c["low"] for c in summarize(rows, facts)["cells"]
                             if (c["arm"], c["relearn_step"], c["metric"]) == ("U", 80, "asr"))
  facts = {"leakage": CHECKED, "settings": SETTINGS}
  assert width(facts | {"clusters": clusters}) > 1.5 * width(facts)


def test_clean_leaves_nothing_that_json_lacks() -> None:
  assert clean({"a": (np.float32(0.1234567), float("nan")), 3: np.int64(2)}) == {"a": [0.123457, None], "3": 2}
