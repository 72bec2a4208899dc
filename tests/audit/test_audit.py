"""The whole audit, as a user runs it, on a base that knows little: files, restarts, devices, kills."""

import json
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest

from relearn_jax.audit.evaluate import load_scores
from relearn_jax.models.checkpoint import check_checkpoint

from ..command import CONFIG, TINY, argv, environment, relearn, summary

FILES = ["config.json", "results.parquet", "summary.json", "train_log.jsonl", "report.html", "report.md",
         "figures/asr_vs_relearn_steps.png", "figures/heatmap.png"]


def audit_flags(workdir: pathlib.Path, *more: str) -> list[str]:
  """The tiny audit, with `more` in place of its own settings of the same name."""
  settings = {flag.split("=")[0]: flag for flag in (*TINY, *more)}
  return ["audit", f"--config={CONFIG}", f"--workdir={workdir}", *settings.values()]


@pytest.fixture(scope="module")
def workdir(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A finished audit."""
  folder = tmp_path_factory.mktemp("audit") / "names"
  done = relearn(cache, *audit_flags(folder))
  assert "Verdict by variant:" in done.stdout and f"Report: {folder / 'report.html'}" in done.stdout
  assert "%|" not in done.stderr  # progress bars are for terminals
  return folder


def test_every_file_is_there(workdir: pathlib.Path) -> None:
  for name in FILES:
    assert (workdir / name).stat().st_size > 100, name
  assert not list(workdir.rglob("*.tmp"))
  config = json.loads((workdir / "config.json").read_text())
  assert config["case"]["variants"] == [7, 1] and config["method"] == "ga"


def test_the_summary_has_what_it_promises(workdir: pathlib.Path) -> None:
  found = json.loads((workdir / "summary.json").read_text())
  assert found["schema_version"] == 1 and found["case"] == "names" and found["method"] == "ga"
  assert set(found["verdicts"]) == {"7", "1"}
  for verdict in found["verdicts"].values():
    assert verdict["verdict"] in ("ERASED", "OBFUSCATED", "INCONCLUSIVE") and verdict["reason"]
  assert set(found["seconds"]) == {"base", "memorize", "unlearn", "relearn"}
  assert all(seconds > 0 for seconds in found["seconds"].values())
  assert {"jax", "flax", "optax", "relearn_jax", "devices"} <= set(found["versions"])
  assert {"base", "memorized", "relearned_seed0", "relearned_seed1"} == set(found["fingerprints"])
  assert all(re.fullmatch("[0-9a-f]{64}", value) for value in found["fingerprints"].values())
  assert len(found["leakage"]) == 8 and all(row["passed"] and row["num_lines"] for row in found["leakage"])
  fields = {"variant", "arm", "method", "point", "depth", "unlearn_step", "relearn_set", "relearn_step", "metric",
            "mean", "low", "high", "n", "seeds"}
  cells = {(c["variant"], c["arm"], c["point"], c["depth"], c["relearn_step"], c["metric"]) for c in found["cells"]}
  assert all(set(cell) == fields for cell in found["cells"])
  for variant in ("7", "1"):
    assert (variant, "O", "original", None, 0, "asr") in cells
    for arm in "UN":
      for depth in range(3):
        assert (variant, arm, "unlearned", depth, 0, "asr") in cells
        assert {(variant, arm, "relearned", depth, step, "asr") for step in (1, 2, 5)} <= cells


def test_results_are_a_row_a_question(workdir: pathlib.Path) -> None:
  rows = pq.read_table(workdir / "results.parquet").to_pandas()
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


def test_the_log_has_a_row_a_step(workdir: pathlib.Path) -> None:
  rows = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
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


def test_a_finished_audit_has_nothing_left_to_do(workdir: pathlib.Path, cache: pathlib.Path) -> None:
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
  done = relearn(cache, *audit_flags(workdir), JAX_PLATFORMS="no_such_platform")
  assert "Nothing is left to do" in done.stdout and "Verdict by variant:" in done.stdout
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_configuration_is_refused_by_field(workdir: pathlib.Path, cache: pathlib.Path) -> None:
  done = relearn(cache, *audit_flags(workdir, "--config.relearn.learning_rates=(0.5,)", "--config.method=npo"),
                 status=2, JAX_PLATFORMS="no_such_platform")
  assert "relearn.learning_rates: [0.5] here, [0.0001] there" in done.stderr and "method: 'npo' here" in done.stderr
  assert str(workdir / "config.json") in done.stderr and "give another --workdir" in done.stderr


def test_the_report_is_rendered_again_without_a_model(workdir: pathlib.Path, cache: pathlib.Path) -> None:
  old = {name: (workdir / name).read_bytes() for name in FILES}
  for name in ("summary.json", "report.html", "report.md", "figures/heatmap.png"):
    (workdir / name).unlink()
  done = relearn(cache, "report", f"--workdir={workdir}", JAX_PLATFORMS="no_such_platform")
  assert "Verdict by variant:" in done.stdout
  assert {name: (workdir / name).read_bytes() for name in FILES} == old


def test_an_exported_run_answers_as_it_did_in_the_audit(workdir: pathlib.Path, cache: pathlib.Path,
                                                        tmp_path: pathlib.Path) -> None:
  checkpoint = workdir / "checkpoints" / "relearn-seed1" / "000005"
  scores = load_scores(workdir / "checkpoints" / "scores" / "relearn-seed1-000005.npz")
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


@pytest.mark.parametrize("devices", [1, 8])
def test_the_number_of_devices_changes_nothing(workdir: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path,
                                               devices: int) -> None:
  """Weights, answers and every number equal to the bit: 8 runs and 14 cells on 1, 2 and 8 devices."""
  relearn(cache, *audit_flags(tmp_path), JAX_NUM_CPU_DEVICES=str(devices))
  ours, theirs = (pq.read_table(folder / "results.parquet") for folder in (tmp_path, workdir))
  assert ours.equals(theirs)
  assert summary(tmp_path) == summary(workdir)  # the hashes of the weights among it
  versions = json.loads((tmp_path / "summary.json").read_text())["versions"]
  assert versions["devices"].startswith(f"{devices} x")


def logged(workdir: pathlib.Path, stage: str, step: int) -> Callable[[], bool]:
  """Whether a stage has reached a step."""
  def reached() -> bool:
    path = workdir / "train_log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(f'"stage": "{stage}", "step": {step},' in line for line in lines)
  return reached


def kill_when(reached: Callable[[], bool], cache: pathlib.Path, workdir: pathlib.Path) -> None:
  """Starts or continues the audit and kills it, with SIGKILL, as soon as `reached`."""
  process = subprocess.Popen(argv(*audit_flags(workdir)), env=environment(cache), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
  end = time.monotonic() + 300
  while not reached():
    assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[0]}"
    assert time.monotonic() < end
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def test_runs_that_are_spread_over_devices_end_alike(workdir: pathlib.Path, cache: pathlib.Path,
                                                     tmp_path: pathlib.Path) -> None:
  relearn(cache, *audit_flags(tmp_path / "spread"), "--mesh=fsdp:2")
  ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "spread", workdir))
  assert [cell["variant"] for cell in ours["cells"]] == [cell["variant"] for cell in theirs["cells"]]
  for mine, other in zip(ours["cells"], theirs["cells"], strict=True):
    assert mine["mean"] == pytest.approx(other["mean"], abs=1e-3)  # fp32 sums in another order, some fifty steps on
  assert {v: row["verdict"] for v, row in ours["verdicts"].items()} == {
      v: row["verdict"] for v, row in theirs["verdicts"].items()}


@pytest.mark.parametrize(("mesh", "problem"), [
    ("fsdp:3", "`--mesh` has fsdp:3, which does not divide hidden_size=32"),
    ("tensor:4", "`--mesh` has tensor:4, which does not divide num_attention_heads=2"),
    ("fsdp:4", "which needs 4 devices, and there are 2"), ("fdsp:2", "has axis 'fdsp' (did you mean 'fsdp'?)")])
def test_meshes_that_cannot_be(cache: pathlib.Path, tmp_path: pathlib.Path, mesh: str, problem: str) -> None:
  done = relearn(cache, *audit_flags(tmp_path / "x"), f"--mesh={mesh}", status=2)
  assert problem in done.stderr


@pytest.fixture
def fresh_base(cache: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A cache with the compiled programs, without a base model: the audit has to train it."""
  folder = tmp_path / "cache"
  folder.mkdir()
  (folder / "xla").symlink_to(cache / "xla")
  return folder


def test_killed_in_every_stage_it_ends_with_the_same_summary(workdir: pathlib.Path, fresh_base: pathlib.Path,
                                                             tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "killed"
  kept = folder / "checkpoints"
  moments: list[Callable[[], bool]] = [
      logged(folder, "pretrain", 10), logged(folder, "memorize", 27), (kept / "scores" / "unlearn-000005.npz").exists,
      logged(folder, "unlearn", 12), logged(folder, "relearn-seed0", 3), logged(folder, "relearn-seed1", 4),
      (kept / "scores" / "relearn-seed1-000005.npz").exists, (folder / "results.parquet").exists,
      (folder / "summary.json").exists]
  for reached in moments:
    kill_when(reached, fresh_base, folder)
    assert not (folder / "report.html").exists()
  relearn(fresh_base, *audit_flags(folder))
  assert summary(folder) == summary(workdir)
  assert (folder / "report.md").exists() and not list(kept.rglob("resume"))
  rows = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
  steps = [(row["stage"], row["step"]) for row in rows]
  assert len(steps) == len(set(steps))


def test_two_audits_do_not_share_a_workdir(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  first = subprocess.Popen(argv(*audit_flags(tmp_path)), env=environment(cache), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
  try:
    end = time.monotonic() + 120
    while not (tmp_path / "train_log.jsonl").exists():
      assert time.monotonic() < end and first.poll() is None
      time.sleep(0.05)
    done = relearn(cache, *audit_flags(tmp_path), status=2, JAX_PLATFORMS="no_such_platform")
    assert "is in use by another process" in done.stderr
  finally:
    first.kill()
    first.wait()


@pytest.mark.parametrize("method", ["kl"])  # more of them in test_comparison.py
def test_other_methods_run_through(cache: pathlib.Path, tmp_path: pathlib.Path, method: str) -> None:
  relearn(cache, *audit_flags(tmp_path, f"--config.method={method}", "--config.case.seeds=(0,)",
                              "--config.case.variants=(7,)", "--config.unlearn.depths=1"))
  found = json.loads((tmp_path / "summary.json").read_text())
  assert found["method"] == method and {cell["method"] for cell in found["cells"]} == {method}
  rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
  terms = {"kl": {"nll_forget", "kl_retain"}}
  assert all(set(row["terms"]) == terms[method] for row in rows if row["stage"] == "unlearn")


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
