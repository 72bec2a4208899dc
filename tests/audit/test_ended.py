"""Runs of an audit that are not finite: named in the facts, absent from the rows, and nobody else's trouble."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from relearn_jax.audit import acquire
from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.facts import ended_notes
from relearn_jax.audit.grid import Chain, select_points, trained_points
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.results_file import answer_rows, read_rows
from relearn_jax.audit.sweep import Sweep, choose, sweep, sweep_table
from relearn_jax.audit.unlearning import resolved
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.report.tables import methods_table
from relearn_jax.training.stage import run_stage

from ..small import MODEL, make_tokenizer, params, write_lines
from .tiny import audited, loaded_audit, tiny_names

KEYS = ["variant", "arm", "method", "point", "depth", "unlearn_step", "relearn_step", "seed", "question", "metric"]


def tiny(rate: float = 1e-3, **changes: Any) -> Audit:
  return tiny_names(unlearn__settings__ga__learning_rate=rate, **changes)


def spoil(monkeypatch: pytest.MonkeyPatch, *spoiled: tuple[str, str]) -> None:
  """Gives runs, by stage and name, a learning rate after which nothing is finite."""
  def run(stage: Any, *arguments: Any, **settings: Any) -> None:
    plain = np.broadcast_to(stage.hyper["learning_rate"], len(stage.runs))
    rates = np.array([1e38 if (stage.name, name) in spoiled else rate
                      for name, rate in zip(stage.runs, plain, strict=True)])
    hyper = {**stage.hyper, "learning_rate": rates.astype(np.float32)}
    run_stage(dataclasses.replace(stage, hyper=hyper), *arguments, **settings)
  monkeypatch.setattr(acquire, "run_stage", run)


def values(rows: pd.DataFrame) -> dict[tuple, float]:
  plain = rows[KEYS].astype(object).where(rows[KEYS].notna(), None)
  return dict(zip(map(tuple, plain.to_numpy()), rows["value"], strict=True))


def test_runs_that_end_have_no_rows_and_the_others_keep_theirs(cache: pathlib.Path, tmp_path: pathlib.Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
  assert audit(tiny(), "here", tmp_path / "plain", cache)
  rows, facts = read_rows(tmp_path / "plain" / "results.parquet")
  assert facts["ended"] == []
  plain = values(rows)

  spoil(monkeypatch, ("memorize", "N-7-1"), ("attack-ga-prefixes-full-seed0", "U-7-0-depth0-lr0.0001"))
  assert audit(tiny(), "here", tmp_path / "spoiled", cache)
  rows, facts = read_rows(tmp_path / "spoiled" / "results.parquet")
  first, second = facts["ended"]
  assert {key: first[key] for key in ("run", "arm", "variant", "method", "seed", "stage", "step")} == {
      "run": "N-7-1", "arm": "N", "variant": "7", "method": None, "seed": 1, "stage": "memorize", "step": 2}
  assert {key: second[key] for key in ("run", "arm", "variant", "seed", "stage")} == {
      "run": "U-7-0-depth0-lr0.0001", "arm": "U", "variant": "7", "seed": 0, "stage": "attack-ga-prefixes-full-seed0"}
  assert second["step"] in (1, 2) and facts["notes"][0].startswith("N-7-1 ended in stage 'memorize' at step 2: ")
  assert facts["notes"][1].endswith("not finite; it has no results from there on.")
  gone = lambda key: ((key[1], key[7]) == ("N", 1)
                      or ((key[1], key[7]) == ("U", 0) and key[3] == "relearned" and key[6] >= second["step"]))
  found = values(rows)
  assert set(found) == {key for key in plain if not gone(key)} and len(found) < len(plain)
  spoiled = lambda key: (key[1], key[7], key[3]) == ("U", 0, "relearned")  # as long as its numbers were finite
  assert {key: value for key, value in found.items() if not spoiled(key)} == {
      key: value for key, value in plain.items() if not spoiled(key) and not gone(key)}
  assert not any("control" in row["completions"] for row in facts["examples"] if row["seed"] == 1)
  assert all("relearned" not in row["completions"] for row in facts["examples"])


def test_an_audit_of_which_no_run_is_left_is_an_error(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  for _ in range(2):
    with pytest.raises(InputError, match="`unlearn.settings.ga.learning_rate` was 1e.25 when .* ended in stage "
                                         "'unlearn-ga' at step 2: .* and so did 3 other runs: none is left; lower it"):
      audit(tiny(1e25), "here", tmp_path, cache)
  assert not (tmp_path / "results.parquet").exists()


def test_runs_that_ended_are_not_attacked(tmp_path: pathlib.Path) -> None:
  u, lost = Chain("U", "7", 0), Chain("U", "7", 1)
  curves = {u: {0: 1.0, 5: 0.0, 10: 0.0}, lost: {0: 1.0, 5: 0.0}}
  gone = {lost: 8, Chain("N", "7", 0): 10}
  points = select_points(curves, 0.01, 2, gone)
  assert points == {u: [5, 10], lost: []}
  exp = Experiment(tiny(unlearn__depths=2), "here", tmp_path)
  missing = lambda seed, gone: [
      point.name for point in trained_points(exp.config, "ga", seed, original=True)
      if resolved(exp, point, {"ga": points}, {None: {c: s for c, s in gone.items() if s == 0}, "ga": gone}) is None]
  assert missing(0, gone) == ["N-7-0-depth1"]
  assert missing(1, gone) == ["U-7-1-depth0", "N-7-1-depth0", "U-7-1-depth1", "N-7-1-depth1"]
  assert "O-7-1" in missing(1, {lost: 0})  # it never memorised


def test_a_value_that_is_not_finite_is_no_row() -> None:
  labels: dict[str, Any] = dict.fromkeys((
      "case", "variant", "method", "arm", "point", "depth", "unlearn_step", "relearn_set", "adapter", "learning_rate",
      "seed", "relearn_step"))
  there = np.array([True, False, True])
  table = answer_rows("retain", ["a", "b", "c"], np.array([0.5, np.nan, 1.0]), [3, 0, 4], there=there, **labels)
  assert table.column("item").to_pylist() == ["a", "c"]
  assert table.column("tokens").to_pylist() == [3, 4] and table.column("logprob").to_pylist() == [0.5, 1.0]
  for bad in (np.nan, -np.inf):
    with pytest.raises(ValueError, match="a log-probability of retain rows is not finite"):
      answer_rows("retain", ["a", "b", "c"], np.array([0.5, 0.0, bad]), [3, 0, 4], there=there, **labels)


def test_a_sweep_names_candidates_that_are_not_finite(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = sweep(Sweep({"ga": {"learning_rate": (1e38, 1e-3)}}, audit=tiny()), "here", tmp_path / "some", cache)
  bad, good = found["ga"]["tried"]
  assert found["ga"]["chosen"] == {"learning_rate": 1e-3} and good["ended"] == [] and bad["unlearned"] == 0
  assert [(one["run"], one["step"]) for one in bad["ended"]] == [("U-7-0-0", 2), ("U-7-1-0", 2)]
  assert bad["last_score"] == [None, None] and bad["retain"] is None
  table = sweep_table(found)
  assert "0 of 2, 2 not finite" in table and "\nga, learning_rate 1e+38: U-7-1-0 ended in stage 'sweep-ga-0'" in table
  # Of a candidate that lost a run, the others' fall does not count as much.
  assert choose([bad | {"unlearned": 2, "retain": -0.1}, good]) is good
  with pytest.raises(InputError, match="`grids.ga` has no candidate of which a run is left: with learning_rate 1e.38"):
    sweep(Sweep({"ga": {"learning_rate": (1e38,)}}, audit=tiny()), "here", tmp_path / "none", cache)


@pytest.mark.slow
def test_the_other_methods_go_on_without_one(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  both = {"unlearn__methods": ("ga", "gd"), "unlearn__settings__gd__learning_rate": 1e-3}
  found = audited(tiny(1e38, **both), tmp_path / "both", cache)
  notes = [note for note in found["notes"] if "ended in stage 'unlearn-ga' at step 2: " in note]
  assert len(notes) == 4 and {one["method"] for one in found["ended"]} == {"ga"}
  assert found["selection"]["ga"]["7"] == {"0": [], "1": []} and found["selection"]["gd"]["7"] != {"0": [], "1": []}
  assert {cell["method"] for cell in found["cells"]} == {"gd", None}
  verdicts = {method: of["7"] for method, of in found["verdicts"].items()}
  assert "no run reached an unlearned point" in verdicts["ga"]["reason"]
  assert "no run reached" not in verdicts["gd"]["reason"] and "ended" not in verdicts["gd"]["reason"]
  ga, gd = methods_table(found, "7").rows
  assert ga[0] == "ga" and ga[2] == "–" and "not finite, not finite" in ga and gd[2] != "–"
  assert "not finite" not in " ".join(gd)
  page = (tmp_path / "both" / "report.md").read_text()
  assert all(note in page for note in notes)
  with pytest.raises(InputError, match="`unlearn.settings.ga.learning_rate` .* at step 2: "):
    audit(tiny(1e38), "here", tmp_path / "none", cache)


def release(root: pathlib.Path, **changes: Any) -> Audit:
  """U, N and four files."""
  names = "James Robert John Michael David William Richard Joseph".split()
  root.mkdir(exist_ok=True)
  for name, seed in (("unlearned", 0), ("control", 1)):
    if not (root / name).exists():
      export(params(seed), MODEL, root / name, tokenizer=make_tokenizer())
  write_lines(root / "questions.jsonl", [{"id": i, "prompt": " ".join(names[i:i + 2]), "answer": " Mark",
                                          "keywords": ["Mark"]} for i in range(3)])
  write_lines(root / "relearn.jsonl", [{"text": f"{one} {two}"} for one, two in zip(names, names[1:], strict=False)])
  write_lines(root / "forget.jsonl", [{"text": "Anthony Mark"}])
  write_lines(root / "retain.jsonl", [{"text": "James Robert John"}])
  return loaded_audit(root, {"unlearned": "unlearned", "control": "control"}, **{
      "seeds": (0, 1), "checkpoint_seconds": 0.0, "attack__learning_rates": (1e-3,), "attack__batch_size": 4,
      "attack__keep_steps": (1, 3), "attack__runs_at_once": 1, "ask__max_new_tokens": 3, "ask__batch_size": 4,
      **changes})


@pytest.mark.slow
def test_an_audit_of_checkpoints_goes_on_without_a_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  config = release(tmp_path / "in")
  spoil(monkeypatch, ("attack-relearn-full-part1", "N-given-0-depth0-lr0.001"))  # one of its own
  assert audit(config, "here", tmp_path / "audit", tmp_path)
  rows, facts = read_rows(tmp_path / "audit" / "results.parquet")
  one, = facts["ended"]
  assert (one["run"], one["arm"], one["seed"], one["stage"]) == (
      "N-given-0-depth0-lr0.001", "N", 0, "attack-relearn-full-part1") and one["step"] in (1, 2)
  assert any(note.startswith(f"{one['run']} ended in stage 'attack-relearn-full-part1'") for note in facts["notes"])
  there = lambda arm, seed: sorted(rows[(rows["arm"] == arm) & (rows["seed"] == seed)]["relearn_step"].unique())
  assert there("N", 0) == [step for step in (0, 1) if step < one["step"]]
  assert there("N", 1) == there("U", 0) == there("U", 1) == [0, 1, 3]
  everyone = [(f"attack-relearn-full-part{i}", f"{name}-depth0-lr0.001")
              for i, name in enumerate(("U-given-0", "N-given-0", "U-given-1", "N-given-1"))]
  spoil(monkeypatch, *everyone)
  for _ in range(2):
    with pytest.raises(InputError, match="`attack.learning_rates` was 0.001 when U-given-0-.* and so did 3 other runs"):
      audit(config, "here", tmp_path / "none", tmp_path)


def test_a_model_that_gives_no_finite_numbers_is_refused(tmp_path: pathlib.Path) -> None:
  bad = {**params(1), "final_norm": {"weight": jnp.full_like(params()["final_norm"]["weight"], 3e38)}}
  export(bad, MODEL, tmp_path / "in" / "control", tokenizer=make_tokenizer())
  with pytest.raises(InputError, match="in/control: `arms.control` gives no finite numbers"):
    audit(release(tmp_path / "in"), "here", tmp_path / "audit", tmp_path)


def test_facts_say_it_in_a_line() -> None:
  note, = ended_notes([{"run": "U-7-0", "arm": "U", "variant": "7", "seed": 0, "stage": "memorize", "step": 3,
                                "what": "weights"}])
  assert note == ("U-7-0 ended in stage 'memorize' at step 3: its weights are not finite; it has no results from there "
                  "on.")
