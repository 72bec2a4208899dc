"""An audit that unlearns a given original, with a given control that goes through the same."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
import pytest

from relearn_jax.audit.audit_config import Audit, recorded
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.results_file import ANSWERS, read_rows
from relearn_jax.audit.stages import plan_stages
from relearn_jax.cases.files import read_texts
from relearn_jax.data.order import Order
from relearn_jax.data.texts import encode_rows, stack_rows
from relearn_jax.errors import InputError
from relearn_jax.models.export import export
from relearn_jax.models.model import Params
from relearn_jax.objectives.core import Objective
from relearn_jax.objectives.losses import nll
from relearn_jax.training.step import init_state, take_rows, train_step
from relearn_jax.workdir import to_dict

from ..small import MODEL, make_tokenizer, params, write_lines
from .tiny import audited, loaded_audit

NAMES = "James Robert John Michael David William Richard Joseph".split()
SEEDS = {"original": 2, "control": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Two random models and the four files."""
  root = tmp_path_factory.mktemp("given")
  for name, seed in SEEDS.items():
    export(params(seed), MODEL, root / name, tokenizer=make_tokenizer())
  write_lines(root / "questions.jsonl", [{"id": i, "prompt": name, "answer": " Mark", "keywords": ["Mark"]}
                                         for i, name in enumerate(NAMES[:3])])
  write_lines(root / "relearn.jsonl", [{"text": f"{one} {two}"} for one, two in zip(NAMES, NAMES[1:], strict=False)])
  write_lines(root / "forget.jsonl", [{"prompt": name, "answer": " Anthony Mark"} for name in NAMES[:5]])
  write_lines(root / "retain.jsonl", [{"text": "James Robert John"}])
  return root


def setting(folder: pathlib.Path, **changes: Any) -> Audit:
  return loaded_audit(folder, {name: name for name in SEEDS}, **{
      "seeds": (0, 1), "unlearn__batch_size": 2, "unlearn__max_steps": 4, "unlearn__keep_every": 2,
      "unlearn__max_score": 0.999, "unlearn__depths": 2, "unlearn__settings__ga__learning_rate": 1e-3,
      "attack__adapters": ("full", "lora4"), "attack__learning_rates": (1e-3,),
      "attack__lora__learning_rates": (1e-2,), "attack__batch_size": 4, "attack__keep_steps": (1, 2),
      "ask__max_new_tokens": 2, "ask__batch_size": 0, "verdict__draws": 200, "checkpoint_seconds": 0.0, **changes})


@pytest.fixture(scope="module")
def done(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of the audit."""
  workdir = tmp_path_factory.mktemp("audited") / "run"
  audited(setting(folder), workdir, workdir)
  return workdir


def logprobs(workdir: pathlib.Path) -> pd.DataFrame:
  rows, _ = read_rows(workdir / "answers.parquet", ANSWERS)
  return rows[rows["kind"] == "question"]


def test_both_models_unlearn_from_what_was_given(folder: pathlib.Path, done: pathlib.Path) -> None:
  """Answers before and after unlearning, against a loop of single steps and whole-row logits."""
  tokenizer, file = make_tokenizer(), folder / "forget.jsonl"
  data = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]),
                      stack_rows(encode_rows(tokenizer, read_texts(file), file, 160), 1))
  ascent: Objective = nll("forget")
  negative = dataclasses.replace(ascent, value=lambda *some: jax.tree.map(lambda x: -x, ascent.value(*some)))
  step = jax.jit(lambda state, batch: train_step(
      MODEL, lambda hyper: negative, state, batch, {"learning_rate": 1e-3, "weight_decay": 0.0}))

  def unlearned(start: Params, seed: int, steps: int) -> Params:
    state, order = init_state(start, ascent), Order(5, 2, seed)
    for number in range(steps):
      state, _ = step(state, take_rows({"forget": data}, {"forget": jnp.asarray(order.places(2 * number))}))
    return state.params

  def expected(weights: Params, name: str) -> float:
    ids = [1, *tokenizer.convert_tokens_to_ids([name, "Mark"])]
    found = jax.nn.log_softmax(MODEL.logits(weights, MODEL.hidden(weights, jnp.array([ids]))))[0]
    return float(found[1, ids[2]])
  rows = logprobs(done)
  for arm, start, seed, at in (("O", "original", 0, 0), ("U", "original", 0, 2), ("U", "original", 1, 4),
                               ("N", "control", 1, 2)):
    weights = unlearned(params(SEEDS[start]), seed, at)
    found = rows[(rows["arm"] == arm) & (rows["seed"] == seed) & (rows["unlearn_step"] == at)
                 & (rows["relearn_step"] == 0) & rows["point"].isin(["original", "unlearned"])]
    found = found.set_index("item")["logprob"]
    for number, name in enumerate(NAMES[:3]):
      assert found[str(number)] == pytest.approx(expected(weights, name), abs=2e-4), (arm, seed, at)


def test_the_report_says_what_the_control_is(done: pathlib.Path) -> None:
  facts = read_rows(done / "results.parquet")[1]
  assert facts["control"] == "the control (a checkpoint that was given, and unlearned like the other)"
  assert any("Seeds are unlearnings of the same two checkpoints" in note for note in facts["notes"])
  assert "base" not in facts["fingerprints"] and "original/model.safetensors" in facts["fingerprints"]
  config = json.loads((done / "config.json").read_text())
  assert set(config["arms"]) == {"dtype", "original", "control"} and "memorize" not in config
  assert not [path for path in (done / "checkpoints").iterdir() if path.name.startswith(("given", "memorize", "base"))]


def test_adapters_have_rates_of_their_own(done: pathlib.Path) -> None:
  rows = logprobs(done)
  rates = rows[rows["relearn_step"] > 0].groupby("adapter", observed=True)["learning_rate"].unique()
  assert {name: some.tolist() for name, some in rates.items()} == {
      "full": [pytest.approx(1e-3)], "lora4": [pytest.approx(1e-2)]}


def test_the_stages_begin_with_unlearning(folder: pathlib.Path) -> None:
  stages = plan_stages(setting(folder), ["relearn"])
  assert [stage.name for stage in stages][:2] == ["unlearn-ga", "attack-ga-relearn-full-seed0"]
  assert [cell.point.name for cell in stages[1].cells] == [
      "U-given-0-depth0", "N-given-0-depth0", "U-given-0-depth1", "N-given-0-depth1", "O-given-0"]


def test_other_ways_to_give_models_are_other_audits(folder: pathlib.Path, done: pathlib.Path) -> None:
  assert "arms" in to_dict(recorded(setting(folder))) and not setting(folder).arms.loaded
  assert setting(folder, arms__unlearned="u").arms.loaded.keys() == {"U", "N", "O"}
  with pytest.raises(InputError, match="`arms.start` is 's'"):
    check_audit(setting(folder, arms__start="s"), "here")
  with pytest.raises(InputError, match="`arms.unlearned` is ''"):
    check_audit(setting(folder, arms__control=""), "here")
  with pytest.raises(InputError, match="`attack.lora.learning_rates` is"):
    check_audit(setting(folder, attack__lora__learning_rates=(1e-2, 1e-3)), "here")
  with pytest.raises(InputError, match="`unlearn.warmup_steps` is 4; expected 0 to below unlearn.max_steps"):
    check_audit(setting(folder, unlearn__warmup_steps=4), "here")
  with pytest.raises(InputError, match="they would be the same attack"):
    audit(setting(folder, unlearn__batch_size=0, attack__batch_size=0), "here", done.parent / "other", done)
