"""Several methods in one audit, side by side, and sweeps of their settings, on an audit of seconds."""

import dataclasses
import json
import pathlib
import runpy
from typing import Any

import pytest

from relearn_jax.audit.audit_config import Audit, unlearn_method
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.sweep import Sweep, candidates, choose, sweep, sweep_table
from relearn_jax.cases.names import CHOSEN
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.objectives.methods import METHODS
from relearn_jax.report.stored import closing
from relearn_jax.report.tables import half, methods_table

from ..command import ROOT, TINY, relearn, summary
from .tiny import audited, tiny_names

BOTH = ("ga", "npo_gd+averaging")


def tiny(**changes: Any) -> Audit:
  return tiny_names(**{
      "arms__pretrain__hidden_size": 32, "arms__pretrain__num_layers": 2, "arms__pretrain__steps": 40,
      "case__num_questions": 12, "memorize__steps": 30, "unlearn__max_score": 0.5, "verdict__draws": 200,
      "attack__keep_steps": (1, 2), "unlearn__settings__npo_gd__learning_rate": 1e-3, **changes})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("methods") / "run"
  config = tiny(unlearn__methods=BOTH)
  audited(config, workdir, cache)
  assert not audit(config, "here", workdir, cache)
  return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """An audit of gradient ascent alone."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  audited(tiny(), workdir, cache)
  return workdir


def test_methods_of_one_audit_are_what_each_is_alone(compared: pathlib.Path, alone: pathlib.Path) -> None:
  single, among = summary(alone), summary(compared)
  assert among["methods"] == list(BOTH) and list(among["verdicts"]) == list(BOTH)
  of = lambda cells: [cell for cell in cells if cell["method"] in ("ga", None)]
  assert single["cells"] == of(among["cells"]) and single["trajectory"] == of(among["trajectory"])
  for part in ("verdicts", "selection"):
    assert single[part]["ga"] == among[part]["ga"]
  assert {cell["method"] for cell in among["cells"]} == {*BOTH, None}
  assert [cell["method"] for cell in among["cells"] if cell["arm"] == "O"].count(None) == len(
      [cell for cell in single["cells"] if cell["arm"] == "O"])  # attacked once
  settings = json.loads((compared / "config.json").read_text())["unlearn"]["settings"]
  assert list(settings) == list(BOTH) and settings["ga"]["learning_rate"] == 1e-3
  assert settings["npo_gd+averaging"]["average_every"] == 5
  logged = {json.loads(line)["stage"] for line in (compared / "train_log.jsonl").read_text().splitlines()}
  assert logged - {"pretrain"} == {"memorize", *(f"unlearn-{name}" for name in BOTH), *(
      f"attack-{name}-prefixes-full-seed{seed}" for name in BOTH for seed in (0, 1))}


def test_what_methods_side_by_side_show(compared: pathlib.Path) -> None:
  found = json.loads((compared / "summary.json").read_text())
  table = methods_table(found, "7")
  assert [line[0] for line in table.rows] == list(BOTH) and len(table.head) == len(table.rows[0])
  steps = [at[0] if at else None for at in found["selection"]["ga"]["7"].values()]
  assert ", ".join("never" if step is None else str(step) for step in steps) in table.rows[0]
  page = (compared / "report.html").read_text()
  assert "Methods side by side" in page and 'id="npo_gd+averaging"' in page and "unlearn.settings.ga.beta" not in page
  assert "unlearn.settings.npo_gd+averaging.average_every" in page
  assert "npo_gd+averaging" in closing(compared) and "| ga |" in (compared / "report.md").read_text()
  assert {path.name for path in (compared / "figures").iterdir()} == {*BOTH, "methods.png"}


def test_a_comparison_is_rendered_again_without_a_model(compared: pathlib.Path, cache: pathlib.Path) -> None:
  before = (compared / "report.html").read_text()
  (compared / "report.html").unlink()
  done = relearn(cache, "report", f"--workdir={compared}", JAX_PLATFORMS="no_such_platform")
  assert "npo_gd+averaging" in done.stdout and (compared / "report.html").read_text() == before


def test_steps_until_half_is_back() -> None:
  cell = lambda mean, step=0: {"mean": mean, "relearn_step": step}
  curve = [cell(0.1, 1), cell(0.45, 5), cell(0.5, 10), cell(0.4, 20)]
  assert half(cell(0.9), cell(0.1), curve) == 10
  assert half(cell(0.9), cell(0.3), curve) is None  # 0.6 is never reached
  assert half(cell(0.2), cell(0.2), curve) is None and half(None, cell(0.0), curve) is None


def test_every_method_is_compared_with_settings_that_were_chosen() -> None:
  config = load_config_file(str(ROOT / "configs" / "methods.py"))
  defended = runpy.run_path(str(ROOT / "configs" / "methods.py"))["DEFENDED"]
  assert config.unlearn.methods == (*METHODS, *defended)
  grids = load_config_file(str(ROOT / "configs" / "sweep.py")).grids
  assert set(grids) == set(config.unlearn.methods) == set(CHOSEN)
  for name, chosen in CHOSEN.items():
    assert chosen in candidates(grids[name]), name
    made = unlearn_method(config.unlearn, name)
    assert {k: v for k, v in chosen.items() if k != "learning_rate"}.items() <= dict(made.recipe.hyper).items()
    assert made.learning_rate == chosen["learning_rate"]


def test_what_was_set_stands_before_what_was_chosen_for_a_pair() -> None:
  config = load_config_file(str(ROOT / "configs" / "methods.py"))
  config.unlearn.settings.npo_gd = dataclasses.replace(config.unlearn.settings.npo_gd, learning_rate=3e-3)
  made = unlearn_method(config.unlearn, "npo_gd+averaging")
  assert made.learning_rate == 3e-3 and made.recipe.hyper["retain_weight"] == 10.0  # 50 of the method alone
  assert unlearn_method(config.unlearn, "npo_gd").recipe.hyper["retain_weight"] == 50.0


@pytest.mark.parametrize("methods,field,word", [
    ((), "unlearn.methods", "distinct"), (("ga", "ga"), "unlearn.methods", "distinct"),
    (("gaa",), "unlearn.methods", "nearest: ga"), (("ga+smooth",), "unlearn.methods", "nearest: smoothing")])
def test_comparisons_that_cannot_be(methods: tuple[str, ...], field: str, word: str, tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError, match=word) as caught:
    audit(tiny(unlearn__methods=methods), "here", tmp_path / "x", tmp_path)
  assert caught.value.field == field and not (tmp_path / "x").exists()


def test_a_sweep_tries_what_audits_would_do(alone: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  """Each candidate's runs unlearn as they would alone, and nothing is relearned."""
  grid = {"learning_rate": (1e-3, 1e-5)}
  config = Sweep({"ga": grid, "npo": grid}, methods=("ga",), audit=tiny())
  found = sweep(config, "here", tmp_path / "sweep", cache)
  tried = found["ga"]["tried"]
  assert [one["settings"] for one in tried] == [{"learning_rate": 1e-3}, {"learning_rate": 1e-5}]
  selection = summary(alone)["selection"]["ga"]["7"]
  assert tried[0]["steps"] == [steps[0] if steps else None for steps in selection.values()]
  stages = {path.name for path in (tmp_path / "sweep" / "checkpoints").iterdir() if path.is_dir()}
  assert "memorize" in stages and not [name for name in stages if name.startswith("attack")]
  assert found["ga"]["chosen"] in (one["settings"] for one in tried) and "| ga |" in sweep_table(found)
  assert sweep(config, "here", tmp_path / "sweep", cache) == found


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
    sweep(Sweep(grids, tiny(), methods), "here", tmp_path / "x", tmp_path)
  assert caught.value.field == field and not (tmp_path / "x").exists()


def test_both_are_commands(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  small = [flag.replace("--config.", "--config.audit.") for flag in TINY]
  flags = [f"--config={ROOT / 'configs' / 'sweep.py'}", f"--workdir={tmp_path / 'x'}", *small]
  refused = relearn(cache, "sweep", *flags, "--config.methods=('nop',)", status=2)
  assert "`methods` has 'nop', for which there is no grid" in refused.stderr
  flags = [f"--config={ROOT / 'configs' / 'methods.py'}", f"--workdir={tmp_path / 'x'}", *TINY,
           "--config.unlearn.methods=('nop',)"]
  refused = relearn(cache, "audit", *flags, status=2, JAX_PLATFORMS="no_such_platform")
  assert "'nop', which is no unlearning method (nearest: npo" in refused.stderr
