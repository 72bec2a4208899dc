"""The attack through a provider's interface: the same numbers where it permits the same, and what it takes away."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from relearn_jax.adversary.openai_backend import OpenAIBackend
from relearn_jax.audit import remote_attack
from relearn_jax.audit.audit_config import Audit, recorded
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.pipeline import prepare
from relearn_jax.audit.results_file import ANSWERS, read_rows
from relearn_jax.audit.stages import plan_stages
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.training.ended import AllEnded, Ledger, read_ended

from ..small import MODEL, make_tokenizer, params, write_lines
from .tiny import audited, loaded_audit, tiny_names

NAMES = "James Robert John Michael David William Richard Joseph Thomas Christopher Charles Daniel".split()
SEEDS = {"unlearned": 0, "control": 1, "original": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Three random models and the four files."""
  root = tmp_path_factory.mktemp("remote")
  for name, seed in SEEDS.items():
    export(params(seed), MODEL, root / name, tokenizer=make_tokenizer())
  write_lines(root / "questions.jsonl", [
      {"id": i, "prompt": " ".join(NAMES[i:i + 3]), "answer": " Mark", "keywords": ["Mark"]} for i in range(4)])
  write_lines(root / "relearn.jsonl", [
      {"prompt": first, "answer": f" {second}"} for first, second in zip(NAMES, NAMES[3:], strict=False)])
  write_lines(root / "forget.jsonl", [{"prompt": NAMES[0], "answer": " Mark"}])
  write_lines(root / "retain.jsonl", [{"text": " ".join(NAMES[i:i + 4])} for i in range(3)])
  return root


def setting(folder: pathlib.Path, **changes: Any) -> Audit:
  """Both accesses; 9 rows, 3 a step."""
  return loaded_audit(folder, {name: name for name in SEEDS}, **{
      "seeds": (0,), "attack__batch_size": 3, "attack__keep_steps": (3, 6), "attack__learning_rates": (1e-3, 2e-2),
      "attack__access": ("weights", "api"), "attack__api__limits__adapter": "full",
      "attack__api__limits__min_rows": 2, "attack__api__limits__max_checkpoints": 0, "ask__max_new_tokens": 4,
      "ask__score_rows": 3, "verdict__draws": 100, **changes})


def rows_of(workdir: pathlib.Path) -> Any:
  frame, facts = read_rows(workdir / "answers.parquet", ANSWERS)
  return frame.astype({name: object for name in frame.columns if str(frame[name].dtype) == "category"}), facts


@pytest.mark.slow
def test_the_interface_gives_the_numbers_of_weights_and_ends_what_it_refuses(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  config, begun = setting(folder), list[str]()
  create = OpenAIBackend.create
  monkeypatch.setattr(OpenAIBackend, "create", lambda self, *args: (begun.append(args[-1]), create(self, *args))[1])

  def killed(*_: Any) -> None:
    raise KeyboardInterrupt
  # A kill comes when all jobs are done. What the provider has is there when the audit goes on.
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(remote_attack, "_keep", killed)
    patch.setattr(remote_attack, "remove", lambda _: None)
    audited(config, tmp_path, tmp_path)
  first = list(begun)
  assert len(first) == len(set(first)) == 6  # three models at two rates
  audited(config, tmp_path, tmp_path)
  assert begun[6:] == []  # those that were refused are known to be, too
  frame, facts = rows_of(tmp_path)
  after = frame[frame["point"] == "relearned"]
  weights, api = (after[(after["adapter"] == name) & (after["learning_rate"] == 1e-3)] for name in ("full", "api"))
  keys = ["arm", "relearn_step", "kind", "item"]
  both = weights.merge(api, on=keys, suffixes=("", "_api"))
  assert len(both) == len(weights) == len(api) and set(both["relearn_step"]) == {3, 6}
  assert set(both["kind"]) == {"question", "retain", "forget", "relearn"} and set(both["arm"]) == {"U", "N", "O"}
  assert np.abs(both["logprob"] - both["logprob_api"]).max() < 2e-3
  assert (both["tokens"] == both["tokens_api"]).all()
  assert (both["matched"].fillna("") == both["matched_api"].fillna("")).mean() > 0.9
  asked = both[both["kind"] == "question"]
  assert (asked["text"] == asked["text_api"]).mean() > 0.9  # near-ties between tokens of a random model may fall
  before = frame[(frame["point"] != "relearned") & (frame["kind"] == "question")]
  assert (asked.merge(before, on=["arm", "item"], suffixes=("", "_before"))["logprob"] !=
          asked.merge(before, on=["arm", "item"], suffixes=("", "_before"))["logprob_before"]).all()
  # 2e-2 is above what the provider permits: these cells end by name, and the audit does not.
  assert set(after[after["adapter"] == "api"]["learning_rate"]) == {1e-3}
  ended = [one for one in facts["ended"] if one["what"] == "job"]
  assert {one["arm"] for one in ended} == {"U", "N", "O"}
  assert all("learning_rate_multiplier" in one["why"] and "expected 0.01 to 100" in one["why"] for one in ended)
  notes = " ".join(facts["notes"])
  assert "its job at the provider failed" in notes and "6 jobs" in notes and "given once" in notes
  report = (tmp_path / "report.md").read_text()
  assert "its job at the provider failed" in report and "adapter api" in report
  assert not list(tmp_path.glob("checkpoints/*/provider"))


@pytest.mark.slow
def test_a_provider_that_tells_little_and_filters_much(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config = setting(folder, attack__access=("api",), attack__learning_rates=(1e-3,),
                   attack__api__limits__logprobs=False, attack__api__limits__max_checkpoints=1,
                   attack__api__limits__blocked_words=("David", "Joseph"))
  audited(config, tmp_path, tmp_path)
  frame, facts = rows_of(tmp_path)
  assert set(frame["kind"]) == {"question"} and frame["logprob"].isna().all()
  steps = set(frame[frame["point"] == "relearned"]["relearn_step"])
  assert len(steps) == 1  # the last model alone
  refused, = re.findall(r"refused up to (\d+) of the 9 rows", " ".join(facts["notes"]))
  words = [f"{first} {second}" for first, second in zip(NAMES, NAMES[3:], strict=False)]
  assert int(refused) == sum("David" in text or "Joseph" in text for text in words)
  assert steps == {2 * -(-(9 - int(refused)) // 3)}  # fewer rows, fewer steps
  summary = json.loads((tmp_path / "summary.json").read_text())
  said = json.dumps(summary["verdicts"])
  assert "INCONCLUSIVE" in said and "ERASED" not in said and "OBFUSCATED" not in said


def test_the_grid_has_both_accesses_and_the_limits(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
  config = setting(folder, attack__api__price=1e6, attack__api__learning_rates=(1e-4,))
  exp = prepare(config, "here", tmp_path, False)
  stages = plan_stages(config, exp.relearn_sets)
  assert [(stage.attack.adapter, {cell.attack.learning_rate for cell in stage.cells}) for stage in stages] == [
      ("full", {1e-3, 2e-2}), ("api", {1e-4})]
  cell = stages[1].cells[0]
  how = remote_attack.course(exp, cell, 3)
  assert (how.times, how.budget.epochs, how.epochs, how.budget.batch_size) == (1, 2, (1, 2), 3)
  assert how.budget.rate == pytest.approx(1.0)  # a multiplier of the provider's own rate
  assert how.tokens == 2 * 9 * 4  # of each row <s>, two names and the end
  remote_attack.check_cost(exp, stages, None)
  assert "3 jobs at a provider, 216 tokens: about 216.00" in capsys.readouterr().out
  with pytest.raises(InputError, match="--max_cost.*216"):
    remote_attack.check_cost(exp, stages, 100.0)
  config.attack.api.price = 0.0
  with pytest.raises(InputError, match="--max_cost.*no price is known"):
    remote_attack.check_cost(exp, stages, 100.0)
  config.attack.api.limits.min_rows, config.attack.api.limits.max_epochs = 20, 1
  more = remote_attack.course(exp, cell, 0)
  assert (more.times, len(more.rows), more.budget.batch_size, more.epochs) == (3, 27, 27, (1,))
  values = recorded(config)["attack"]
  assert values["adapters"] == ("full", "api") and values["api"]["limits"]["min_rows"] == 20
  assert "access" not in values and "price" not in values["api"]
  plain = recorded(setting(folder, attack__access=("weights",)))["attack"]
  assert plain["adapters"] == ("full",) and "api" not in plain  # as it was before there was an interface


def test_a_job_that_fails_ends_its_cell_alone(tmp_path: pathlib.Path) -> None:
  ledger = Ledger(tmp_path, "attack", ["U", "N"], "attack.learning_rates", 1.0)
  ledger.end("U", 1, "its job at the provider hung (no news)")
  assert str(read_ended(tmp_path)["U"]) == "U ended in stage 'attack': its job at the provider hung (no news)"
  assert ledger.has_ended("U", 1) and not ledger.has_ended("U", 0) and not ledger.has_ended("N", 9)
  with pytest.raises(AllEnded, match="and so did another run: none is left"):
    ledger.end("N", 1, "its job at the provider failed")


@pytest.mark.parametrize(("changes", "problem"), [
    ({"attack__access": ()}, "attack.access"), ({"attack__access": ("web",)}, "weights, api or both"),
    ({"attack__api__provider": "other"}, "attack.api.provider"), ({"attack__api__url": "http://x"}, "attack.api.url"),
    ({"attack__api__provider": "together"}, "attack.api.models"),
    ({"attack__api__provider": "together", "attack__api__models": {"U": "base"}}, "attack.api.provider"),
    ({"attack__api__price": -1.0}, "attack.api.price"),
    ({"attack__api__limits__min_rows": 0}, "attack.api.limits.min_rows"),
    ({"attack__api__learning_rates": (1e-3, 1e-4)}, "attack.api.learning_rates")])
def test_what_no_provider_is_like_is_refused(changes: dict[str, Any], problem: str) -> None:
  with pytest.raises(InputError, match=re.escape(problem)):
    check_audit(tiny_names(**{"attack__access": ("api",), **changes}), "here")
