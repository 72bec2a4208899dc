"""Comparisons of methods and sweeps of their settings, on an audit of seconds."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from relearn_jax.audit.command import audit
from relearn_jax.audit.comparison import DEFENDED, MethodsAudit, compare, half, one_audit
from relearn_jax.audit.config import CHOSEN, AuditConfig, BaseConfig, MemorizeConfig, RelearnConfig, UnlearnConfig
from relearn_jax.audit.sweep import Sweep, candidates, choose, sweep, sweep_table
from relearn_jax.cases.names import NamesConfig
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.objectives.methods import METHODS
from relearn_jax.report.comparison import closing, tables

from ..command import ROOT, TINY, relearn, summary


def tiny(**changes: Any) -> AuditConfig:
  base = BaseConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, steps=40)
  config = AuditConfig(
      case=NamesConfig(variants=(7,), seeds=(0, 1), num_questions=12), base=base,
      memorize=MemorizeConfig(steps=30, learning_rate=3e-3), unlearn=UnlearnConfig(max_steps=10, depths=1, max_asr=0.5),
      relearn=RelearnConfig(keep_steps=(1, 2)))
  config.verdict.draws = 200
  rates = {name: dataclasses.replace(getattr(config.methods, name), learning_rate=1e-3) for name in ("ga", "npo_gd")}
  return dataclasses.replace(config, methods=dataclasses.replace(config.methods, **rates), **changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("methods") / "run"
  config = MethodsAudit(methods=("ga", "npo_gd+averaging"), audit=tiny())
  assert compare(config, "here", workdir, cache)
  assert not compare(config, "here", workdir, cache)
  return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """An audit of gradient ascent alone."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  assert audit(tiny(), "here", workdir, cache)
  return workdir


def test_a_comparison_is_its_audits_side_by_side(compared: pathlib.Path, alone: pathlib.Path) -> None:
  rows = json.loads((compared / "comparison.json").read_text())
  assert [row["name"] for row in rows] == ["ga", "npo_gd+averaging"]
  # An audit of one method alone gives the same numbers.
  single, among = summary(alone), summary(compared / "methods" / "ga")
  assert single["cells"] == among["cells"] and single["verdicts"] == among["verdicts"]
  cell = next(c for c in single["cells"] if (c["metric"], c["arm"], c["point"]) == ("asr", "O", "original"))
  assert rows[0]["variants"]["7"]["original"] == cell
  assert rows[0]["settings"]["learning_rate"] == 1e-3 and rows[1]["settings"]["average_every"] == 5
  for row in rows:
    folder = compared / "methods" / row["name"]
    assert {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()} == {"scores"}  # no weights
    assert (folder / "report.html").exists()
  assert not (compared / "shared").exists()


def test_what_a_comparison_shows(compared: pathlib.Path) -> None:
  rows = json.loads((compared / "comparison.json").read_text())
  table, = tables(rows)
  assert [line[0] for line in table.rows] == ["ga", "npo_gd+averaging"] and len(table.head) == len(table.rows[0])
  page = (compared / "comparison.html").read_text()
  assert 'href="methods/npo_gd%2Baveraging/report.html"' in page and "Settings" in page
  assert "npo_gd+averaging" in closing(compared) and "| ga |" in (compared / "comparison.md").read_text()


def test_a_comparison_is_rendered_again_without_a_model(compared: pathlib.Path, cache: pathlib.Path) -> None:
  before = (compared / "comparison.html").read_text()
  (compared / "comparison.html").unlink()
  done = relearn(cache, "report", f"--workdir={compared}", JAX_PLATFORMS="no_such_platform")
  assert "npo_gd+averaging" in done.stdout and (compared / "comparison.html").read_text() == before


def test_steps_until_half_is_back() -> None:
  cell = lambda mean, step=0: {"mean": mean, "relearn_step": step}
  curve = [cell(0.1, 1), cell(0.45, 5), cell(0.5, 10), cell(0.4, 20)]
  assert half(cell(0.9), cell(0.1), curve) == 10
  assert half(cell(0.9), cell(0.3), curve) is None  # 0.6 is never reached
  assert half(cell(0.2), cell(0.2), curve) is None and half(None, cell(0.0), curve) is None


def test_every_method_is_compared_with_settings_that_were_chosen() -> None:
  config = load_config_file(str(ROOT / "configs" / "methods.py"))
  assert config.methods == (*METHODS, *DEFENDED)
  grids = load_config_file(str(ROOT / "configs" / "sweep.py")).grids
  assert set(grids) == set(config.methods) == set(CHOSEN)
  for name, chosen in CHOSEN.items():
    assert chosen in candidates(grids[name]), name
    made = one_audit(config.audit, name)
    assert {k: v for k, v in chosen.items() if k != "learning_rate"}.items() <= dict(made.recipe.hyper).items()
    assert made.method_config.learning_rate == chosen["learning_rate"]


@pytest.mark.parametrize("methods,field,word", [
    ((), "methods", "distinct"), (("ga", "ga"), "methods", "distinct"), (("gaa",), "methods", "nearest: ga"),
    (("ga+smooth",), "methods", "nearest: smoothing")])
def test_comparisons_that_cannot_be(methods: tuple[str, ...], field: str, word: str, tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError, match=word) as caught:
    compare(MethodsAudit(methods=methods), "here", tmp_path / "x", tmp_path)
  assert caught.value.field == field and not (tmp_path / "x").exists()


def test_a_sweep_tries_what_audits_would_do(alone: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  """Each candidate's runs unlearn as they would alone, and nothing is relearned."""
  config = tiny()
  grid = {"learning_rate": (1e-3, 1e-5)}
  found = sweep(Sweep({"ga": grid, "npo": grid}, methods=("ga",), audit=config), "here", tmp_path / "sweep", cache)
  tried = found["ga"]["tried"]
  assert [one["settings"] for one in tried] == [{"learning_rate": 1e-3}, {"learning_rate": 1e-5}]
  selection = summary(alone)["selection"]["7"]
  assert tried[0]["steps"] == [steps[0] if steps else None for steps in selection.values()]
  assert not list((tmp_path / "sweep" / "checkpoints").glob("relearn*"))
  assert found["ga"]["chosen"] in (one["settings"] for one in tried) and "| ga |" in sweep_table(found)
  again = sweep(Sweep({"ga": grid, "npo": grid}, methods=("ga",), audit=config), "here", tmp_path / "sweep", cache)
  assert again == found


def test_the_rule_of_choice() -> None:
  one = lambda unlearned, retain, ended=(): {"unlearned": unlearned, "retain": retain, "ended": list(ended)}
  assert choose([one(2, -3.0), one(2, -1.0), one(1, -0.1)]) == one(2, -1.0)  # all runs first, then what is kept
  assert choose([one(0, None), one(1, -9.0)]) == one(1, -9.0)
  assert choose([one(0, None), one(0, None)]) == one(0, None)
  assert choose([one(2, -1.0, ["U-7-0"]), one(0, None)]) == one(0, None)  # a run that ended puts a candidate last


@pytest.mark.parametrize("grids,methods,field", [
    ({"ga": {"beta": (0.1,)}}, (), "grids.ga.beta"), ({"ga": {"learning_rate": (0.0,)}}, (), "grids.ga.learning_rate"),
    ({"npo": {"beta": (0.1, 0.0)}}, (), "grids.npo.beta"), ({"ga": {}}, ("npo",), "methods"),
    ({"nope": {}}, (), "methods")])
def test_sweeps_that_cannot_be(grids: Any, methods: tuple[str, ...], field: str, tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError) as caught:
    sweep(Sweep(grids, methods), "here", tmp_path / "x", tmp_path)
  assert caught.value.field == field and not (tmp_path / "x").exists()


def test_both_are_commands(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  small = [flag.replace("--config.", "--config.audit.") for flag in TINY if "relearn" not in flag]
  some = ["--config.methods=('ga',)", "--config.methods=('nop',)"]
  flags = [f"--config={ROOT / 'configs' / 'sweep.py'}", f"--workdir={tmp_path / 'x'}", *small]
  assert "`methods` has 'nop', for which there is no grid" in relearn(cache, "sweep", *flags, some[1], status=2).stderr
  flags[0] = f"--config={ROOT / 'configs' / 'methods.py'}"
  refused = relearn(cache, "audit", *flags, some[1], status=2, JAX_PLATFORMS="no_such_platform")
  assert "'nop', which is no unlearning method (nearest: npo" in refused.stderr
