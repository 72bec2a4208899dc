"""Stages of configurations: rows, runs and steps counted by hand, and the command as a user runs it."""

import dataclasses
import pathlib

import pytest

from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.release import AttackSettings, InterviewSettings, ReleaseAudit
from relearn_jax.errors import InputError
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.stages import Size, find_model, stages
from relearn_jax.plan.work import Work
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.settings import AdapterSettings

from ..command import ROOT, relearn
from ..small import CONFIG, write_checkpoint, write_lines

SEVEN = "meta-llama/Llama-2-7b-hf"
PARAMS = 6_738_415_616
FULL_SIZE = ("llama_2_7b", "llama_2_7b_chat", "zephyr_7b_beta", "phi_1_5")


def works(config: object, on_cpu: bool = False) -> dict[str, Work]:
  return {work.name: work for work in stages(config, "here", on_cpu=on_cpu, default=Size(400, 512, 128)).works}


def test_the_names_audit() -> None:
  """4 variants, 3 seeds, 2 arms; 12 sequences of 20 names, twice "Anthony Mark" at most, BOS and EOS."""
  found = works(AuditConfig())
  assert list(found) == ["pretrain", "memorize", "unlearn", "relearn", "ask"]
  shape = lambda name: (found[name].runs, found[name].rows, found[name].length, found[name].steps)
  assert shape("pretrain") == (1, 32, 28, 600) and shape("memorize") == (24, 12, 26, 200)
  assert shape("unlearn") == (24, 4, 26, 200)
  assert shape("relearn")[:2] == (4 * 7, 4) and found["relearn"].steps == 3 * 80
  assert found["ask"].max_new_tokens == 8 and found["ask"].compute_bytes == 4
  # "Once" has one sequence with the pair, and so 11 without it.
  assert works(dataclasses.replace(AuditConfig(), method="gd"))["unlearn"].rows == 4 + 11


@pytest.mark.parametrize(("kind", "dtype", "param_bytes", "compute"), [
    ("full", "auto", 4, 2), ("full", "float32", 4, 4), ("lora", "auto", 2, 2), ("lora", "float32", 4, 4)])
def test_an_unlearning_job(kind: str, dtype: str, param_bytes: int, compute: int) -> None:
  job = UnlearnJob(model=SEVEN, method="kl", steps=7, batch_size=32, dtype=dtype, adapter=AdapterSettings(kind),
                   num_microbatches=4, remat="full")
  found = works(job)
  assert list(found) == ["reference", "unlearn"]
  train, reference = found["unlearn"], found["reference"]
  assert (train.rows, train.length, train.counted, train.steps, train.kl) == (64, 512, 128, 7, True)
  assert (train.param_dtype, train.compute_bytes, train.adapter) == (param_bytes, compute, kind)
  assert (reference.rows, reference.steps, reference.reference_rows) == (100, 4, 400)  # in parts, as training is
  # The hidden states of all 400 retained rows and a head, whatever a step sees.
  assert estimate(train, {}).reference == 400 * 512 * 4096 * compute + 32000 * 4096 * param_bytes
  assert works(dataclasses.replace(job, method="ga"), on_cpu=True).keys() == {"unlearn"}
  assert works(dataclasses.replace(job, dtype="auto"), on_cpu=True)["unlearn"].compute_bytes == 4


def test_an_audit_of_checkpoints() -> None:
  attack = AttackSettings(batch_size=16, keep_steps=(1, 5, 10))
  audit = ReleaseAudit(unlearned=SEVEN, control="n", original="o", attack=attack,
                       interview=InterviewSettings(batch_size=50, score_rows=120, max_new_tokens=20))
  found = works(audit)
  train, ask, utility = found["relearn"], found["ask"], found["utility"]
  assert (train.runs, train.rows, train.steps) == (9, 16, 10)
  assert (ask.runs, ask.rows, ask.length, ask.steps) == (9, 50, 384, 4 * 8) and ask.max_new_tokens == 20
  assert (utility.runs, utility.rows, utility.steps) == (9, 50, 4 * 2 * 3)
  # Nothing is trained while questions are asked, but masters and moments stay: 12 bytes a parameter.
  needed = estimate(ask, {})
  assert needed.num_trained == needed.gradients == 0 and needed.weights + needed.optimizer == 9 * 12 * PARAMS
  one = works(dataclasses.replace(audit, attack=dataclasses.replace(attack, runs_at_once=1)))
  assert (one["relearn"].runs, one["relearn"].steps, one["ask"].steps) == (1, 90, 9 * 4 * 8)
  assert estimate(one["relearn"], {}).optimizer == 8 * PARAMS
  asked_alone = dataclasses.replace(audit.interview, runs_at_once=1)
  waiting = works(dataclasses.replace(audit, interview=asked_alone))["ask"]
  assert (waiting.runs, waiting.waiting, waiting.steps) == (1, 9, 9 * 4 * 8)
  assert estimate(waiting, {}).weights == 10 * 4 * PARAMS and estimate(waiting, {}).optimizer == 9 * 8 * PARAMS


def test_adapters_share_their_base() -> None:
  """Three seeds of an arm at a time; 39,976,960 numbers each at rank 16."""
  attack = AttackSettings(batch_size=16, keep_steps=(10,), adapter=AdapterSettings("lora"))
  found = works(ReleaseAudit(unlearned=SEVEN, control="n", original="o", attack=attack))
  assert (found["relearn"].runs, found["relearn"].steps) == (3, 30)
  needed = estimate(found["relearn"], {})
  assert needed.weights == 2 * PARAMS + 3 * 4 * 39_976_960
  assert needed.gradients + needed.optimizer == 3 * 12 * 39_976_960


def test_files_at_hand_are_read(tmp_path: pathlib.Path) -> None:
  write_checkpoint(tmp_path / "base")
  (tmp_path / "base" / "model.safetensors").unlink()  # a plan needs no weights
  rows = [{"prompt": "James Robert", "answer": " John"}, {"prompt": "James", "answer": " John Kevin Brian"}]
  path = write_lines(tmp_path / "rows.jsonl", rows)
  found = stages(UnlearnJob(model=str(tmp_path / "base"), forget=str(path)), "here", on_cpu=True)
  work, = [work for work in found.works if work.name == "unlearn"]
  assert work.config == CONFIG and (work.rows, work.length, work.counted) == (2, 6, 4)
  assert found.measured == ["forget: 2 rows of at most 6 tokens, 4 of which count"] and not found.assumed
  with pytest.raises(InputError, match="nowhere.jsonl: does not exist"):
    stages(UnlearnJob(model=str(tmp_path / "base"), forget="nowhere.jsonl"), "here", on_cpu=True)


def test_an_unknown_model_is_named() -> None:
  with pytest.raises(InputError, match="here: `model` is 'microsoft/phi-15'.*nearest: microsoft/phi-1_5"):
    find_model("microsoft/phi-15", "here", "model")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_configurations_fit_where_they_say(name: str, cache: pathlib.Path) -> None:
  """On one H200, and on the 8 chips of a v5p-16; without a device, without the network."""
  for what in ("unlearn", "audit"):
    for where in (["--device=h200"], ["--device=v5p", "--num_devices=8", "--mesh=fsdp:-1"]):
      shown = relearn(cache, "plan", f"--config={ROOT / 'configs' / name}.py:{what}", *where,
                      JAX_PLATFORMS="no_such_platform", HF_HUB_OFFLINE="1").stdout
      lines = shown.splitlines()
      head = lines[2].split()
      table = [line.split() for line in lines[4:lines.index("", 4)]]
      assert [row[0] for row in table][-1] == ("unlearn" if what == "unlearn" else "utility")
      assert head[8] == "fits" and all("yes" in row for row in table), shown
      assert max(map(len, lines)) <= 120


def test_the_command_says_what_would_fit(cache: pathlib.Path) -> None:
  flags = [f"--config={ROOT / 'configs' / 'llama_2_7b.py'}", "--device=a100"]
  shown = relearn(cache, "plan", *flags, JAX_PLATFORMS="no_such_platform").stdout
  assert "unlearn needs" in shown and "fits with fsdp=2" in shown and "fits with adapter=lora" in shown
  fitting = relearn(cache, "plan", *flags, "--config.adapter.kind=lora", JAX_PLATFORMS="no_such_platform").stdout
  assert " yes " in fitting and "needs" not in fitting
  longer = relearn(cache, "plan", *flags, "--length=1024", "--rows=8", JAX_PLATFORMS="no_such_platform").stdout
  assert "forget: 8 rows of at most 1024 tokens, 128 of which count" in longer


@pytest.mark.parametrize(("flags", "problem"), [
    (["--device=h300"], "`--device` is 'h300'"), (["--device=cpu"], "give --memory_gib"),
    (["--mesh=fsdp:3", "--num_devices=3"], "`--mesh` has fsdp:3, which does not divide hidden_size=4096"),
    (["--mesh=fsdp:2"], "needs 2 devices, and there is 1"), (["--rows=0"], "`--rows` is 0"),
    (["--num_devices=0"], "`--num_devices` is 0"), (["--config.remat=ful"], "`remat` is 'ful'"),
    (["--config.adapter.kind=lora", "--config.adapter.targets=('q',)"], "`adapter.targets` has 'q'")])
def test_what_does_not_fit_is_named(cache: pathlib.Path, flags: list[str], problem: str) -> None:
  done = relearn(cache, "plan", f"--config={ROOT / 'configs' / 'llama_2_7b.py'}", *flags, status=2,
                 JAX_PLATFORMS="no_such_platform")
  assert problem in done.stderr


def test_what_a_file_does_not_offer_is_named(cache: pathlib.Path) -> None:
  file = ROOT / "configs" / "phi_1_5.py"
  done = relearn(cache, "plan", f"--config={file}:unlern", status=2)
  assert "is 'unlern'; expected unlearn or audit" in done.stderr
  done = relearn(cache, "plan", f"--config={file}", "--config.stepz=3", status=2)
  assert "`stepz` is no field of the configuration (nearest: steps" in done.stderr
  done = relearn(cache, "audit", f"--config={file}", "--workdir=x", status=2)
  assert "describes a UnlearnJob" in done.stderr
