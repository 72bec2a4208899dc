"""Arms, settings and interviews: who is attacked where, and what is refused before any work."""

import concurrent.futures
import dataclasses
import json
import pathlib
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from relearn_jax.audit import base
from relearn_jax.audit.arms import Run, all_cases, all_runs, cells_of_seed, mean_asr, select_points
from relearn_jax.audit.command import check
from relearn_jax.audit.config import AuditConfig, check_config
from relearn_jax.audit.evaluate import Interviewer, Scores, load_scores, once, save_scores
from relearn_jax.audit.release import InterviewSettings, ReleaseAudit, check_release
from relearn_jax.cases import names
from relearn_jax.cases.base import Question, Text
from relearn_jax.data.rows import stack_runs
from relearn_jax.data.texts import encode_texts
from relearn_jax.errors import InputError
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.workdir import claim_workdir, differences, to_dict

from ..small import MODEL, params


def test_u_and_n_pair_up() -> None:
  config = AuditConfig()
  runs = all_runs(config)
  assert len(runs) == 24 and [run.arm for run in runs] == ["U"] * 12 + ["N"] * 12
  assert runs[0].name == "U-7-0" and len({run.name for run in runs}) == 24
  cases = all_cases(config)
  assert all(cases[Run(run.variant, run.seed, "N")].relearn_sets == cases[run].relearn_sets for run in runs)


def test_unlearned_points_are_each_runs_own() -> None:
  early, late, never = Run(7, 0, "U"), Run(7, 1, "U"), Run(5, 0, "U")
  curves = {early: {0: 0.0, 5: 0.01, 10: 0.5, 15: 0.0}, late: {0: 1.0, 5: 0.02, 10: 0.3, 15: 0.0},
            never: {0: 1.0, 5: 0.9, 10: 0.9, 15: 0.011}}
  # Step 0 never counts: what did not know from the start has not unlearned.
  assert select_points(curves, 0.01, 3) == {(7, 0): [5, 10, 15], (7, 1): [15], (5, 0): []}
  assert mean_asr(np.array([[1.0] + [0.0] * 99], np.float32))[0] == 0.01  # exactly at the threshold


def test_controls_are_attacked_at_their_partners_step() -> None:
  config = AuditConfig()
  config.case.variants, config.unlearn.depths = (7, 1), 2
  cells = cells_of_seed(config, 4, {(7, 4): [20, 25], (1, 4): [5]}, 25)
  assert [cell.name for cell in cells] == [
      "U-7-4-depth0", "N-7-4-depth0", "U-7-4-depth1", "N-7-4-depth1", "O-7-4",
      "U-1-4-depth0", "N-1-4-depth0", "U-1-4-depth1", "N-1-4-depth1", "O-1-4"]
  assert [cell.unlearn_step for cell in cells] == [20, 20, 25, 25, 0, 5, 5, 25, 25, 0]
  assert [cell.missing for cell in cells] == [False] * 7 + [True] * 2 + [False]
  assert cells[4].run == cells[0].run and cells[4].arm == "O"


def change(**fields: Any) -> AuditConfig:
  config = AuditConfig()
  for name, value in fields.items():
    *path, last = name.split("__")
    holder: Any = config
    for part in path:
      holder = getattr(holder, part)
    setattr(holder, last, value)
  return config


@pytest.mark.parametrize("field,value", [
    ("base.hidden_size", 0), ("base.hidden_size", 30), ("base.num_kv_heads", 3), ("base.couples", 61),
    ("base.attachment", 1.1), ("base.warmup_steps", 600), ("base.learning_rate", float("nan")),
    ("memorize.steps", 0), ("memorize.weight_decay", -1.0), ("methods.ga.learning_rate", 0.0),
    ("unlearn.max_steps", 0), ("unlearn.keep_every", -5), ("unlearn.depths", 0), ("unlearn.max_asr", 1.0),
    ("relearn.keep_steps", ()), ("relearn.keep_steps", (5, 5)), ("relearn.keep_steps", (0, 5)),
    ("evaluate.max_new_tokens", 0), ("evaluate.buckets", ()), ("evaluate.buckets", (18, 10)),
    ("evaluate.buckets", (2.5,)), ("base.seed", -1),
    ("evaluate.runs_per_call", 0), ("checkpoint_seconds", -1.0), ("verdict.draws", 0), ("verdict.alpha", 0.0),
    ("verdict.alpha", 1.0), ("verdict.delta", -0.1), ("base.max_positions", 20)])
def test_settings_that_cannot_work_are_named(field: str, value: Any) -> None:
  with pytest.raises(InputError) as caught:
    check_config(change(**{field.replace(".", "__"): value}), "names.py")
  assert caught.value.field == field and caught.value.file == "names.py" and caught.value.mend


def test_the_default_is_fine_and_differences_are_listed() -> None:
  check(AuditConfig(), "names.py", allow_leakage=False)
  ours, theirs = to_dict(AuditConfig()), to_dict(change(relearn__learning_rates=(1.0,), case__seeds=(4,)))
  del theirs["method"]
  assert differences(ours, theirs) == [
      "case.seeds: [0, 1, 2] here, [4] there", "method: 'ga' here, '(absent)' there",
      "relearn.learning_rates: [0.0001] here, [1.0] there"]


def test_a_leaking_relearn_set_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
  make = names.make_case

  def leaky(*arguments: Any) -> Any:
    case = make(*arguments)
    planted = dataclasses.replace(case.relearn_sets[0], rows=(Text("Gary Mark"), *case.relearn_sets[0].rows))
    return dataclasses.replace(case, relearn_sets=(planted,))
  monkeypatch.setattr("relearn_jax.audit.arms.make_case", leaky)
  with pytest.raises(InputError, match="line 1 of relearn set 'prefixes'.*'mark'.*--allow_leakage"):
    check(AuditConfig(), "names.py", allow_leakage=False)
  check(AuditConfig(), "names.py", allow_leakage=True)


def test_a_workdir_belongs_to_one_configuration(tmp_path: pathlib.Path) -> None:
  config = AuditConfig()
  assert not claim_workdir(tmp_path / "new", config) and claim_workdir(tmp_path / "new", config)
  assert json.loads((tmp_path / "new" / "config.json").read_text()) == to_dict(config)
  with pytest.raises(InputError, match="method: 'kl' here, 'ga' there"):
    claim_workdir(tmp_path / "new", change(method="kl"))
  (tmp_path / "new" / "config.json").write_text("{")
  with pytest.raises(InputError, match="is no JSON"):
    claim_workdir(tmp_path / "new", config)


def test_pretraining_rows_are_whole() -> None:
  config = change(base__steps=3).base
  tokenizer = base.make_tokenizer()
  batches = base.pretraining_batches(config, tokenizer)
  assert len(batches) == 3 and all(batch.shape == (32, 28) for batch in batches)
  for row in np.concatenate(batches):
    real = row[row != tokenizer.pad_token_id]
    assert real[0] == tokenizer.bos_token_id and real[-1] == tokenizer.eos_token_id
    assert not set(real[1:-1]) & {0, 1, 2, 3}
  key = base.content_key(config, batches)
  assert key == base.content_key(config, batches)
  assert key != base.content_key(dataclasses.replace(config, learning_rate=0.1), batches)
  assert key != base.content_key(config, batches[:2])


def test_a_base_that_two_want_at_once_is_trained_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  config = change(base__steps=1, base__hidden_size=8, base__num_heads=2, base__num_kv_heads=2, base__num_layers=1).base
  trained, both = [], threading.Barrier(2, timeout=60)
  batches = base.pretraining_batches

  def wanted(*arguments: Any) -> Any:
    made = batches(*arguments)
    both.wait()  # neither looks for the folder before both are here
    return made

  def slow(model: Any, *_: Any, **__: Any) -> Any:
    trained.append(model)
    time.sleep(0.5)  # the other is at the lock by now
    return model.init(jax.random.key(0))
  monkeypatch.setattr(base, "pretraining_batches", wanted)
  monkeypatch.setattr(base, "pretrain", slow)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first, second = pool.map(lambda _: base.cached_base(config, tmp_path), range(2))
  assert first == second and len(trained) == 1 and (first / "model.safetensors").exists()
  assert [path.name for path in first.parent.iterdir() if path.is_dir()] == [first.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="file/base: `RELEARN_CACHE` cannot be written .*that you may write to"):
    base.cached_base(change(base__steps=1).base, tmp_path / "file")


def test_scores_survive_a_restart(tmp_path: pathlib.Path) -> None:
  scores = Scores(np.ones((1, 2, 3), np.int32), np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32),
                  np.full((1, 1), np.nan, np.float32), np.ones(1, bool))
  calls = []

  def compute() -> Scores:
    calls.append(1)
    return scores
  path = tmp_path / "scores" / "a.npz"
  for _ in range(2):
    found = once(path, compute)
    for field in dataclasses.fields(Scores):
      np.testing.assert_array_equal(getattr(found, field.name), getattr(scores, field.name))
  assert calls == [1]
  save_scores(path, scores)
  assert load_scores(path).tokens.shape == (1, 2, 3) and [p.name for p in path.parent.iterdir()] == ["a.npz"]


def test_interviews_give_every_model_its_own_answers() -> None:
  """Three models, two a call: the same as each of them alone, hits counted in prompt and completion."""
  tokenizer, mesh = base.make_tokenizer(), runs_mesh()
  questions = [Question(f"q{i}", " ".join(names.COMMON[i:i + n]) + " Anthony", "Mark", ("Anthony Mark",), f"q{i}")
               for i, n in enumerate((1, 4, 9, 12))]
  models = [params(seed) for seed in range(3)]
  def stack(path: str, trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
      return {key: stack(f"{path}/{key}", [tree[key] for tree in trees]) for key in trees[0]}
    return np.stack([np.asarray(tree) for tree in trees])
  stacked = stack("", models)
  retain = stack_runs([encode_texts(tokenizer, [Text("James Robert John"), Text("Kevin")], "names", 160)] * 3)
  make = lambda runs: Interviewer(MODEL, tokenizer, questions, mesh, max_new_tokens=6, buckets=(8, 16),
                                  runs_per_call=runs)
  together = make(2)(stacked, retain, 3)
  assert together.tokens.shape == (3, 4, 6) and together.asr.shape == together.logprob.shape == (3, 4)
  for index, model in enumerate(models):
    alone = make(1)(repeat_runs(model, 1, mesh), retain, 1)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[index])
    np.testing.assert_array_equal(alone.logprob[0], together.logprob[index])
    np.testing.assert_array_equal(alone.retain[0], together.retain[index])
  asked = make(2)
  mark, = tokenizer.convert_tokens_to_ids(["Mark"])
  answer = np.array([mark, 0, 0, 0, 0, 0], np.int32)
  assert asked._hit(0, answer) and not asked._hit(0, answer[::-1].copy() * 0)
  assert asked.completion(1, answer) == " Mark"


@pytest.mark.parametrize("change,problem", [
    ({"interview": InterviewSettings(stop=("",))}, r"`interview.stop` is \(''"),
    ({"interview": InterviewSettings(stop=(1,))}, "`interview.stop` is"),  # type: ignore[arg-type]
    ({"interview": InterviewSettings(stop="Q:")}, "`interview.stop` is 'Q:'"),  # type: ignore[arg-type]
    ({"allowed_lines": (0,)}, r"`allowed_lines` is \(0,\)"), ({"allowed_lines": (True,)}, "`allowed_lines` is")])
def test_stop_strings_and_allowed_lines_are_checked(change: dict[str, Any], problem: str) -> None:
  given = ReleaseAudit(unlearned="m", forget="f", retain="r", relearn="a", questions="q")
  check_release(dataclasses.replace(given, interview=InterviewSettings(stop=("Q:",)), allowed_lines=(1, 7)), "here")
  with pytest.raises(InputError, match=f"here: {problem}"):
    check_release(dataclasses.replace(given, **change), "here")


def test_what_is_judged_ends_at_a_stop_string_and_in_the_completion() -> None:
  tokenizer = base.make_tokenizer()
  ask = lambda **more: Interviewer(MODEL, tokenizer, [
      Question("q", "James Anthony", "Mark", ("Anthony Mark", "James"), "q", **more.pop("question", {}))], runs_mesh(),
      max_new_tokens=4, buckets=(8,), runs_per_call=1, **more)
  ids = lambda text: np.array(tokenizer.convert_tokens_to_ids(text.split()), np.int32)
  assert ask()._hit(0, ids("Mark Kevin")) and not ask()._hit(0, ids("Kevin Mark"))  # "James" stands in the prompt alone
  alone = ask(prompt_counts=False)
  assert not alone._hit(0, ids("Mark Kevin")) and alone._hit(0, ids("Kevin James"))
  for more in ({"stop": ("Kevin",)}, {"question": {"stop": ("Kevin",)}}, {"stop": ("Brian", "Kevin")}):
    assert ask(**more)._hit(0, ids("Mark Kevin")) and not ask(**more)._hit(0, ids("Kevin James"))
    assert ask(**more).completion(0, ids("Mark Kevin James")) == " Mark"
  both = ask(stop=("Kevin",), question={"stop": ("Brian",)})
  assert both.completion(0, ids("Mark Brian Kevin")) == both.completion(0, ids("Mark Kevin Brian")) == " Mark"
  assert ask(question={"case": True})._hit(0, ids("Mark"))
  shown = both.example(0, "7", 0, {"relearned": ids("Mark Kevin")})
  assert shown["begun"] == "James Anthony" and shown["completions"] == {"relearned": " Mark"}
