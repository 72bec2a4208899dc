"""The summary of rows whose truth is known."""

import json

import numpy as np
import pytest

from relearn_jax.audit.summary import clean, summarize

from .synthetic import CHECKED, QUESTIONS, RATES, clustered, frame, parts

SETTINGS = {"draws": 2000}
FACTS = {"leakage": CHECKED, "settings": SETTINGS}


def test_cells_are_one_for_each_point() -> None:
  rows = frame(parts("7", depths=2), parts("1", original=0.1, relearned=0.05, depths=2))
  summary = summarize(rows, FACTS | {"seconds": {"pretrain": 1.0}})
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert summary["schema_version"] == 3 and summary["case"] == "names" and summary["seconds"] == {"pretrain": 1.0}
  assert {method: list(verdicts) for method, verdicts in summary["verdicts"].items()} == {"ga": ["7", "1"]}
  keys = [tuple(cell[name] for name in ("variant", "arm", "point", "depth", "learning_rate", "relearn_step", "metric"))
          for cell in summary["cells"]]
  assert len(keys) == len(set(keys))
  assert {key[6] for key in keys} == {"asr", "logprob", "retain_logprob", "relearn_logprob"}
  assert {key[4] for key in keys} == {None, 1e-4}  # the attack's, and none before it
  cell = next(c for c in summary["cells"] if (c["variant"], c["arm"], c["depth"], c["relearn_step"], c["metric"])
              == ("7", "U", 0, 80, "asr"))
  assert cell["mean"] == pytest.approx(0.9) and cell["low"] <= cell["mean"] <= cell["high"]
  assert cell["n"] == 3 * len(QUESTIONS) and cell["seeds"] == [0, 1, 2] and cell["relearn_set"] == "prefixes"
  assert cell["seed_means"] == pytest.approx([0.9] * 3)
  assert cell["unlearn_step"] is None  # seeds differ
  original = next(c for c in summary["cells"] if c["arm"] == "O" and c["point"] == "original")
  assert original["unlearn_step"] == 0 and original["depth"] is original["relearn_set"] is original["method"] is None
  assert {c["unlearn_step"] for c in summary["trajectory"]} == {5, 10}
  assert summary["selection"]["ga"]["7"] == {str(seed): [10 + seed, 15 + seed] for seed in range(3)}


def test_learning_rates_of_the_attack_are_cells_of_their_own() -> None:
  summary = summarize(frame(parts(rates=RATES, attacked=(1.0, 0.9, 0.2))), FACTS)
  after = [c for c in summary["cells"] if (c["arm"], c["relearn_step"], c["metric"]) == ("O", 80, "asr")]
  assert [(c["learning_rate"], c["mean"]) for c in after] == [(1e-4, 1.0), (1e-3, 0.9), (1e-2, 0.2)]


def test_methods_relearn_sets_and_adapters_are_cells_of_their_own() -> None:
  rows = frame(parts(), parts(method="npo", original=None, relearned=0.1),
               parts(relearn_set="other", original=None, relearned=0.2),
               parts(adapter="lora4", original=None, relearned=0.3))
  keys = [name for name in rows.columns if name != "value"]
  summary = summarize(rows.drop_duplicates(keys), FACTS)  # models before the attack are in every part
  after = {(c["method"], c["relearn_set"], c["adapter"]): c["mean"] for c in summary["cells"]
           if (c["arm"], c["relearn_step"], c["metric"]) == ("U", 80, "asr")}
  assert after == {("ga", "prefixes", "full"): 0.9, ("npo", "prefixes", "full"): 0.1, ("ga", "other", "full"): 0.2,
                   ("ga", "prefixes", "lora4"): 0.3}
  assert summary["methods"] == ["ga", "npo"] and set(summary["verdicts"]) == {"ga", "npo"}
  before = [(c["method"], c["relearn_set"]) for c in summary["cells"]
            if (c["arm"], c["point"], c["metric"]) == ("U", "unlearned", "relearn_logprob")]
  assert before == [("ga", "other"), ("ga", "prefixes"), ("npo", "prefixes")]


def test_a_question_that_a_seed_lacks_is_counted_and_nothing_is_concluded() -> None:
  rows = frame(parts())
  gone = (rows["question"] == "q000") & (rows["seed"] == 1) & (rows["point"] == "relearned") & (rows["arm"] == "U")
  summary = summarize(rows[~gone], FACTS)
  cell = next(c for c in summary["cells"] if (c["arm"], c["relearn_step"], c["metric"]) == ("U", 80, "asr"))
  assert cell["n"] == 3 * (len(QUESTIONS) - 1)
  found = summary["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE" and "answers of some seeds are missing to 2 questions" in found["reason"]


def test_clustered_questions_widen_the_limits() -> None:
  seeds = tuple(range(20))
  rows = frame(parts(relearned=[0.5] * 20, seeds=seeds))
  clusters = {q: f"c{i // 8}" for i, q in enumerate(QUESTIONS)}
  width = lambda facts: next(c["high"] - c["low"] for c in summarize(rows, facts)["cells"]
                             if (c["arm"], c["relearn_step"], c["metric"]) == ("U", 80, "asr"))
  assert width(FACTS | clustered(clusters)) > 1.5 * width(FACTS)


def test_too_few_clusters_or_seeds_show_no_interval() -> None:
  of = lambda summary: next(c for c in summary["cells"]
                            if (c["arm"], c["relearn_step"], c["metric"]) == ("U", 80, "asr"))
  four = {q: f"c{i // 10}" for i, q in enumerate(QUESTIONS)}
  assert (of(summarize(frame(parts()), FACTS | clustered(four)))["low"]) is None
  assert (of(summarize(frame(parts(seeds=(0,))), FACTS))["high"]) is None


def test_seeds_of_one_loaded_model_do_not_vary_before_the_attack() -> None:
  rows = frame(parts(unlearned=0.0))
  high = lambda facts: next(c["high"] for c in summarize(rows, facts)["cells"]
                            if (c["arm"], c["point"], c["metric"]) == ("U", "unlearned", "asr"))
  assert high(FACTS) > 0.7  # three models without a hit
  assert high(FACTS | {"loaded": True}) == pytest.approx(1 - 0.025 ** (1 / 40), abs=1e-3)  # one model, 40 questions


def test_clean_leaves_nothing_that_json_lacks() -> None:
  assert clean({"a": (np.float32(0.1234567), float("nan")), 3: np.int64(2)}) == {"a": [0.123457, None], "3": 2}
