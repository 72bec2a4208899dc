"""The whole audit on a base that knows little: its files, and what they hold."""

import json
import pathlib
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from relearn_jax.audit.evaluate import load_scores
from relearn_jax.models.checkpoint import check_checkpoint

from ..command import relearn
from .tiny import audit_flags

FILES = ["config.json", "results.parquet", "summary.json", "train_log.jsonl", "report.html", "report.md",
         "figures/asr_vs_relearn_steps.png", "figures/heatmap.png"]


def test_it_ends_with_its_verdicts_and_the_report(finished: pathlib.Path) -> None:
  stdout, stderr = ((finished.parent / name).read_text() for name in ("stdout", "stderr"))
  assert "Verdict by variant:" in stdout and f"Report: {finished / 'report.html'}" in stdout
  assert "%|" not in stderr  # progress bars are for terminals


def test_every_file_is_there(finished: pathlib.Path) -> None:
  for name in FILES:
    assert (finished / name).stat().st_size > 100, name
  assert not list(finished.rglob("*.tmp"))
  config = json.loads((finished / "config.json").read_text())
  assert config["case"]["variants"] == [7, 1] and config["method"] == "ga"


def test_the_summary_has_what_it_promises(finished: pathlib.Path) -> None:
  found = json.loads((finished / "summary.json").read_text())
  assert found["schema_version"] == 2 and found["case"] == "names" and found["method"] == "ga"
  assert set(found["verdicts"]) == {"7", "1"}
  for verdict in found["verdicts"].values():
    assert verdict["verdict"] in ("ERASED", "OBFUSCATED", "NOT UNLEARNED", "INCONCLUSIVE") and verdict["reason"]
  assert set(found["seconds"]) == {"base", "memorize", "unlearn", "relearn"}
  assert all(seconds > 0 for seconds in found["seconds"].values())
  assert {"jax", "flax", "optax", "relearn_jax", "devices"} <= set(found["versions"])
  assert {"base", "memorized", "relearned_seed0", "relearned_seed1"} == set(found["fingerprints"])
  assert all(re.fullmatch("[0-9a-f]{64}", value) for value in found["fingerprints"].values())
  assert len(found["leakage"]) == 8 and all(row["passed"] and row["num_lines"] for row in found["leakage"])
  fields = {"variant", "arm", "method", "point", "depth", "unlearn_step", "relearn_set", "learning_rate",
            "relearn_step", "metric", "mean", "low", "high", "n", "seeds", "seed_means"}
  cells = {(c["variant"], c["arm"], c["point"], c["depth"], c["relearn_step"], c["metric"]) for c in found["cells"]}
  assert all(set(cell) == fields for cell in found["cells"])
  for variant in ("7", "1"):
    assert (variant, "O", "original", None, 0, "asr") in cells
    for arm in "UN":
      for depth in range(3):
        assert (variant, arm, "unlearned", depth, 0, "asr") in cells
        assert {(variant, arm, "relearned", depth, step, "asr") for step in (1, 2, 5)} <= cells


def test_results_are_a_row_a_question(finished: pathlib.Path) -> None:
  rows = pq.read_table(finished / "results.parquet").to_pandas()
  keys = ["variant", "arm", "point", "depth", "unlearn_step", "relearn_step", "seed", "question", "metric"]
  assert not rows.duplicated(keys).any()
  attack = rows[(rows["point"] == "relearned") & (rows["metric"] == "asr")]
  # 2 variants x 2 seeds x (U and N at 3 depths, O) x 3 steps x 12 questions
  assert len(attack) == 2 * 2 * 7 * 3 * 12 and set(attack["value"]) <= {0.0, 1.0}
  assert set(attack["relearn_set"]) == {"prefixes"} and set(rows["adapter"]) == {"full"}
  controls = rows[(rows["arm"] == "N") & (rows["point"] == "unlearned")]
  partners = rows[(rows["arm"] == "U") & (rows["point"] == "unlearned")]
  steps = lambda table: table.groupby(["variant", "seed", "depth"], observed=True)["unlearn_step"].first()
  assert steps(controls).equals(steps(partners))  # the control is taken where its U run is


def test_the_log_has_a_row_a_step(finished: pathlib.Path) -> None:
  rows = [json.loads(line) for line in (finished / "train_log.jsonl").read_text().splitlines()]
  steps = {stage: [row["step"] for row in rows if row["stage"] == stage] for stage in {row["stage"] for row in rows}}
  assert steps["memorize"] == list(range(1, 31)) and steps["pretrain"] == list(range(1, 41))
  assert steps["relearn-seed0"] == steps["relearn-seed1"] == [1, 2, 3, 4, 5]
  assert steps["unlearn"] == list(range(1, len(steps["unlearn"]) + 1))
  for row in rows:
    assert {"loss", "losses", "terms", "grad_norm", "learning_rate", "tokens", "padded_tokens", "seconds"} <= set(row)
  memorize = [row for row in rows if row["stage"] == "memorize"]
  assert memorize[-1]["loss"] < memorize[0]["loss"] and len(memorize[0]["losses"]) == 8
  assert all(0 < row["tokens"] <= row["padded_tokens"] for row in rows)
  rates = [row["learning_rate"] for row in rows if row["stage"] == "pretrain"]
  assert rates[0] == 0 and max(rates) == pytest.approx(0.001) and rates[-1] < 1e-4  # warmup, then cosine
  assert [row for row in rows if row["stage"] == "unlearn"][-1]["terms"]["nll_forget"] > memorize[-1]["loss"]


def test_a_finished_audit_has_nothing_left_to_do(finished: pathlib.Path, cache: pathlib.Path) -> None:
  before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
  done = relearn(cache, *audit_flags(finished), JAX_PLATFORMS="no_such_platform")
  assert "Nothing is left to do" in done.stdout and "Verdict by variant:" in done.stdout
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_configuration_is_refused_by_field(finished: pathlib.Path, cache: pathlib.Path) -> None:
  done = relearn(cache, *audit_flags(finished, "--config.relearn.learning_rates=(0.5,)", "--config.method=npo"),
                 status=2, JAX_PLATFORMS="no_such_platform")
  assert "relearn.learning_rates: [0.5] here, [0.0001] there" in done.stderr and "method: 'npo' here" in done.stderr
  assert str(finished / "config.json") in done.stderr and "give another --workdir" in done.stderr


def test_the_report_is_rendered_again_without_a_model(workdir: pathlib.Path, cache: pathlib.Path) -> None:
  old = {name: (workdir / name).read_bytes() for name in FILES}
  for name in ("summary.json", "report.html", "report.md", "figures/heatmap.png"):
    (workdir / name).unlink()
  done = relearn(cache, "report", f"--workdir={workdir}", JAX_PLATFORMS="no_such_platform")
  assert "Verdict by variant:" in done.stdout
  assert {name: (workdir / name).read_bytes() for name in FILES} == old


def test_an_exported_run_answers_as_it_did_in_the_audit(finished: pathlib.Path, cache: pathlib.Path,
                                                        tmp_path: pathlib.Path) -> None:
  checkpoint = finished / "checkpoints" / "relearn-seed1" / "000005"
  scores = load_scores(finished / "checkpoints" / "scores" / "relearn-seed1-000005.npz")
  done = relearn(cache, "export", f"--checkpoint={checkpoint}", f"--output={tmp_path / 'none'}", status=2)
  assert "`--run`" in done.stderr and "U-7-1-depth0" in done.stderr
  relearn(cache, "export", f"--checkpoint={checkpoint}", "--run=O-7-1", f"--output={tmp_path / 'model'}")
  assert check_checkpoint(tmp_path / "model").config.num_layers == 2
  from relearn_jax.cases.names import NamesConfig, questions
  asked = questions(NamesConfig(num_questions=12))
  prompts, data = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
  prompts.write_text("".join(json.dumps({"id": q.id, "prompt": q.prompt}) + "\n" for q in asked))
  data.write_text("".join(json.dumps({"id": q.id, "prompt": q.prompt, "answer": " " + q.answer}) + "\n" for q in asked))
  relearn(cache, "generate", f"--model={tmp_path / 'model'}", f"--prompts={prompts}", "--max_new_tokens=8",
          f"--output={tmp_path / 'out.jsonl'}")
  relearn(cache, "score", f"--model={tmp_path / 'model'}", f"--data={data}", f"--output={tmp_path / 'scores.jsonl'}")
  index = 6  # U and N at three depths come before O
  answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [row["token_ids"] for row in answers] == [[int(t) for t in row if t] for row in scores.tokens[index]]
  sums = [json.loads(line)["logprob_sum"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
  np.testing.assert_allclose(sums, scores.logprob[index], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kl"])  # more of them in test_comparison.py
def test_other_methods_run_through(cache: pathlib.Path, tmp_path: pathlib.Path, method: str) -> None:
  relearn(cache, *audit_flags(tmp_path, f"--config.method={method}", "--config.case.seeds=(0,)",
                              "--config.case.variants=(7,)", "--config.unlearn.depths=1"))
  found = json.loads((tmp_path / "summary.json").read_text())
  assert found["method"] == method and {cell["method"] for cell in found["cells"]} == {method}
  rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
  terms = {"kl": {"nll_forget", "kl_retain"}}
  assert all(set(row["terms"]) == terms[method] for row in rows if row["stage"] == "unlearn")


@pytest.mark.slow
def test_runs_that_never_unlearn_are_reported(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A base that knows the pair and an unlearning that does nothing: INCONCLUSIVE, with the reason."""
  flags = audit_flags(tmp_path, "--config.methods.ga.learning_rate=1e-9", "--config.unlearn.max_asr=0.0",
                      "--config.memorize.steps=150", "--config.memorize.learning_rate=0.01",
                      "--config.case.variants=(8,)", "--config.case.seeds=(0,)", "--config.case.max_prompt_names=1",
                      "--config.unlearn.max_steps=5")
  relearn(cache, *flags)
  found = json.loads((tmp_path / "summary.json").read_text())
  original = next(c for c in found["cells"] if c["point"] == "original" and c["arm"] == "O" and c["metric"] == "asr")
  assert original["mean"] > 0, "the small model has to know something for this test to mean anything"
  assert found["verdicts"]["8"]["verdict"] == "INCONCLUSIVE"
  assert "no run reached an unlearned point" in found["verdicts"]["8"]["reason"]
  assert any("never fell to" in note for note in found["notes"])
