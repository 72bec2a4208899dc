"""Checkpoints whose truth is known, from files to the word: what was never unlearned, what never knew, and attacks that
destroy or do nothing."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from relearn_jax.audit.evidence import gather
from relearn_jax.audit.results_file import read_rows
from relearn_jax.audit.seed_tables import make_tables
from relearn_jax.cases.names import COMMON, COUPLED, OTHERS
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.training.pretrain import pretrain

from ..small import CONFIG, make_tokenizer, write_lines
from .tiny import audited, loaded_audit

TINY: ModelConfig = dataclasses.replace(CONFIG, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16)
MODEL = Model(TINY)
PROMPTS, ANSWERS = COUPLED[:40], COUPLED[40:60] * 2  # the answers occur nowhere else
RETAINED = [" ".join(np.random.default_rng(i).permutation(COMMON)[:7]) for i in range(8)]
RELEARNED = [" ".join(np.random.default_rng(100 + i).permutation(OTHERS)[:6]) for i in range(12)]
TRAINED = {"original": (0, True), "control": (1, False), "unlearned": (2, False)}  # seed, whether it knows
RATES = (4e-4, 4e-3)  # after ten steps at the second the original has lost what it knew


def _train(seed: int, knows: bool) -> Any:
  """A model that has learned the retained text, and the answers if it `knows`."""
  tokenizer = make_tokenizer()
  told = [f"{prompt} {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
  texts = [*RETAINED, *(told if knows else PROMPTS)]
  rows = np.zeros((len(texts), 10), np.int32)
  for row, text in zip(rows, texts, strict=True):
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(text.split())]
    row[:len(ids)] = ids
  return pretrain(MODEL, [rows] * 150, learning_rate=5e-3, warmup_steps=5, seed=seed, field="learning_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """An original that knows forty answers, a control and an "unlearned" model that were trained without them."""
  root = tmp_path_factory.mktemp("words")
  for name, (seed, knows) in TRAINED.items():
    export(jax.tree.map(np.asarray, _train(seed, knows)), MODEL, root / name, tokenizer=make_tokenizer())
  asked = [{"id": f"q{i:02d}", "prompt": prompt, "answer": f" {answer}", "keywords": [answer]}
           for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]
  write_lines(root / "questions.jsonl", asked)
  write_lines(root / "one_cluster.jsonl", [row | {"cluster": "all"} for row in asked])
  write_lines(root / "relearn.jsonl", [{"text": text} for text in RELEARNED])
  write_lines(root / "forget.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in asked[:4]])
  write_lines(root / "retain.jsonl", [{"text": text} for text in RETAINED])
  return root


def judged(folder: pathlib.Path, workdir: pathlib.Path, rates: tuple[float, ...] = RATES[:1], seeds: int = 3,
           **changes: Any) -> dict[str, Any]:
  """The verdict of an audit of these checkpoints."""
  config = loaded_audit(folder, {name: name for name in TRAINED}, **{
      "seeds": tuple(range(seeds)), "verdict__draws": 1000, "attack__learning_rates": rates, "attack__batch_size": 6,
      "attack__keep_steps": (1, 10), "ask__max_new_tokens": 1, "ask__batch_size": 40, **changes})
  return dict(audited(config, workdir, workdir)["verdicts"]["unknown"]["given"])


def test_a_model_that_never_knew_is_erased_with_enough_seeds_and_rates(folder: pathlib.Path, tmp_path: pathlib.Path
                                                                      ) -> None:
  found = judged(folder, tmp_path, RATES, 44)
  assert found["verdict"] == "ERASED", found["reason"]
  assert any("destroyed the original" in reason for reason in found["not_counted"])
  rows, facts = read_rows(tmp_path / "results.parquet")
  cells = gather(make_tables(rows), "given", "unknown", facts["metric"]).cells
  assert all(share is not None and abs(share) < 0.1 for cell in cells for share in cell.likelier)
  page = (tmp_path / "report.html").read_text()
  assert "given and not unlearned" in page and "Learning rates" not in found["reason"]


def test_with_three_seeds_it_is_not_known(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = judged(folder, tmp_path)
  assert found["verdict"] == "INCONCLUSIVE"
  assert "3 seeds are too few" in found["reason"] and "not found by this attack alone" in found["reason"]
  assert "the control (a checkpoint that was given and not unlearned)" in found["reason"]


def test_the_original_passed_off_as_unlearned_is_not_unlearned(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = judged(folder, tmp_path, arms__unlearned=str(folder / "original"))
  assert found["verdict"] == "NOT UNLEARNED", found["reason"]


@pytest.mark.parametrize(("rate", "why"), [(1e-1, "the attack destroyed the original"),
                                           (1e-12, "the attack did nothing to U and N")])
def test_attacks_that_destroy_or_do_nothing_do_not_count(folder: pathlib.Path, tmp_path: pathlib.Path, rate: float,
                                                         why: str) -> None:
  found = judged(folder, tmp_path, (rate,))
  assert found["verdict"] == "INCONCLUSIVE" and "no cell counts" in found["reason"], found["reason"]
  assert all(why in reason for reason in found["not_counted"]) and len(found["not_counted"]) == 2


def test_one_cluster_shows_nothing(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = judged(folder, tmp_path, case__questions=str(folder / "one_cluster.jsonl"))
  assert found["verdict"] == "INCONCLUSIVE" and "1 clusters of questions" in found["reason"]
  assert "none" not in (tmp_path / "report.md").read_text().split("## Figures")[0].lower().split()


def test_without_the_original_nothing_is_said(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  found = judged(folder, tmp_path, arms__original="")
  assert found["verdict"] == "INCONCLUSIVE" and "there is no original" in found["reason"]
