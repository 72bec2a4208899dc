"""`relearn unlearn` as a user runs it, on a small checkpoint."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.lora import load_peft, merge_lora
from relearn_jax.models.model import Params, flatten
from relearn_jax.objectives.methods import DEFENCES, METHODS
from relearn_jax.objectives.recipe import default_recipe
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.training.job import UnlearnJob, check_job
from relearn_jax.training.step import NOTHING
from relearn_jax.training.train_settings import AdapterSettings, rate_share
from relearn_jax.training.unlearn import _check_outputs, unlearn

from ..command import ROOT, relearn, without_devices
from ..small import MODEL, params, write_checkpoint, write_lines
from .test_step import DATA

CONFIG = ROOT / "configs" / "unlearn.py"
FORGET = [{"prompt": "James Robert", "answer": " John Michael"}, {"prompt": "David", "answer": " William"},
          {"text": "Joseph Thomas Charles"}]
RETAIN = [{"prompt": "Daniel", "answer": " Matthew Steven"}, {"text": "Andrew Paul", "complete": True}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A checkpoint, and files to forget and to retain."""
  root = tmp_path_factory.mktemp("unlearn")
  write_checkpoint(root / "base")
  write_lines(root / "forget.jsonl", FORGET)
  write_lines(root / "retain.jsonl", RETAIN)
  return root


def job(folder: pathlib.Path, **changes: object) -> UnlearnJob:
  values = {"model": str(folder / "base"), "method": "gd", "forget": str(folder / "forget.jsonl"),
            "retain": str(folder / "retain.jsonl"), "steps": 4, "learning_rate": 1e-3}
  return dataclasses.replace(UnlearnJob(), **(values | changes))  # type: ignore[arg-type]


def log(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]


def nll_by_hand(folder: pathlib.Path, rows: list[dict]) -> float:
  """Mean over the counted tokens, from the logits of each row alone."""
  from relearn_jax.models.checkpoint_sources import load_tokenizer
  tokenizer = load_tokenizer(folder / "base", MODEL.config)
  total, count = 0.0, 0
  for row in rows:
    front = row.get("prompt", "")
    words = (front + row.get("answer", row.get("text", ""))).split()
    ids = [1, *tokenizer.convert_tokens_to_ids(words), *([2] if row.get("complete", "answer" in row) else [])]
    logprobs = jax.nn.log_softmax(MODEL.logits(params(), MODEL.hidden(params(), jnp.array([ids]))))[0]
    for place in range(1 + len(front.split()), len(ids)):
      total, count = total - float(logprobs[place - 1, ids[place]]), count + 1
  return total / count


def test_the_command_from_files_to_a_folder(folder: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  flags = [f"--config={CONFIG}", f"--config.model={folder / 'base'}", "--config.method=gd", "--config.steps=4",
           f"--config.forget={folder / 'forget.jsonl'}", f"--config.retain={folder / 'retain.jsonl'}",
           "--config.learning_rate=0.001", "--config.keep_every=2", f"--workdir={tmp_path / 'job'}"]
  done = relearn(cache, "unlearn", *flags)
  assert str(tmp_path / "job" / "model") in done.stdout
  rows = log(tmp_path / "job")
  assert all(row.keys() >= {"stage", "step", "loss", "terms", "grad_norm", "learning_rate", "tokens", "padded_tokens",
                            "seconds"} for row in rows)
  assert [row["step"] for row in rows] == [1, 2, 3, 4] and {row["stage"] for row in rows} == {"unlearn"}
  # The loss before the first update, from the base's own logits: answers and their ends, a text cut and a whole one.
  forget, retain = nll_by_hand(folder, FORGET), nll_by_hand(folder, RETAIN)
  assert rows[0]["terms"] == {"nll_forget": pytest.approx(forget, abs=1e-5),
                              "nll_retain": pytest.approx(retain, abs=1e-5)}
  assert rows[0]["loss"] == pytest.approx(retain - forget, abs=1e-5)
  assert rows[-1]["terms"]["nll_forget"] > forget + 0.1
  assert rows[0]["tokens"] == 6 + 4 + 4 + 5 + 4 and rows[0]["learning_rate"] == 0.001
  kept = tmp_path / "job" / "checkpoints" / "unlearn"
  assert sorted(path.name for path in kept.iterdir()) == ["000002", "000004"]
  written = check_checkpoint(tmp_path / "job" / "model")
  assert written.config == MODEL.config and (tmp_path / "job" / "model" / "tokenizer.json").exists()
  relearn(cache, "export", f"--checkpoint={kept / '000004'}", f"--output={tmp_path / 'again'}")
  first, again = (flatten(load_params(check_checkpoint(path), MODEL))
                  for path in (tmp_path / "job" / "model", tmp_path / "again"))
  assert all(np.array_equal(first[name], again[name]) for name in first)
  assert not np.array_equal(first["embed/weight"], flatten(params())["embed/weight"])
  again, other = without_devices(cache, [["unlearn", *flags], ["unlearn", *flags, "--config.steps=5"]])
  assert again.returncode == 0 and "Nothing is left to do" in again.stdout
  assert other.returncode == 2 and "steps: 5 here, 4 there" in other.stderr


def test_methods_are_listed(cache: pathlib.Path) -> None:
  shown = relearn(cache, "unlearn", f"--config={CONFIG}", "--config.method=help")
  for name, method in METHODS.items():
    start = shown.stdout.index(f"\n  {name}\n")
    entry = shown.stdout[start:shown.stdout.index("source: ", start)]
    assert method.formula in entry and "reads: " in entry and "cached: " in entry
    assert all(f"{key} = {s.default:g}: {s.what}" in entry for key, s in method.settings.items())
    assert all(f" {rows}" in entry for rows in default_recipe(name).objective.rows)
  assert "reads: forget, retain; cached: logprobs on forget, hidden on retain" in shown.stdout  # of npo_kl
  assert all(f"\n  {name}\n      {defence.formula}" in shown.stdout for name, defence in DEFENCES.items())


@pytest.mark.parametrize("method", ["kl", "npo"])
def test_an_adapter_comes_alone_and_merged(folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path,
                                           method: str) -> None:
  adapter = AdapterSettings("lora", rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
  small = job(folder, method=method, adapter=adapter, keep_every=4, batch_size=2)
  small.methods.npo.beta = 0.5
  assert unlearn(small, "here", tmp_path / "job")
  base = load_params(check_checkpoint(folder / "base"), MODEL)
  trained, found = load_peft(tmp_path / "job" / "adapter", MODEL)
  assert (found.rank, found.alpha, found.targets) == (2, 4.0, ("down_proj", "q_proj"))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained))
  merged = flatten(load_params(check_checkpoint(tmp_path / "job" / "model"), MODEL))
  expected = flatten(merge_lora(base, trained, 2.0))
  for name, leaf in merged.items():
    np.testing.assert_array_equal(leaf, expected[name])
    changed = not np.array_equal(leaf, flatten(base)[name])
    assert changed == (name in ("layers/attn/q/weight", "layers/mlp/down/weight")), name
  kept = tmp_path / "job" / "checkpoints" / "unlearn" / "000004"
  relearn(cache, "export", f"--checkpoint={kept}", f"--output={tmp_path / 'peft'}")
  again, _ = load_peft(tmp_path / "peft", MODEL)
  assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (trained, again)), strict=True))
  relearn(cache, "export", f"--checkpoint={kept}", f"--output={tmp_path / 'merged'}", "--merge")
  again = flatten(load_params(check_checkpoint(tmp_path / "merged"), MODEL))
  assert all(np.array_equal(again[name], merged[name]) for name in merged)


@pytest.mark.slow
def test_parts_and_devices_change_nothing(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A step in two parts, with remat, on one device."""
  plain, parts = job(folder), job(folder, num_microbatches=2, remat="full")
  for name, small in (("plain", plain), ("parts", parts)):
    unlearn(small, "here", tmp_path / name, "fsdp:1")
  for ours, theirs in zip(log(tmp_path / "plain"), log(tmp_path / "parts"), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)


def test_schedules_by_hand(folder: pathlib.Path) -> None:
  at = lambda schedule, step: rate_share(job(folder, steps=10, warmup_steps=2, schedule=schedule), 10, step)
  assert [at("constant", step) for step in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
  assert [at("linear", step) for step in (1, 2, 6, 9)] == [0.5, 1.0, 0.5, 0.125]
  assert [at("cosine", step) for step in (2, 6, 9)] == pytest.approx([1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])


def test_a_job_that_diverges_ends_by_name(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  settings = job(folder, learning_rate=1e25, steps=6)
  for _ in range(2):  # again where it is run again
    with pytest.raises(InputError, match="`learning_rate` was 1e.25 when U ended in stage 'unlearn' at step 2: .* not "
                                         "finite: none is left; lower it"):
      unlearn(settings, "here", tmp_path / "job")
  assert not (tmp_path / "job" / "model").exists()


def test_outputs_that_no_loss_has_seen_are_looked_at() -> None:
  rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None], DATA["forget"])
  final = params()["final_norm"]["weight"]

  def check(weights: Params) -> None:
    mesh = runs_mesh(1)
    _check_outputs(UnlearnJob(steps=7), MODEL, repeat_runs(weights, 1, mesh), rows, mesh, NOTHING)
  check(params())
  with pytest.raises(InputError, match="at step 7: the log-probabilities of its answers are not finite"):
    check({**params(), "final_norm": {"weight": jnp.full_like(final, 3e38)}})  # finite, what comes of it is not


@pytest.mark.parametrize(("changes", "problem"), [
    ({"model": ""}, "`model` is ''; give a Hugging Face folder"), ({"forget": ""}, "`forget` is ''"),
    ({"retain": ""}, "`retain` is ''; method 'gd' needs it: a file"),
    ({"method": "gdd"}, "`method` is 'gdd'.*nearest: gd"),
    ({"method": "npo_kld"}, "`method` is 'npo_kld', which is no unlearning method .nearest: npo_kl"),
    ({"defence": "smooth"}, "`defence` is 'smooth', which is no defence .nearest: smoothing, sam.; expected one"),
    ({"method": "altpo"}, "`alternates` is ''; method 'altpo' needs it: a file of JSON lines"),
    ({"method": "whp_relabel"}, "`anchors` is ''; method 'whp_relabel' needs it: a file of JSON lines"),
    ({"defence": "sam", "num_microbatches": 2}, "`num_microbatches` is 2; expected 1: defence 'sam' takes"),
    ({"defence": "gradient_penalty", "num_microbatches": 2}, "`num_microbatches` is 2"),
    ({"learning_rate": 0.0}, "`learning_rate` is 0.0"), ({"steps": 0}, "`steps` is 0"),
    ({"warmup_steps": 4}, "`warmup_steps` is 4"), ({"schedule": "cosin"}, "`schedule` is 'cosin'.*constant, linear"),
    ({"batch_size": 0}, "`batch_size` is 0"), ({"remat": "some"}, "`remat` is 'some'"),
    ({"dtype": "float16"}, "`dtype` is 'float16'"), ({"save_dtype": "int8"}, "`save_dtype` is 'int8'"),
    ({"adapter": AdapterSettings("qlora")}, "`adapter.kind` is 'qlora'"), ({"seed": -1}, "`seed` is -1")])
def test_bad_settings_are_named(folder: pathlib.Path, changes: dict, problem: str) -> None:
  with pytest.raises(InputError, match=f"here: {problem}"):
    check_job(job(folder, **changes), "here")


@pytest.mark.parametrize(("method", "setting", "value", "domain"), [
    ("gd", "retain_weight", -1.0, "a finite number of at least 0"), ("npo", "beta", 0.0, "a finite number above 0"),
    ("npo", "beta", math.nan, "a finite number above 0"), ("simnpo", "delta", math.inf, "a finite number"),
    ("rmu", "depth", 1.5, "a finite number above 0 and at most 1"), ("scrub", "period", 0.5, "an integer above 0"),
    ("whp_logits", "reinforce_steps", 0, "an integer above 0"), ("ceu", "skip_first", 2.0, "a finite number of")])
def test_values_outside_their_domain_are_named(folder: pathlib.Path, method: str, setting: str, value: float,
                                               domain: str) -> None:
  small = job(folder, method=method)
  check_job(small, "here")
  setattr(getattr(small.methods, method), setting, value)
  with pytest.raises(InputError, match=f"here: `methods.{method}.{setting}` is {value!r}; expected {domain}"):
    check_job(small, "here")
  check_job(dataclasses.replace(small, method="ga"), "here")  # of other methods they are not read


def test_values_of_a_defence_are_checked(folder: pathlib.Path) -> None:
  small = job(folder, method="npo", defence="smoothing")
  check_job(small, "here")
  small.defences.smoothing.draws = 0
  with pytest.raises(InputError, match="here: `defences.smoothing.draws` is 0; expected an integer above 0"):
    check_job(small, "here")


PAIRS = [{"prompt": "James Robert", "answer": " John Michael"}, {"prompt": "David", "answer": " William"}]
OTHER = [{"prompt": "James Robert", "answer": " Paul"}, {"prompt": "David", "answer": " Kevin"}]
ANCHORS = {"term": "John", "generic": "Paul"}


@pytest.mark.parametrize(("method", "field", "rows", "problem"), [
    ("idk_nll", "forget", FORGET, "forget.jsonl:3: `text` stands where a prompt is needed that can be refused"),
    ("idk_dpo", "refusals", [{"answer": " "}], "refusals.jsonl: `answer` is empty in a row"),
    ("idk_dpo", "refusals", [{"text": "No"}], "refusals.jsonl:1: `answer` is missing"),
    ("idk_dpo", "refusals", [], "refusals.jsonl: "),
    ("altpo", "alternates", OTHER[:1], "alternates.jsonl: `alternates` has 1 rows, and the forget set 2"),
    ("altpo", "alternates", OTHER[::-1], "alternates.jsonl:1: `prompt` is not that of line 1 of the forget set"),
    ("altpo", "alternates", [OTHER[0], {"prompt": "David"}], "alternates.jsonl:2: `answer` is missing"),
    ("whp_relabel", "anchors", [{"term": "Mark", "generic": "Paul"}], "anchors.jsonl: `anchors` changes no label"),
    ("whp_relabel", "anchors", [{"term": "James", "generic": "Paul"}], "`anchors` changes no label"),  # in a prompt
    ("whp_relabel", "anchors", [{"term": "John", "generic": "John"}], "`anchors` changes no label"),
    ("whp_relabel", "anchors", [], "anchors.jsonl: "),
    ("whp_relabel", "anchors", [{"term": "", "generic": "Paul"}], "anchors.jsonl:1: `term` is ''; give a word"),
    ("whp_relabel", "anchors", [{"term": "John", "generic": " Paul"}], "anchors.jsonl:1: `generic` is ' Paul'; give a"),
    ("whp_relabel", "anchors", [{"term": "John"}], "anchors.jsonl:1: `generic` is missing"),
    ("whp_relabel", "anchors", [ANCHORS, ANCHORS], "anchors.jsonl:2: `term` 'John' stands there twice")])
def test_files_of_a_method_are_checked_before_a_device_is_used(
    folder: pathlib.Path, tmp_path: pathlib.Path, method: str, field: str, rows: list[dict], problem: str) -> None:
  files = {"forget": write_lines(tmp_path / "pairs.jsonl", PAIRS)} | {
      field: write_lines(tmp_path / f"{field}.jsonl", rows)}
  with pytest.raises(InputError, match=problem):
    unlearn(job(folder, method=method, **{key: str(file) for key, file in files.items()}), "here", tmp_path / "job")
  assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(("changes", "problem"), [
    ({"adapter": AdapterSettings("lora", targets=("q_prj",))}, "`adapter.targets` has 'q_prj'.*nearest: q_proj"),
    ({"chat_template": True}, "`chat_template` asks for the checkpoint's chat template"),
    ({"model": "nowhere"}, "`model` does not exist"), ({"forget": "nowhere.jsonl"}, "nowhere.jsonl: does not exist")])
def test_what_does_not_fit_is_refused_before_a_folder_is_made(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                              changes: dict, problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    unlearn(job(folder, **changes), "here", tmp_path / "job")
  assert not (tmp_path / "job").exists()
