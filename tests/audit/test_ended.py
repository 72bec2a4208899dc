"""Runs of an audit that are not finite: named in the facts, absent from the rows, and nobody else's trouble."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from relearn_jax.audit import release_run, results
from relearn_jax.audit import run as names_run
from relearn_jax.audit.arms import Run, cells_of_seed, select_points
from relearn_jax.audit.base import make_tokenizer
from relearn_jax.audit.command import audit, audit_release
from relearn_jax.audit.comparison import MethodsAudit, compare
from relearn_jax.audit.config import AuditConfig, BaseConfig, MemorizeConfig, RelearnConfig, UnlearnConfig
from relearn_jax.audit.release import AttackSettings, InterviewSettings, ReleaseAudit
from relearn_jax.audit.rows import block, read_rows
from relearn_jax.audit.sweep import Sweep, choose, sweep, sweep_table
from relearn_jax.cases.names import NamesConfig
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.report.comparison import tables
from relearn_jax.training.stage import run_stage

from ..small import MODEL, params, write_lines

KEYS = ["variant", "arm", "point", "depth", "unlearn_step", "relearn_step", "seed", "question", "metric"]


def tiny(rate: float = 1e-3, **changes: Any) -> AuditConfig:
  shape = BaseConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, steps=20,
                     warmup_steps=2)
  config = AuditConfig(
      case=NamesConfig(variants=(7,), seeds=(0, 1), num_questions=6), base=shape,
      memorize=MemorizeConfig(steps=10, learning_rate=3e-3), unlearn=UnlearnConfig(max_steps=10, depths=1),
      relearn=RelearnConfig(keep_steps=(1, 3)), checkpoint_seconds=0)
  config.verdict.draws = 100
  rates = {"ga": dataclasses.replace(config.methods.ga, learning_rate=rate)}
  return dataclasses.replace(config, methods=dataclasses.replace(config.methods, **rates), **changes)


def spoil(monkeypatch: pytest.MonkeyPatch, room: Any, *spoiled: tuple[str, str]) -> None:
  """Gives runs, by stage and name, a learning rate after which nothing is finite."""
  def run(stage: Any, *arguments: Any, **settings: Any) -> None:
    plain = np.broadcast_to(stage.hyper["learning_rate"], len(stage.runs))
    rates = np.array([1e38 if (stage.name, name) in spoiled else rate
                      for name, rate in zip(stage.runs, plain, strict=True)])
    hyper = {**stage.hyper, "learning_rate": rates.astype(np.float32)}
    run_stage(dataclasses.replace(stage, hyper=hyper), *arguments, **settings)
  monkeypatch.setattr(room, "run_stage", run)


def values(rows: pd.DataFrame) -> dict[tuple, float]:
  plain = rows[KEYS].astype(object).where(rows[KEYS].notna(), None)
  return dict(zip(map(tuple, plain.to_numpy()), rows["value"], strict=True))


def test_runs_that_end_have_no_rows_and_the_others_keep_theirs(cache: pathlib.Path, tmp_path: pathlib.Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
  assert audit(tiny(), "here", tmp_path / "plain", cache)
  rows, facts = read_rows(tmp_path / "plain" / "results.parquet")
  assert facts["ended"] == []
  plain = values(rows)

  spoil(monkeypatch, names_run, ("memorize", "N-7-1"), ("relearn-seed0", "U-7-0-depth0"))
  assert audit(tiny(), "here", tmp_path / "spoiled", cache)
  rows, facts = read_rows(tmp_path / "spoiled" / "results.parquet")
  first, second = facts["ended"]
  assert {key: first[key] for key in ("run", "arm", "variant", "seed", "stage", "step")} == {
      "run": "N-7-1", "arm": "N", "variant": "7", "seed": 1, "stage": "memorize", "step": 2}
  assert {key: second[key] for key in ("run", "arm", "variant", "seed", "stage")} == {
      "run": "U-7-0-depth0", "arm": "U", "variant": "7", "seed": 0, "stage": "relearn-seed0"}
  assert second["step"] in (1, 2) and facts["notes"][0].startswith("N-7-1 ended in stage 'memorize' at step 2: ")
  assert facts["notes"][1].endswith("not finite; it has no results from there on.")
  gone = lambda key: ((key[1], key[6]) == ("N", 1)
                      or ((key[1], key[6]) == ("U", 0) and key[2] == "relearned" and key[5] >= second["step"]))
  found = values(rows)
  assert set(found) == {key for key in plain if not gone(key)} and len(found) < len(plain)
  spoiled = lambda key: (key[1], key[6], key[2]) == ("U", 0, "relearned")  # as long as its numbers were finite
  assert {key: value for key, value in found.items() if not spoiled(key)} == {
      key: value for key, value in plain.items() if not spoiled(key) and not gone(key)}
  assert not any("control" in row["completions"] for row in facts["examples"] if row["seed"] == 1)
  assert all("relearned" not in row["completions"] for row in facts["examples"])


def test_an_audit_of_which_no_run_is_left_is_an_error(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  for _ in range(2):
    with pytest.raises(InputError, match="`methods.ga.learning_rate` was 1e.25 when .* ended in stage 'unlearn' at "
                                         "step 2: .* and so did 3 other runs: none is left; lower it"):
      audit(tiny(1e25), "here", tmp_path, cache)
  assert not (tmp_path / "results.parquet").exists()


def test_runs_that_ended_are_not_attacked() -> None:
  u, lost = Run(7, 0, "U"), Run(7, 1, "U")
  curves = {u: {0: 1.0, 5: 0.0, 10: 0.0}, lost: {0: 1.0, 5: 0.0}}
  gone = {lost: 8, Run(7, 0, "N"): 10}
  points = select_points(curves, 0.01, 2, gone)
  assert points == {(7, 0): [5, 10], (7, 1): []}
  config = tiny(unlearn=UnlearnConfig(depths=2))
  missing = lambda seed, gone: [c.name for c in cells_of_seed(config, seed, points, 10, gone) if c.missing]
  assert missing(0, gone) == ["N-7-0-depth1"]
  assert missing(1, gone) == ["U-7-1-depth0", "N-7-1-depth0", "U-7-1-depth1", "N-7-1-depth1"]
  assert "O-7-1" in missing(1, {lost: 0})  # it never memorised


def test_a_value_that_is_not_finite_is_no_row() -> None:
  labels: dict[str, Any] = dict.fromkeys((
      "case", "variant", "method", "arm", "point", "depth", "unlearn_step", "relearn_set", "adapter", "learning_rate",
      "seed", "relearn_step"))
  there = np.array([True, False, True])
  table = block(np.array([0.5, np.nan, 1.0]), ["a", "b", "c"], there, metric="asr", **labels)
  assert table.column("question").to_pylist() == ["a", "c"] and table.column("value").to_pylist() == [0.5, 1.0]
  for bad in (np.nan, -np.inf):
    with pytest.raises(ValueError, match="a value of metric 'asr' is not finite"):
      block(np.array([0.5, 0.0, bad]), ["a", "b", "c"], there, metric="asr", **labels)


def test_a_sweep_names_candidates_that_are_not_finite(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = sweep(Sweep({"ga": {"learning_rate": (1e38, 1e-3)}}, audit=tiny()), "here", tmp_path / "some", cache)
  bad, good = found["ga"]["tried"]
  assert found["ga"]["chosen"] == {"learning_rate": 1e-3} and good["ended"] == [] and bad["unlearned"] == 0
  assert [(one["run"], one["step"]) for one in bad["ended"]] == [("U-7-0-0", 2), ("U-7-1-0", 2)]
  assert bad["last_asr"] == [None, None] and bad["retain"] is None
  table = sweep_table(found)
  assert "0 of 2, 2 not finite" in table and "\nga, learning_rate 1e+38: U-7-1-0 ended in stage 'sweep-ga-0'" in table
  # Of a candidate that lost a run, the others' fall does not count as much.
  assert choose([bad | {"unlearned": 2, "retain": -0.1}, good]) is good
  with pytest.raises(InputError, match="`grids.ga` has no candidate of which a run is left: with learning_rate 1e.38"):
    sweep(Sweep({"ga": {"learning_rate": (1e38,)}}, audit=tiny()), "here", tmp_path / "none", cache)


@pytest.mark.slow
def test_a_comparison_goes_on_without_a_method(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config = tiny(1e38)
  config.methods.gd = dataclasses.replace(config.methods.gd, learning_rate=1e-3)
  assert compare(MethodsAudit(("ga", "gd"), config), "here", tmp_path, cache)
  page = (tmp_path / "comparison.md").read_text()
  assert "ended in stage 'unlearn' at step 2: " in page and "and so did 3 other runs." in page
  rows = json.loads((tmp_path / "comparison.json").read_text())
  (ga, gd), = (table.rows for table in tables(rows))
  assert "not finite" in ga and "not finite" not in gd and rows[1]["ended"] == []
  with pytest.raises(InputError, match="`methods` has no method of which a run is left: .* at step 2: "):
    compare(MethodsAudit(("ga",), config), "here", tmp_path / "none", cache)


def release(root: pathlib.Path, **changes: Any) -> ReleaseAudit:
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
  files = {name: str(root / f"{name}.jsonl") for name in ("forget", "retain", "relearn", "questions")}
  return dataclasses.replace(ReleaseAudit(
      **files, unlearned=str(root / "unlearned"), control=str(root / "control"), seeds=(0, 1), checkpoint_seconds=0,
      attack=AttackSettings(learning_rates=(1e-3,), batch_size=4, keep_steps=(1, 3), runs_at_once=1),
      interview=InterviewSettings(max_new_tokens=3, batch_size=4)), **changes)


@pytest.mark.slow
def test_an_audit_of_checkpoints_goes_on_without_a_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  config = release(tmp_path / "in")
  spoil(monkeypatch, release_run, ("relearn-01", "N-0"))  # a group of one, of which nobody is left
  assert audit_release(config, "here", tmp_path / "audit")
  rows, facts = read_rows(tmp_path / "audit" / "results.parquet")
  one, = facts["ended"]
  assert (one["run"], one["arm"], one["seed"], one["stage"]) == ("N-0", "N", 0, "relearn-01") and one["step"] in (1, 2)
  assert any(note.startswith("N-0 ended in stage 'relearn-01'") for note in facts["notes"])
  there = lambda arm, seed: sorted(rows[(rows["arm"] == arm) & (rows["seed"] == seed)]["relearn_step"].unique())
  assert there("N", 0) == [step for step in (0, 1) if step < one["step"]]
  assert there("N", 1) == there("U", 0) == there("U", 1) == [0, 1, 3]
  everyone = [(f"relearn-{i:02d}", name) for i, name in enumerate(("U-0", "N-0", "U-1", "N-1"))]
  spoil(monkeypatch, release_run, *everyone)
  for _ in range(2):
    with pytest.raises(InputError, match="`attack.learning_rates` was 0.001 when U-0 ended .* and so did 3 other runs"):
      audit_release(config, "here", tmp_path / "none")


def test_a_model_that_gives_no_finite_numbers_is_refused(tmp_path: pathlib.Path) -> None:
  bad = {**params(1), "final_norm": {"weight": jnp.full_like(params()["final_norm"]["weight"], 3e38)}}
  export(bad, MODEL, tmp_path / "in" / "control", tokenizer=make_tokenizer())
  with pytest.raises(InputError, match="in/control: `control` gives no finite numbers"):
    audit_release(release(tmp_path / "in"), "here", tmp_path / "audit")


def test_facts_say_it_in_a_line() -> None:
  note, = results.ended_notes([{"run": "U-7-0", "arm": "U", "variant": "7", "seed": 0, "stage": "memorize", "step": 3,
                                "what": "weights"}])
  assert note == ("U-7-0 ended in stage 'memorize' at step 3: its weights are not finite; it has no results from there "
                  "on.")
