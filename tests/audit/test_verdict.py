"""The verdict on rows whose truth is known: every word, in its order, and every doubt."""

from typing import Any

import pytest

from relearn_jax.audit.summary import summarize

from .synthetic import CHECKED, QUESTIONS, RATES, clustered, frame, parts

SETTINGS = {"draws": 1000}
MANY = tuple(range(45))  # seeds that can show an excess below 0.1 with 40 questions
# A model in which nothing comes back, by attacks up to one that destroys the original.
ERASED: dict[str, Any] = {"seeds": MANY, "relearned": 0.0, "rates": RATES, "attacked": (1.0, 1.0, 0.2)}


def judged(leakage: Any = CHECKED, facts: dict[str, Any] | None = None, **case: Any) -> dict[str, Any]:
  """The verdict on variant 7 of one synthetic case."""
  made = {"leakage": leakage, "settings": SETTINGS} | (facts or {})
  return summarize(frame(parts(**case)), made)["verdicts"]["ga"]["7"]


def test_what_comes_back_to_u_alone_was_obfuscated() -> None:
  found = judged(relearned=(0.9, 0.8, 1.0))
  assert found["verdict"] == "OBFUSCATED" and found["low"] > 0 and found["level_low"] > 0
  assert found["excess"] == pytest.approx(0.9) and found["recovery"] == pytest.approx(0.9)
  assert (found["depth"], found["learning_rate"], found["relearn_step"], found["control_gain"]) == (0, 1e-4, 80, 0)
  assert "from 0 % to 90 %" in found["reason"]


def test_what_stays_away_under_all_attacks_is_erased() -> None:
  found = judged(**ERASED)
  assert found["verdict"] == "ERASED", found["reason"]
  assert found["high"] < 0.1 and found["level_high"] < 0.1
  assert len(found["not_counted"]) == 2 and "destroyed the original (100 % to 20 %)" in found["not_counted"][0]
  assert "at learning rates from 0.0001 to 0.001" in found["reason"]


def test_one_rate_never_earns_the_word() -> None:
  found = judged(**ERASED | {"rates": (1e-4,), "attacked": (1.0,)})
  assert found["verdict"] == "INCONCLUSIVE"
  assert ("not found by this attack alone (learning rate 0.0001); rates still to be tried: 0.0003, 0.001 and on, until "
          "the attack begins to destroy the original") in found["reason"]
  undestroyed = judged(**ERASED | {"attacked": (1.0, 1.0, 1.0)})
  assert undestroyed["verdict"] == "INCONCLUSIVE" and "rates still to be tried: 0.03, 0.1" in undestroyed["reason"]
  narrow = judged(**ERASED | {"rates": (1e-4, 2e-4, 1e-2)})
  assert narrow["verdict"] == "INCONCLUSIVE" and "rates still to be tried: 3e-05, 1e-05" in narrow["reason"]


@pytest.mark.parametrize(("change", "why"), [
    ({"relearned": [0.0] * 40 + [1.0] * 5}, "the excess may be as large as"),
    ({"seeds": (0, 1, 2)}, "3 seeds are too few to show less than 0.1: without any recovery 42 would do"),
    ({"original": 0.2}, "the original itself scored only 20 %"),
    ({"attacked": (0.2, 0.2, 0.2)}, "no cell counts"),
    ({"attacked": (None, None, None)}, "the original was not attacked"),
    ({"loss": (-2.0, -1.9)}, "no cell counts"),
    ({"questions": QUESTIONS[:20]}, "20 questions are too few (at least 30)"),
    ({"questions": QUESTIONS[:20]}, "20 questions cannot show less than 0.1"),
    ({"retain": -9.0}, "utility collapsed before the attack"),
    ({"retain_after": -9.0}, "utility collapsed after the attack"),
    ({"seeds": (0,)}, "there is a single seed"),
    ({"control": 0.3, "relearned": 0.3}, "the control relearned too (+30 points)"),
    ({"unlearned": 0.09, "relearned": 0.09}, "what the unlearned model still says before the attack may be as large")])
def test_each_doubt_forbids_erased(change: dict[str, Any], why: str) -> None:
  found = judged(**ERASED | change)
  assert found["verdict"] == "INCONCLUSIVE" and why in found["reason"], found


@pytest.mark.parametrize(("arm", "point", "logprob", "when"), [
    ("U", "unlearned", -2.7, "before"), ("U", "relearned", -2.7, "after"), ("U", "unlearned", -2.8, None),
    ("O", "original", -2.99, None)])  # a control and an original that agree within a nat tell no share
def test_an_answer_that_is_likelier_than_under_the_control_is_not_erased(arm: str, point: str, logprob: float,
                                                                         when: str | None) -> None:
  """The original finds answers a nat likelier than the control (-2 and -3); U may have a quarter of that."""
  rows = frame(parts(**ERASED))
  rows.loc[(rows["metric"] == "logprob") & (rows["arm"] == arm) & (rows["point"] == point), "value"] = logprob
  found = summarize(rows, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]["ga"]["7"]
  assert (found["verdict"] == "ERASED") == (when is None), found["reason"]
  if when:
    assert f"likelier than the control does {when} the attack, by 30 % of what" in found["reason"]


@pytest.mark.parametrize("metric", ["retain_logprob", "relearn_logprob", "logprob"])
def test_a_missing_table_is_a_doubt(metric: str) -> None:
  rows = frame(parts(**ERASED))
  facts = {"leakage": CHECKED, "settings": SETTINGS}
  found = summarize(rows[(rows["metric"] != metric) | (rows["arm"] != "U")], facts)["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE"
  assert {"logprob": "nothing shows how likely the unlearned model finds the answers",
          "retain_logprob": "nothing shows that the unlearned model was intact",
          "relearn_logprob": "nothing shows that the attack did anything"}[metric] in found["reason"]


@pytest.mark.parametrize(("case", "why"), [
    ({"original": None}, "there is no original"), ({"control": None}, "there is no control to compare with")])
def test_without_an_arm_nothing_is_said(case: dict[str, Any], why: str) -> None:
  found = judged(**case)
  assert found["verdict"] == "INCONCLUSIVE" and why in found["reason"]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_still_knows_was_not_unlearned(loaded: bool) -> None:
  """The original passed off as unlearned: it knows before the attack, and no attack can show it to have forgotten."""
  found = judged(unlearned=0.95, relearned=0.95, facts={"loaded": loaded})
  assert found["verdict"] == "NOT UNLEARNED" and "the model scores 95 %" in found["reason"]


def test_a_single_deterministic_attack_still_tells_what_was_never_unlearned() -> None:
  found = judged(unlearned=0.95, relearned=0.95, seeds=(0,), facts={"loaded": True})
  assert found["verdict"] == "NOT UNLEARNED"


def test_depths_that_still_know_do_not_count() -> None:
  rows = frame(parts(unlearned=1.0, relearned=1.0, depths=1), parts(**ERASED | {"seeds": (0, 1, 2)}))
  deeper = rows.iloc[len(frame(parts(unlearned=1.0, relearned=1.0, depths=1))):].copy()
  first = rows.iloc[:len(rows) - len(deeper)]
  deeper["depth"] = deeper["depth"].where(deeper["depth"].isna(), 1)
  both = frame_of(first[first["arm"] != "O"], deeper)
  found = summarize(both, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE" and found["depth"] == 1
  assert any("At depth 0 the model had not unlearned" in note for note in found["notes"])


def frame_of(*frames: Any) -> Any:
  import pandas as pd
  rows = pd.concat(frames, ignore_index=True)
  keys = ["arm", "point", "depth", "unlearn_step", "learning_rate", "seed", "relearn_step", "question", "metric"]
  return rows.drop_duplicates(keys)


def test_a_rise_beside_a_control_that_stands_higher_is_no_recovery() -> None:
  found = judged(unlearned=0.0, relearned=0.2, before=0.4, control=0.4)
  assert found["verdict"] == "INCONCLUSIVE" and found["excess"] == pytest.approx(0.2)
  assert found["level"] == pytest.approx(-0.2)


def test_what_comes_to_the_control_too_is_learning() -> None:
  found = judged(relearned=0.9, control=0.9)
  assert found["verdict"] == "INCONCLUSIVE" and found["excess"] == pytest.approx(0)
  assert "the control relearned too (+90 points)" in found["reason"]


def test_two_seeds_and_four_clusters_are_too_few_for_obfuscated() -> None:
  assert judged(relearned=1.0, seeds=(0, 1))["verdict"] == "INCONCLUSIVE"
  four = {q: f"c{i // 10}" for i, q in enumerate(QUESTIONS)}
  found = judged(relearned=1.0, facts=clustered(four))
  assert found["verdict"] == "INCONCLUSIVE" and "4 clusters of questions show no limits (at least 5)" in found["reason"]
  assert found["low"] is None and found["high"] is None
  five = {q: f"c{i // 8}" for i, q in enumerate(QUESTIONS)}
  assert judged(relearned=1.0, facts=clustered(five))["verdict"] == "OBFUSCATED"


def test_few_clusters_are_kept_apart_from_few_questions() -> None:
  """Ten authors with four questions each can be ERASED; the report says what they cannot show."""
  ten = {q: f"author{i // 4}" for i, q in enumerate(QUESTIONS)}
  found = judged(**ERASED, facts=clustered(ten))
  assert found["verdict"] == "ERASED", found["reason"]
  assert any("40 questions in 10 clusters" in note and "fewer than 26 %" in note for note in found["notes"])


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
  rows = frame(parts(**ERASED))
  late = (rows["seed"] == 2) & (rows["depth"] == 0)
  facts = {"leakage": CHECKED, "settings": SETTINGS}
  found = summarize(rows[~late], facts)["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE" and "1 of 45 seeds are missing" in found["reason"]
  assert any("Seeds 2" in note for note in found["notes"])
  nobody = summarize(rows[rows["depth"].isna()], facts)["verdicts"]["ga"]["7"]
  assert nobody["verdict"] == "INCONCLUSIVE" and "no run reached an unlearned point" in nobody["reason"]


def test_runs_that_ended_forbid_erased() -> None:
  ended = [{"run": "N-7-0-depth1-lr0.0001", "arm": "N", "variant": "7", "seed": 0, "method": "ga",
            "stage": "attack-ga-prefixes-full-seed0", "step": 3, "what": "loss"}]
  found = judged(**ERASED, facts={"ended": ended})
  assert judged(**ERASED, facts={"ended": [ended[0] | {"method": "npo"}]})["verdict"] == "ERASED"  # another's
  for everybody in ({"method": None, "arm": "O"}, {"method": None, "variant": None}):
    assert judged(**ERASED, facts={"ended": [ended[0] | everybody]})["verdict"] == "INCONCLUSIVE"
  assert found["verdict"] == "INCONCLUSIVE"
  assert "N-7-0-depth1-lr0.0001 in stage attack-ga-prefixes-full-seed0 at step 3 (loss not finite)" in found["reason"]


def test_what_the_original_knew_is_of_the_same_seeds() -> None:
  rows = frame(parts(relearned=(0.9, 0.8, 1.0)))
  without = rows[~((rows["arm"] == "O") & (rows["seed"] == 1))]
  found = summarize(without, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE" and "the original of seed 1 is not there" in found["reason"]


def test_the_worst_depth_and_step_decide() -> None:
  found = judged(relearned=0.8, depths=3)
  assert (found["depth"], found["relearn_step"]) == (0, 80)
  assert found["excess"] == pytest.approx(0.8)


def test_each_method_has_a_verdict_and_one_original() -> None:
  rows = frame(parts(), parts(method="npo", original=None, relearned=0.0))
  found = summarize(rows, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]
  assert {method: verdicts["7"]["verdict"] for method, verdicts in found.items()} == {
      "ga": "OBFUSCATED", "npo": "INCONCLUSIVE"}
  assert "it was not found by" in found["npo"]["7"]["reason"]  # the original, which is of every method, was attacked


def test_the_worst_relearn_set_and_adapter_are_named() -> None:
  rows = frame(parts(relearned=0.2), parts(relearn_set="other", adapter="lora4", relearned=0.8))
  rows = rows.drop_duplicates([name for name in rows.columns if name != "value"])
  found = summarize(rows, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]["ga"]["7"]
  assert (found["verdict"], found["relearn_set"], found["adapter"]) == ("OBFUSCATED", "other", "lora4")
  assert "(relearn set other, adapter lora4, learning rate 0.0001)" in found["reason"]


def test_every_relearn_set_and_adapter_needs_its_range_of_rates() -> None:
  rows = frame(parts(**ERASED), parts(**ERASED | {"adapter": "lora4", "rates": (1e-4,), "attacked": (1.0,)}))
  rows = rows.drop_duplicates([name for name in rows.columns if name != "value"])
  found = summarize(rows, {"leakage": CHECKED, "settings": SETTINGS})["verdicts"]["ga"]["7"]
  assert found["verdict"] == "INCONCLUSIVE"
  assert "this attack alone (adapter lora4, learning rate 0.0001); rates still to be tried: 0.0003" in found["reason"]


def test_a_control_that_was_given_stands_beside_every_method() -> None:
  found = judged(loaded=True, facts={"loaded": True, "control": "the control (a checkpoint)"})
  assert found["verdict"] == "OBFUSCATED" and "moved the control (a checkpoint) from" in found["reason"]


def test_limits_stay_within_what_is_possible() -> None:
  found = judged(relearned=(1.0, 1.0, 0.1))
  assert found["high"] <= 1 and found["low"] <= found["excess"]
