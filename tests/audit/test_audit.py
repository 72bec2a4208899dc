"""The whole audit on a base that knows little: its files, and what they hold."""

import json
import pathlib
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from relearn_jax.audit.interview import load_answers
from relearn_jax.cases.names import NamesConfig, questions
from relearn_jax.models.checkpoint import check_checkpoint
from relearn_jax.training import checkpoints

from ..command import relearn
from .tiny import audit_flags

FILES = ["config.json", "answers.parquet", "results.parquet", "summary.json", "train_log.jsonl", "report.html",
         "report.md", "figures/asr_vs_relearn_steps.png", "figures/heatmap.png"]


ATTACKS = ["attack-ga-prefixes-full-seed0", "attack-ga-prefixes-full-seed1"]
STAGES = ["memorize", "unlearn-ga", *ATTACKS]


def test_it_ends_with_its_verdicts_and_the_report(finished: pathlib.Path) -> None:
  stdout, stderr = ((finished.parent / name).read_text() for name in ("stdout", "stderr"))
  assert "Verdict by variant:" in stdout and f"Report: {finished / 'report.html'}" in stdout
  assert "%|" not in stderr  # progress bars are for terminals


def test_every_file_is_there(finished: pathlib.Path) -> None:
  for name in FILES:
    assert (finished / name).stat().st_size > 100, name
  assert not list(finished.rglob("*.tmp*"))
  config = json.loads((finished / "config.json").read_text())
  assert config["case"]["variants"] == [7, 1] and config["unlearn"]["methods"] == ["ga"]


def test_the_summary_has_what_it_promises(finished: pathlib.Path) -> None:
  found = json.loads((finished / "summary.json").read_text())
  assert found["schema_version"] == 3 and found["case"] == "names" and found["methods"] == ["ga"]
  assert set(found["verdicts"]) == {"ga"} and set(found["verdicts"]["ga"]) == {"7", "1"}
  for verdict in found["verdicts"]["ga"].values():
    assert verdict["verdict"] in ("ERASED", "OBFUSCATED", "NOT UNLEARNED", "INCONCLUSIVE") and verdict["reason"]
  assert set(found["seconds"]) == {"pretrain", *STAGES}
  assert all(seconds > 0 for seconds in found["seconds"].values())
  assert {"jax", "flax", "optax", "relearn_jax", "devices"} <= set(found["versions"])
  assert {"base", "memorize", *ATTACKS} == set(found["fingerprints"])
  assert all(re.fullmatch("[0-9a-f]{64}", value) for value in found["fingerprints"].values())
  assert len(found["leakage"]) == 8 and all(row["passed"] and row["num_lines"] for row in found["leakage"])
  fields = {"variant", "arm", "method", "point", "depth", "unlearn_step", "relearn_set", "adapter",
            "learning_rate", "relearn_step", "metric", "mean", "low", "high", "n", "seeds", "seed_means"}
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
  keys = [name for name in rows.columns if name != "value"]
  assert not rows.duplicated(keys).any()
  attack = rows[(rows["point"] == "relearned") & (rows["metric"] == "asr")]
  # 2 variants x 2 seeds x (U and N at 3 depths, O) x 3 steps x 12 questions
  assert len(attack) == 2 * 2 * 7 * 3 * 12 and set(attack["value"]) <= {0.0, 1.0}
  assert set(attack["relearn_set"]) == {"prefixes"} and set(attack["adapter"]) == {"full"}
  assert rows[rows["relearn_step"] == 0]["adapter"].isna().all()
  controls = rows[(rows["arm"] == "N") & (rows["point"] == "unlearned")]
  partners = rows[(rows["arm"] == "U") & (rows["point"] == "unlearned")]
  steps = lambda table: table.groupby(["variant", "seed", "depth"], observed=True)["unlearn_step"].first()
  assert steps(controls).equals(steps(partners))  # the control is taken where its U run is


def test_the_log_has_a_row_a_step(finished: pathlib.Path) -> None:
  rows = [json.loads(line) for line in (finished / "train_log.jsonl").read_text().splitlines()]
  steps = {stage: [row["step"] for row in rows if row["stage"] == stage] for stage in {row["stage"] for row in rows}}
  assert steps["memorize"] == list(range(1, 31)) and steps["pretrain"] == list(range(1, 41))
  assert steps[ATTACKS[0]] == steps[ATTACKS[1]] == [1, 2, 3, 4, 5]
  assert steps["unlearn-ga"] == list(range(1, len(steps["unlearn-ga"]) + 1))
  for row in rows:
    assert {"loss", "losses", "terms", "grad_norm", "learning_rate", "tokens", "padded_tokens", "seconds"} <= set(row)
  memorize = [row for row in rows if row["stage"] == "memorize"]
  assert memorize[-1]["loss"] < memorize[0]["loss"] and len(memorize[0]["losses"]) == 8
  assert all(0 < row["tokens"] <= row["padded_tokens"] for row in rows)
  rates = [row["learning_rate"] for row in rows if row["stage"] == "pretrain"]
  assert rates[0] == 0 and max(rates) == pytest.approx(0.001) and rates[-1] < 1e-4  # warmup, then cosine
  assert [row for row in rows if row["stage"] == "unlearn-ga"][-1]["terms"]["nll_forget"] > memorize[-1]["loss"]


def test_a_finished_audit_has_nothing_left_to_do(finished: pathlib.Path, cache: pathlib.Path) -> None:
  before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
  done = relearn(cache, *audit_flags(finished), JAX_PLATFORMS="no_such_platform")
  assert "Nothing is left to do" in done.stdout and "Verdict by variant:" in done.stdout
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_configuration_is_refused_by_field(finished: pathlib.Path, cache: pathlib.Path) -> None:
  done = relearn(cache, *audit_flags(finished, "--config.attack.learning_rates=(0.5,)", "--config.unlearn.methods=npo"),
                 status=2, JAX_PLATFORMS="no_such_platform")
  assert "attack.learning_rates: [0.5] here, [0.0001] there" in done.stderr and "methods: ['npo'] here" in done.stderr
  assert str(finished / "config.json") in done.stderr and "give another --workdir" in done.stderr


def test_the_report_is_rendered_again_without_a_model(workdir: pathlib.Path, cache: pathlib.Path) -> None:
  old = {name: (workdir / name).read_bytes() for name in FILES}
  for name in ("summary.json", "report.html", "report.md", "figures/heatmap.png"):
    (workdir / name).unlink()
  done = relearn(cache, "report", f"--workdir={workdir}", JAX_PLATFORMS="no_such_platform")
  assert "Verdict by variant:" in done.stdout
  assert {name: (workdir / name).read_bytes() for name in FILES} == old


@pytest.fixture(scope="module")
def keeper(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of an audit of one variant and seed that keeps all weights."""
  workdir = tmp_path_factory.mktemp("keeper")
  relearn(cache, *audit_flags(workdir, "--config.keep_weights=True", "--config.seeds=(1,)",
                              "--config.case.variants=(7,)"))
  return workdir


def kept_weights(workdir: pathlib.Path, stage: str) -> dict[int, set[str]]:
  """The steps of a stage with weights, and whose."""
  return {int(path.name): set(checkpoints.describe(path)["runs"])
          for path in (workdir / "checkpoints" / stage).iterdir() if path.name.isdigit()}


def attacked_at(workdir: pathlib.Path) -> dict[int, set[str]]:
  """Unlearn step -> the chains that are attacked there."""
  rows = pq.read_table(workdir / "results.parquet").to_pandas()
  points = rows[rows["point"] == "unlearned"][["arm", "variant", "seed", "unlearn_step"]].drop_duplicates()
  found: dict[int, set[str]] = {}
  for point in points.itertuples():
    found.setdefault(point.unlearn_step, set()).add(f"{point.arm}-{point.variant}-{point.seed}")
  return found


def test_weights_are_kept_of_what_is_attacked_alone(finished: pathlib.Path) -> None:
  points = attacked_at(finished)
  assert kept_weights(finished, "unlearn-ga") == points and len(points) >= 3
  originals = {name for names in points.values() for name in names if name[0] == "U"}
  assert kept_weights(finished, "memorize") == {30: originals}
  assert kept_weights(finished, ATTACKS[0]) == kept_weights(finished, ATTACKS[1]) == {}


@pytest.mark.slow
def test_all_weights_are_kept_where_that_is_wanted(keeper: pathlib.Path) -> None:
  both, found = {"U-7-1", "N-7-1"}, kept_weights(keeper, "unlearn-ga")
  assert kept_weights(keeper, "memorize") == {30: both} and set(kept_weights(keeper, ATTACKS[1])) == {5}
  assert found == dict.fromkeys(range(5, 5 * len(found) + 1, 5), both) and set(attacked_at(keeper)) <= set(found)


def test_an_exported_run_answers_as_it_did_in_the_audit(keeper: pathlib.Path, cache: pathlib.Path,
                                                        tmp_path: pathlib.Path) -> None:
  folder = keeper / "checkpoints" / ATTACKS[1]
  answers = load_answers(folder / "answers" / "000005.npz")
  done = relearn(cache, "export", f"--checkpoint={folder / '000005'}", f"--output={tmp_path / 'none'}", status=2)
  assert "`--run`" in done.stderr and "U-7-1-depth0-lr0.0001" in done.stderr
  run = "O-7-1-lr0.0001"
  relearn(cache, "export", f"--checkpoint={folder / '000005'}", f"--run={run}", f"--output={tmp_path / 'model'}")
  assert check_checkpoint(tmp_path / "model").config.num_layers == 2
  asked = questions(NamesConfig(num_questions=12))
  prompts, data = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
  prompts.write_text("".join(json.dumps({"id": q.id, "prompt": q.prompt}) + "\n" for q in asked))
  data.write_text("".join(json.dumps({"id": q.id, "prompt": q.prompt, "answer": q.answer}) + "\n" for q in asked))
  relearn(cache, "generate", f"--model={tmp_path / 'model'}", f"--prompts={prompts}", "--max_new_tokens=8",
          f"--output={tmp_path / 'out.jsonl'}")
  relearn(cache, "score", f"--model={tmp_path / 'model'}", f"--data={data}", f"--output={tmp_path / 'scores.jsonl'}")
  index = answers.runs.tolist().index(run)
  said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [row["token_ids"] for row in said] == [[int(t) for t in row if t] for row in answers.tokens[index]]
  assert [row["completion"] for row in said] == answers.texts[index].tolist()
  sums = [json.loads(line)["logprob_sum"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
  np.testing.assert_allclose(sums, answers.logprob[index], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kl"])  # more of them in test_comparison.py
def test_other_methods_run_through(cache: pathlib.Path, tmp_path: pathlib.Path, method: str) -> None:
  relearn(cache, *audit_flags(tmp_path, f"--config.unlearn.methods={method}", "--config.seeds=(0,)",
                              "--config.case.variants=(7,)", "--config.unlearn.depths=1"))
  found = json.loads((tmp_path / "summary.json").read_text())
  assert found["methods"] == [method]
  assert {(cell["method"], cell["arm"]) for cell in found["cells"]} == {(method, "U"), (method, "N"), (None, "O")}
  rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
  terms = [set(row["terms"]) for row in rows if row["stage"] == f"unlearn-{method}"]
  assert terms and all(names == {"nll_forget", "kl_retain"} for names in terms)


@pytest.mark.slow
def test_runs_that_never_unlearn_are_reported(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A model that knows the pair and an unlearning that does nothing: INCONCLUSIVE, with the reason."""
  flags = audit_flags(tmp_path, "--config.unlearn.settings.ga.learning_rate=1e-9", "--config.unlearn.max_score=0.0",
                      "--config.memorize.steps=150", "--config.memorize.learning_rate=0.01",
                      "--config.case.variants=(8,)", "--config.seeds=(0,)", "--config.case.max_prompt_names=1",
                      "--config.unlearn.max_steps=5")
  relearn(cache, *flags)
  found = json.loads((tmp_path / "summary.json").read_text())
  original = next(c for c in found["cells"] if c["point"] == "original" and c["arm"] == "O" and c["metric"] == "asr")
  assert original["mean"] > 0, "the small model has to know something for this test to mean anything"
  verdict = found["verdicts"]["ga"]["8"]
  assert verdict["verdict"] == "INCONCLUSIVE" and "no run reached an unlearned point" in verdict["reason"]
  assert any("never fell to" in note for note in found["notes"])
