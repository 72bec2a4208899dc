"""Auditing somebody's checkpoints: files to verdict, as a user runs it, on small random models."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from relearn_jax.audit import attack
from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.stages import plan_stages
from relearn_jax.cases.base import spread_evenly
from relearn_jax.cases.files import read_texts
from relearn_jax.data.order import Order
from relearn_jax.data.texts import encode_rows, stack_rows
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.losses import nll
from relearn_jax.training.step import Frozen, init_state, take_rows, train_step, whole

from ..command import ROOT, relearn
from ..small import CONFIG, MODEL, make_tokenizer, params, write_lines
from .tiny import audited, loaded_audit

FILE = ROOT / "configs" / "checkpoint.py"
NAMES = "James Robert John Michael David William Richard Joseph Thomas Christopher Charles Daniel".split()
SEEDS = {"unlearned": 0, "control": 1, "original": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Three random models and the four files; "Mark" is what is asked about."""
  root = tmp_path_factory.mktemp("release")
  for name, seed in SEEDS.items():
    export(params(seed), MODEL, root / name, tokenizer=make_tokenizer())
  questions = [{"id": i, "prompt": " ".join(NAMES[i:i + 3]), "answer": " Mark" if i % 2 else " Anthony Mark",
                "keywords": ["Mark"], "cluster": f"c{i // 2}"} for i in range(6)]
  write_lines(root / "questions.jsonl", questions)
  pairs = zip(NAMES, NAMES[3:], strict=False)
  write_lines(root / "relearn.jsonl", [{"prompt": first, "answer": f" {second}"} for first, second in pairs])
  write_lines(root / "forget.jsonl", [{"prompt": NAMES[0], "answer": " Mark"}, {"text": "Anthony Mark"}])
  write_lines(root / "retain.jsonl", [{"text": " ".join(NAMES[i:i + 4])} for i in range(5)])
  return root


def setting(folder: pathlib.Path, **changes: Any) -> Audit:
  return loaded_audit(folder, {name: name for name in SEEDS}, **{
      "seeds": (0, 1), "attack__learning_rates": (1e-3,), "attack__batch_size": 4, "attack__keep_steps": (1, 3),
      "ask__max_new_tokens": 4, "ask__batch_size": 4, "ask__score_rows": 3, "verdict__draws": 200,
      "checkpoint_seconds": 0.0, **changes})


def run(folder: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> Any:
  audited(setting(folder, **changes), workdir, workdir)
  return pq.read_table(workdir / "results.parquet").to_pandas()


def summary(workdir: pathlib.Path) -> Any:
  return json.loads((workdir / "summary.json").read_text())


def test_the_command_from_files_to_a_report(folder: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  own = tmp_path / "own"
  shutil.copytree(folder, own)
  given = [f"--config.arms.{name}={own / name}" for name in SEEDS]
  given += [f"--config.case.{name}={own / name}.jsonl" for name in ("forget", "retain", "relearn", "questions")]
  flags = [f"--config={FILE}", *given, "--config.seeds=(0, 1)", "--config.attack.batch_size=4",
           "--config.attack.keep_steps=(1, 3)", "--config.ask.max_new_tokens=4", "--config.case.name=mine",
           "--config.verdict.draws=200", f"--workdir={tmp_path / 'audit'}"]
  done = relearn(cache, "audit", *flags)
  assert "given: INCONCLUSIVE" in done.stdout and "\ncase " in done.stdout
  found = summary(tmp_path / "audit")
  assert found["case"] == "mine" and found["leakage"][0]["passed"] and found["leakage"][0]["num_lines"] == 9
  assert {"questions", "unlearned/model.safetensors", "control/config.json",
          "original/tokenizer.json"} <= set(found["fingerprints"])
  page = (tmp_path / "audit" / "report.html").read_text()
  assert "A model is said to have unlearned what 6 questions ask about" in page and "repetitions" not in page
  assert not (tmp_path / "audit" / "figures" / "unlearning.png").exists() and "Which models were attacked" not in page
  assert "Nothing is left to do" in relearn(cache, "audit", *flags).stdout
  write_lines(own / "retain.jsonl", [{"text": "Kevin Brian"}])
  refused = relearn(cache, "audit", *flags, status=2)
  assert "inputs.json: was written for other contents of retain" in refused.stderr


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
  """The rows of an audit with all parameters trained, all runs side by side."""
  return run(folder, tmp_path_factory.mktemp("audited") / "audit")


def test_rows_of_every_arm_seed_and_step(plain: Any) -> None:
  rows = plain
  asr = rows[rows["metric"] == "asr"]
  assert len(asr) == 3 * 2 * 3 * 6  # arms, seeds, steps 0, 1, 3, questions
  assert set(asr["point"]) == {"original", "unlearned", "relearned"} and set(rows["adapter"].dropna()) == {"full"}
  counts = rows.groupby("metric", observed=True)["question"].nunique()
  assert counts.to_dict() == {"asr": 6, "logprob": 6, "retain_logprob": 3, "forget_logprob": 2,
                              "relearn_logprob": 3}
  before = rows[(rows["relearn_step"] == 0) & (rows["metric"] == "logprob")]
  seeds = [before[before["seed"] == seed].reset_index()["value"] for seed in (0, 1)]
  np.testing.assert_array_equal(*seeds)  # the same models
  after = rows[(rows["relearn_step"] == 3) & (rows["metric"] == "logprob") & (rows["arm"] == "U")]
  assert (after[after["seed"] == 0].reset_index()["value"] != after[after["seed"] == 1].reset_index()["value"]).all()


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_attack_is_plain_finetuning(folder: pathlib.Path, tmp_path: pathlib.Path, plain: Any, kind: str
                                        ) -> None:
  """Answers' log-probabilities after 3 steps on each model, from a loop of single steps and whole-row logits."""
  lora = {"attack__adapters": (kind,), "attack__lora__rank": 2, "attack__lora__alpha": 4.0}
  rows = plain if kind == "full" else run(folder, tmp_path / "audit", **lora)
  tokenizer, file = make_tokenizer(), folder / "relearn.jsonl"
  data = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]),
                      stack_rows(encode_rows(tokenizer, read_texts(file), file, 160), 1))
  model = dataclasses.replace(MODEL, lora_scale=2.0 if kind == "lora" else 1.0)
  questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
  step = jax.jit(lambda state, batch, frozen: train_step(
      model, lambda hyper: nll("relearn"), state, batch, {"learning_rate": 1e-3, "weight_decay": 0.0}, frozen))

  def trained(base: Params, seed: int) -> Params:
    frozen = Frozen() if kind == "full" else Frozen(shared=base)
    start = base if kind == "full" else init_lora(model, LoraConfig(2, 4.0), jax.random.key(seed))
    state, order = init_state(start, nll("relearn")), Order(9, 4, seed)
    for number in range(3):
      state, _ = step(state, take_rows({"relearn": data}, {"relearn": jnp.asarray(order.places(4 * number))}), frozen)
    return whole(state.params, *frozen)
  for arm, name in (("U", "unlearned"), ("N", "control"), ("O", "original")):
    for seed in (0, 1):
      weights = trained(params(SEEDS[name]), seed)
      found = rows[(rows["arm"] == arm) & (rows["seed"] == seed) & (rows["relearn_step"] == 3)
                   & (rows["metric"] == "logprob")].set_index("question")["value"]
      for question in questions:
        prompt, answer = question["prompt"].split(), question["answer"].split()
        ids = [1, *tokenizer.convert_tokens_to_ids([*prompt, *answer])]
        logprobs = jax.nn.log_softmax(model.logits(weights, model.hidden(weights, jnp.array([ids]))))[0]
        expected = sum(float(logprobs[t - 1, ids[t]]) for t in range(1 + len(prompt), len(ids)))
        assert found[str(question["id"])] == pytest.approx(expected, abs=2e-4), (arm, seed, question)


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_one_after_the_other_is_the_same_audit(folder: pathlib.Path, tmp_path: pathlib.Path, plain: Any, kind: str
                                               ) -> None:
  """Side by side, one by one, and in interviews of two."""
  lora = {"attack__adapters": (kind,), "attack__lora__rank": 2}
  together = plain if kind == "full" else run(folder, tmp_path / "together", **lora)
  single = run(folder, tmp_path / "single", arms__original="", attack__runs_at_once=1, attack__num_microbatches=2,
               ask__batch_size=6, ask__runs_at_once=1, **lora)
  keys = ["arm", "seed", "relearn_step", "metric", "question"]
  together = together[together["arm"] != "O"]  # two arms are enough for runs that follow each other
  as_text = lambda table: table.astype(dict.fromkeys(keys, str))
  first, second = (as_text(table).sort_values(keys).reset_index(drop=True) for table in (together, single))
  assert (first[keys] == second[keys]).all(axis=None)
  np.testing.assert_allclose(first["value"], second["value"], atol=2e-4)


def test_a_control_that_is_the_model_itself_shows_no_excess(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  run(folder, tmp_path / "audit", arms__control=str(folder / "unlearned"))
  found = summary(tmp_path / "audit")
  verdict = found["verdicts"]["unknown"]["given"]
  assert verdict["excess"] == 0.0 and verdict["verdict"] != "OBFUSCATED"
  assert "Unlearned and control are the same checkpoint." in found["notes"]


def test_without_control_or_original_there_is_a_reason(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = run(folder, tmp_path / "audit", arms__control="", arms__original="")
  assert set(rows["arm"]) == {"U"}
  found = summary(tmp_path / "audit")
  verdict = found["verdicts"]["unknown"]["given"]
  assert verdict["verdict"] == "INCONCLUSIVE" and "there is no control to compare with" in verdict["reason"]
  assert "there is no original" in verdict["reason"]
  assert any("No original was given" in note for note in found["notes"])


@pytest.mark.slow
def test_a_killed_audit_goes_on_to_the_same_rows(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
  # Two parts of two runs.
  changes = {"attack__runs_at_once": 2, "attack__keep_steps": (1, 2, 3), "arms__original": ""}
  whole_rows = run(folder, tmp_path / "whole", **changes)
  real, calls = attack.ask_once, []

  def dies(exp: Any, stage: Any, step: int, *how: Any) -> Any:
    calls.append((stage.name, step))
    if len(calls) == 7:  # in the second part, at its step 2
      raise KeyboardInterrupt
    return real(exp, stage, step, *how)
  monkeypatch.setattr(attack, "ask_once", dies)
  config = setting(folder, **changes)
  with pytest.raises(KeyboardInterrupt):
    audit(config, "here", tmp_path / "killed", tmp_path)
  monkeypatch.setattr(attack, "ask_once", real)
  assert calls[-1] == ("attack-relearn-full-part1", 2) and list((tmp_path / "killed").glob("checkpoints/*/resume"))
  first = tmp_path / "killed" / "checkpoints" / "attack-relearn-full-part0"
  (first / "resume").mkdir()  # of a kill after the last answer
  (first / "done").unlink()
  audited(config, tmp_path / "killed", tmp_path)
  assert not list((tmp_path / "killed").glob("checkpoints/*/resume"))
  again = pq.read_table(tmp_path / "killed" / "results.parquet").to_pandas()
  np.testing.assert_array_equal(again["value"], whole_rows["value"])
  log = [json.loads(line) for line in (tmp_path / "killed" / "train_log.jsonl").read_text().splitlines()]
  assert [row["step"] for row in log if row["stage"] == "attack-relearn-full-part1"] == [1, 2, 3]


def test_parts_keep_arms_of_a_seed_together(folder: pathlib.Path) -> None:
  stages = lambda **changes: plan_stages(setting(folder, **changes), ["relearn"])
  names = lambda **changes: {stage.name: [cell.point.name for cell in stage.cells] for stage in stages(**changes)}
  assert names() == {"attack-relearn-full": ["U-given-0-depth0", "N-given-0-depth0", "O-given-0", "U-given-1-depth0",
                                             "N-given-1-depth0", "O-given-1"]}
  parts = names(attack__runs_at_once=3)
  assert {name: len(cells) for name, cells in parts.items()} == {
      "attack-relearn-full-part0": 3, "attack-relearn-full-part1": 3}
  assert [{cell.point.seed for cell in stage.cells} for stage in stages(attack__runs_at_once=3)] == [{0}, {1}]
  assert names(attack__adapters=("lora",)) == {
      "attack-U-relearn-lora": ["U-given-0-depth0", "U-given-1-depth0"],
      "attack-N-relearn-lora": ["N-given-0-depth0", "N-given-1-depth0"],
      "attack-O-relearn-lora": ["O-given-0", "O-given-1"]}
  rates = stages(attack__learning_rates=(1e-4, 1e-3))
  assert [len(stage.cells) for stage in rates] == [12] and len(rates[0].points) == 6
  assert spread_evenly(list(range(10)), 3) == [0, 3, 6]
  assert spread_evenly([1, 2], 0) == spread_evenly([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(("changes", "problem"), [
    ({"arms__unlearned": "", "arms__control": ""}, "`arms.unlearned` is ''"),
    ({"case__relearn": ()}, r"`case.relearn` is \(\)"),
    ({"case__questions": ""}, "`case.questions` is ''"), ({"case__relearn": ("a/x.jsonl", "b/x.jsonl")}, "'x'"),
    ({"seeds": (0, 0)}, "`seeds` is"), ({"attack__keep_steps": (3, 1)}, "`attack.keep_steps` is"),
    ({"arms__dtype": "half"}, "`arms.dtype` is 'half'"),
    ({"attack__learning_rates": (0.0,)}, r"`attack.learning_rates` is \(0.0,\)"),
    ({"attack__adapters": ("none",)}, "`attack.adapters` has 'none'"),
    ({"ask__batch_size": -1}, "`ask.batch_size` is -1"), ({"verdict__alpha": 2.0}, "`verdict.alpha` is 2.0")])
def test_bad_settings_are_named(folder: pathlib.Path, changes: dict, problem: str) -> None:
  with pytest.raises(InputError, match=f"here: .*{problem}"):
    check_audit(setting(folder, **changes), "here")


def refused(folder: pathlib.Path, tmp_path: pathlib.Path, problem: str, **changes: Any) -> None:
  with pytest.raises(InputError, match=problem):
    audit(setting(folder, **changes), "here", tmp_path / "audit", tmp_path)
  assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(("row", "problem"), [
    ({"keywords": []}, r"questions.jsonl:2: `keywords` is \[\]"), ({"keywords": "Mark"}, "`keywords` is \"Mark\""),
    ({"keywords": ["robert"]}, "`keywords` has 'robert', which stands in the prompt"),
    ({"cluster": 1.5}, "`cluster` is 1.5"), ({"id": "1"}, "`id` differ in type only"),
    ({"prompt": " ".join(NAMES * 14)}, "`prompt` has 169 tokens.*lower ask.max_new_tokens")])
def test_a_bad_question_is_named(folder: pathlib.Path, tmp_path: pathlib.Path, row: dict, problem: str) -> None:
  good = {"id": 1, "prompt": "James", "answer": " Mark", "keywords": ["Mark"]}
  file = write_lines(tmp_path / "questions.jsonl", [good, {**good, "id": 2, "prompt": "Robert", **row}])
  refused(folder, tmp_path, problem, case__questions=str(file))


def test_a_relearn_set_that_tells_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  file = write_lines(tmp_path / "leaky.jsonl", [{"text": f"James {name}"} for name in (*NAMES, "Mark")])
  refused(folder, tmp_path, "leaky.jsonl: `case.relearn` line 13 of relearn set 'leaky' contains 'mark'",
          case__relearn=(str(file),))
  told = audited(setting(folder, case__relearn=(str(file),), seeds=(0,)), tmp_path / "told", tmp_path,
                 allow_leakage=True)
  verdict = told["verdicts"]["unknown"]["given"]
  assert verdict["verdict"] == "INCONCLUSIVE" and "leaky line 13: “mark”" in verdict["reason"]
  assert "leaky (variant given), line 13" in (tmp_path / "told" / "report.html").read_text()


def test_models_that_cannot_be_compared_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  other = Model(dataclasses.replace(CONFIG, intermediate_size=64))
  export(other.init(jax.random.key(0)), other, tmp_path / "wide", tokenizer=make_tokenizer())
  refused(folder, tmp_path, "wide/config.json: `arms.control` has intermediate_size 64, and the unlearned model 48",
          arms__control=str(tmp_path / "wide"))
  export(params(1), MODEL, tmp_path / "words", tokenizer=make_tokenizer())
  spelled = (tmp_path / "words" / "tokenizer.json").read_text().replace('"Kevin"', '"Kevan"')
  (tmp_path / "words" / "tokenizer.json").write_text(spelled)
  refused(folder, tmp_path, "`arms.original` has another vocabulary", arms__original=str(tmp_path / "words"))


def test_seeds_that_change_nothing_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  refused(folder, tmp_path, "`seeds` has 2 seeds, but with all 9 rows .* set attack.batch_size below 9",
          attack__batch_size=9)
  refused(folder, tmp_path, "`attack.lora.targets` has 'qq'", attack__adapters=("lora",),
          attack__lora__targets=("qq",))
