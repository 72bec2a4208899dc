"""The grid of an audit: it grows in a finished workdir, its cells share a program, its answers are scored again."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from relearn_jax.audit import pipeline
from relearn_jax.audit.audit_config import Audit, recorded
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.results_file import ANSWERS, KEY, read_rows
from relearn_jax.audit.stages import plan_stages
from relearn_jax.errors import InputError
from relearn_jax.metrics.scores import Asked, Stored, rouge_l
from relearn_jax.models.export import export
from relearn_jax.workdir import to_dict

from ..command import relearn
from ..small import MODEL, make_tokenizer, params, write_lines
from .tiny import audited, loaded_audit, tiny_names

GROWN = [  # each with all that came before it
    {}, {"attack__learning_rates": (1e-4, 1e-3)}, {"unlearn__methods": ("ga", "gd")}, {"seeds": (0, 1, 2)}]
NEW_STAGES = [  # trained after each; of memorised controls no weights are kept for another method
    {"pretrain", "memorize", "unlearn-ga", "attack-ga-prefixes-full-seed0", "attack-ga-prefixes-full-seed1"},
    {"attack-ga-prefixes-full-seed0-2", "attack-ga-prefixes-full-seed1-2"},
    {"memorize-2", "unlearn-gd", *(f"attack-gd-prefixes-full-seed{seed}" for seed in (0, 1))},
    {"memorize-3", "unlearn-ga-2", "unlearn-gd-2", *(f"attack-{name}-prefixes-full-seed2" for name in ("ga", "gd"))}]


def tiny(**changes: Any) -> Audit:
  return tiny_names(**{"unlearn__max_score": 0.5, "unlearn__settings__gd__learning_rate": 1e-3, **changes})


def grown(number: int) -> Audit:
  """The grid after so many enlargements."""
  return tiny(**{key: value for changes in GROWN[:number + 1] for key, value in changes.items()})


def values(workdir: pathlib.Path, name: str) -> pd.Series:
  """Every value of results.parquet, or log-probability of answers.parquet, by its whole key."""
  rows, _ = read_rows(workdir / f"{name}.parquet", *([ANSWERS] if name == "answers" else []))
  value = "logprob" if name == "answers" else "value"
  keys = [column for column in rows.columns if column != value]
  plain = rows[keys].astype(object).where(rows[keys].notna(), "")
  found = pd.Series(rows[value].to_numpy(), pd.MultiIndex.from_frame(plain))
  assert found.index.is_unique
  return found


def logged(workdir: pathlib.Path) -> dict[str, list[str]]:
  """Stage -> its lines in the log."""
  found: dict[str, list[str]] = {}
  for line in (workdir / "train_log.jsonl").read_text().splitlines():
    found.setdefault(json.loads(line)["stage"], []).append(line)
  return found


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """A workdir that has grown three times; every state of it is kept beside it."""
  root = tmp_path_factory.mktemp("growing")
  workdir = root / "run"
  for number in range(len(GROWN)):
    audited(grown(number), workdir, cache)
    (root / str(number)).mkdir()
    for name in ("answers.parquet", "results.parquet", "train_log.jsonl", "config.json", "summary.json"):
      shutil.copy(workdir / name, root / str(number))
  return workdir


@pytest.mark.parametrize("number", range(1, len(GROWN)))
def test_a_larger_grid_keeps_what_is_there(growing: pathlib.Path, number: int) -> None:
  old, new = growing.parent / str(number - 1), growing.parent / str(number)
  for name in ("answers", "results"):
    before, after = values(old, name), values(new, name)
    assert before.index.isin(after.index).all() and len(after) > len(before)
    pd.testing.assert_series_equal(after.reindex(before.index), before, check_exact=True)
  lines, more = logged(old), logged(new)
  assert more.keys() - lines.keys() == NEW_STAGES[number]  # and no stage that was there was trained again
  assert all(more[stage] == lines[stage] for stage in lines)
  assert json.loads((new / "config.json").read_text()) == to_dict(recorded(grown(number)))
  stages = plan_stages(grown(number), ["prefixes"])
  assert set(json.loads((new / "summary.json").read_text())["seconds"]) == {stage.name for stage in stages}


@pytest.mark.slow  # tests/training/test_step.py has runs beside each other that are the runs alone
def test_models_that_follow_each_other_are_those_that_are_trained_together(
    growing: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Controls unlearn after their partners, as far as these did."""
  config = grown(0)
  config.memorize.runs_at_once, config.unlearn.runs_at_once, config.attack.runs_at_once = 3, 1, 2
  audited(config, tmp_path, cache)
  together = values(growing.parent / "0", "results")
  apart = values(tmp_path, "results")
  assert set(apart.index) == set(together.index)
  # A loop over one run is compiled to other sums than one over several.
  np.testing.assert_allclose(apart.reindex(together.index).astype(float), together.astype(float), rtol=0, atol=1e-5)
  runs = lambda stage: set(json.loads((tmp_path / "checkpoints" / stage / "runs.json").read_text()))
  assert runs("memorize-part1") == {"N-7-1"} and runs("unlearn-ga-part2") == {"N-7-0"}
  last = {row: json.loads(lines[-1])["step"] for row, lines in logged(tmp_path).items()}
  assert last["unlearn-ga-part0"] == last["unlearn-ga-part2"]


def test_a_stage_of_a_larger_grid_holds_what_was_left(growing: pathlib.Path) -> None:
  runs = lambda stage: set(json.loads((growing / "checkpoints" / stage / "runs.json").read_text()))
  assert runs("memorize-2") == {"N-7-0", "N-7-1"} and runs("memorize-3") == {"U-7-2", "N-7-2"}
  assert runs("unlearn-ga-2") == runs("unlearn-gd-2") == {"U-7-2", "N-7-2"}
  old, new = (runs(f"attack-ga-prefixes-full-seed0{number}") for number in ("", "-2"))
  assert {name.split("-lr")[1] for name in old} == {"0.0001"} and {name.split("-lr")[1] for name in new} == {"0.001"}
  assert not any(name.startswith("O") for name in runs("attack-gd-prefixes-full-seed0"))  # attacked beside "ga"


@pytest.mark.slow
def test_a_grid_that_grew_is_what_it_would_have_been_at_once(growing: pathlib.Path, cache: pathlib.Path,
                                                             tmp_path: pathlib.Path) -> None:
  audited(grown(3), tmp_path, cache)
  first, last = values(tmp_path, "results"), values(growing, "results")
  assert set(first.index) == set(last.index)
  np.testing.assert_allclose(last.reindex(first.index).astype(float), first.astype(float), rtol=0, atol=1e-6)
  assert set(logged(growing.parent / "0")) == NEW_STAGES[0]


@pytest.mark.parametrize(("changes", "field"), [
    ({"seeds": (0, 1)}, r"seeds: \[0, 1\] here, \[0, 1, 2\] there"),
    ({"attack__learning_rates": (1e-3,)}, r"attack.learning_rates: \[0.001\] here"),
    ({"unlearn__methods": ("gd",)}, r"unlearn.methods: \['gd'\] here"),
    ({"unlearn__depths": 2}, "unlearn.depths: 2 here, 1 there"),
    ({"attack__keep_steps": (1, 3, 5)}, "attack.keep_steps"),
    ({"unlearn__settings__ga__learning_rate": 1e-2}, "unlearn.settings.ga.learning_rate: 0.01 here, 0.001 there")])
def test_a_grid_that_is_smaller_or_another_is_refused(growing: pathlib.Path, cache: pathlib.Path,
                                                      changes: dict[str, Any], field: str) -> None:
  whole = {key: value for more in GROWN for key, value in more.items()}
  before = (growing / "config.json").read_bytes()
  with pytest.raises(InputError, match=field):
    audit(tiny(**whole | changes), "here", growing, cache)
  assert (growing / "config.json").read_bytes() == before and (growing / "report.html").exists()


def test_config_json_holds_what_was_used_alone(growing: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = json.loads((growing / "config.json").read_text())
  assert set(found) == {"case", "seeds", "arms", "memorize", "unlearn", "attack", "ask", "verdict", "allowed_lines"}
  assert set(found["arms"]) == {"dtype", "pretrain"} and set(found["unlearn"]["settings"]) == {"ga", "gd"}
  assert not {"defences", "chosen"} & set(found["unlearn"])
  assert not {"lora", "search", "runs_at_once"} & set(found["attack"])
  assert not {"runs_at_once", "metrics"} & set(found["ask"])
  assert found["unlearn"]["settings"]["ga"] == {"learning_rate": 1e-3, "weight_decay": 0.0}
  some = to_dict(recorded(tiny(attack__adapters=("full", "lora4"), attack__search__trials=2)))["attack"]
  assert some["lora"]["rank"] == 16 and some["search"]["trials"] == 2
  loaded = to_dict(recorded(loaded_audit(tmp_path, {"unlearned": "u"})))
  assert not {"memorize", "unlearn"} & set(loaded) and not {"start", "pretrain"} & set(loaded["arms"])
  # What decides nothing may change, and what is not used does not make another configuration.
  same = tiny(keep_weights=True, checkpoint_seconds=9.0, attack__runs_at_once=3, ask__runs_at_once=2,
              ask__metrics=("rouge_l",), attack__lora__rank=7, unlearn__settings__npo__learning_rate=0.5)
  assert to_dict(recorded(same)) == to_dict(recorded(tiny()))


def test_a_metric_is_added_without_a_model(growing: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  workdir = tmp_path / "run"
  shutil.copytree(growing, workdir, ignore=shutil.ignore_patterns("checkpoints"))
  assert not (workdir / "checkpoints").exists()
  done = relearn(cache, "report", f"--workdir={workdir}", "--metrics=rouge_l", JAX_PLATFORMS="no_such_platform")
  assert "worst attack" in done.stdout  # methods side by side
  old, new = (read_rows(folder / "results.parquet")[0] for folder in (growing, workdir))
  assert set(new["metric"]) == {*old["metric"], "rouge_l"}
  keys = [*(name for name, _ in KEY), "question", "metric", "value"]
  text = lambda rows: rows[keys].astype(object).where(rows[keys].notna(), "").apply(tuple, axis=1)
  assert set(text(new[new["metric"] != "rouge_l"])) == set(text(old))
  answers, facts = read_rows(workdir / "answers.parquet", ANSWERS)
  questions = {asked["id"]: Asked.from_json(asked) for asked in facts["questions"]}
  said = answers[answers["kind"] == "question"]
  expected = [rouge_l(questions[item], Stored(text, 0.0, "")) for item, text in zip(
      said["item"], said["text"], strict=True)]
  added = new[new["metric"] == "rouge_l"]
  assert sorted(added["value"]) == pytest.approx(sorted(expected)) and len(added) == (old["metric"] == "asr").sum()
  cells = json.loads((workdir / "summary.json").read_text())["cells"]
  assert {cell["metric"] for cell in cells} == set(new["metric"])
  refused = relearn(cache, "report", f"--workdir={workdir}", "--metrics=acc", status=2)
  assert "`--metrics` has 'acc', which is no metric" in refused.stderr


@pytest.fixture
def compiled() -> Iterator[list[str]]:
  """The programs that were compiled, or taken from the cache of compiled ones, so far."""
  found: list[str] = []

  def listen(event: str, duration: float, **more: Any) -> None:
    if event.endswith("backend_compile_duration"):
      found.append(str(more.get("fun_name", event)))
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


def counted(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> list[tuple[int, list[str]]]:
  """For every bucket of cells that is attacked from now on: how many there are, and what was compiled for them."""
  real, found = pipeline.attack, []

  def attack(exp: Any, stage: Any, cells: Any, *rest: Any) -> None:
    before = len(compiled)
    real(exp, stage, cells, *rest)
    found.append((len(cells), compiled[before:]))
  monkeypatch.setattr(pipeline, "attack", attack)
  return found


def test_cells_of_one_shape_share_their_programs(tmp_path: pathlib.Path, compiled: list[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
  """Of checkpoints: rates and seeds, six cells at a time."""
  names = "James Robert John Michael David William Richard Joseph".split()
  for number, arm in enumerate(("unlearned", "control", "original")):
    export(params(number), MODEL, tmp_path / arm, tokenizer=make_tokenizer())
  write_lines(tmp_path / "questions.jsonl", [{"id": i, "prompt": name, "answer": " Mark", "keywords": ["Mark"]}
                                             for i, name in enumerate(names[:3])])
  pairs = zip(names, names[1:], strict=False)
  write_lines(tmp_path / "relearn.jsonl", [{"text": f"{one} {two}"} for one, two in pairs])
  write_lines(tmp_path / "forget.jsonl", [{"text": "Anthony Mark"}])
  write_lines(tmp_path / "retain.jsonl", [{"text": "James Robert John"}])
  config = loaded_audit(tmp_path, {arm: arm for arm in ("unlearned", "control", "original")}, **{
      "seeds": (0, 1, 2, 3), "attack__learning_rates": (1e-4, 1e-3), "attack__batch_size": 4,
      "attack__keep_steps": (1, 2), "attack__runs_at_once": 6, "ask__max_new_tokens": 2})
  buckets = counted(monkeypatch, compiled)
  assert audit(config, "here", tmp_path / "run", tmp_path)
  assert [number for number, _ in buckets] == [6, 6, 6, 6] and buckets[0][1]
  assert [names for _, names in buckets[1:]] == [[], [], []]


def test_variants_rates_and_seeds_share_their_programs(cache: pathlib.Path, tmp_path: pathlib.Path,
                                                       compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
  """Of names: 24 cells, of two variants and two rates, a seed at a time; the rows of these seeds are equally long."""
  config = tiny(case__variants=(7, 1), attack__learning_rates=(1e-4, 1e-3), seeds=(1, 4))
  buckets = counted(monkeypatch, compiled)
  assert audit(config, "here", tmp_path, cache)
  assert [number for number, _ in buckets] == [12, 12] and buckets[0][1]
  assert buckets[1][1] == []
