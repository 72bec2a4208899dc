"""Stages of configurations: rows, runs and steps counted by hand, and the command as a user runs it."""

import dataclasses
import pathlib

import pytest

from relearn_jax.audit.audit_config import ArmsSettings, AskSettings, AttackSettings, Audit
from relearn_jax.audit.sweep import Sweep
from relearn_jax.cases.files import FilesConfig
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.objectives.methods import METHODS
from relearn_jax.plan.audit_plan import Size, merged
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.price import find_model, stages
from relearn_jax.plan.work import Work
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.train_settings import AdapterSettings

from ..command import ROOT, relearn, without_devices
from ..small import CONFIG, write_checkpoint, write_lines

SEVEN = "meta-llama/Llama-2-7b-hf"
PARAMS = 6_738_415_616
NAMES: Audit = load_config_file(str(ROOT / "configs" / "names.py"))
FULL_SIZE = ("llama_2_7b", "llama_2_7b_chat", "zephyr_7b_beta", "phi_1_5")


def works(config: object, on_cpu: bool = False) -> dict[str, Work]:
  return {work.name: work for work in stages(config, "here", on_cpu=on_cpu, default=Size(400, 512, 128)).works}


def unlearning(*methods: str, audit: Audit = NAMES) -> Audit:
  return dataclasses.replace(audit, unlearn=dataclasses.replace(audit.unlearn, methods=methods))


def test_the_names_audit() -> None:
  """4 variants, 3 seeds, 2 arms; 12 sequences of 20 names, twice "Anthony Mark" at most, BOS and EOS."""
  found = works(NAMES)
  attacks = [f"attack-ga-prefixes-full-seed{seed}" for seed in range(3)]
  assert list(found) == ["pretrain", "memorize", "unlearn-ga", *attacks, "ask", "utility"]
  shape = lambda name: (found[name].runs, found[name].rows, found[name].length, found[name].steps)
  assert shape("pretrain") == (1, 32, 28, 600) and shape("memorize") == (24, 12, 26, 200)
  assert shape("unlearn-ga") == (24, 4, 26, 200)
  for name in attacks:  # 3 depths of U and N, and O, at 3 rates
    assert (found[name].runs, found[name].rows, found[name].steps) == (3 * 4 * 7, 4, 80)
  assert found["ask"].max_new_tokens == 8 and found["ask"].compute_bytes == 4
  # 24 that memorised, 12 U chains after every 5 of 200 steps; in each of 3 attacks 28 before it, and 84 at 7 steps.
  calls = 2 + 40 + 3 * (2 + 7 * 6)
  assert (found["ask"].runs, found["ask"].rows, found["ask"].waiting, found["ask"].steps) == (14, 100, 84, calls)
  assert (found["utility"].rows, found["utility"].steps) == (4 + 11 + 4, calls)  # forget, retain and relearn rows
  attack, *rest = merged([found[name] for name in attacks])
  assert not rest and (attack.name, attack.steps) == (f"{attacks[0]} and 2 more", 3 * 80)
  # "Once" has one sequence with the pair, and so 11 without it.
  assert works(unlearning("gd"))["unlearn-gd"].rows == 4 + 11


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
  # The hidden states of all 400 retained rows, whatever a step sees, and a head where it is trained.
  assert estimate(train, {}).reference == 400 * 512 * 4096 * compute + (kind == "full") * 32000 * 4096 * 4
  assert works(dataclasses.replace(job, method="ga"), on_cpu=True).keys() == {"unlearn"}
  assert works(dataclasses.replace(job, dtype="auto"), on_cpu=True)["unlearn"].compute_bytes == 4


@pytest.mark.parametrize(("kind", "trained"), [("full", PARAMS), ("lora", 39_976_960)])
def test_a_second_model_is_reinforced_and_asked_beside_the_first(kind: str, trained: int) -> None:
  job = UnlearnJob(model=SEVEN, method="whp_logits", batch_size=32, remat="attn", adapter=AdapterSettings(kind))
  job.methods.whp_logits.reinforce_steps = 60
  found = works(job)
  assert list(found) == ["reinforce", "reference", "unlearn"]
  reinforce, reference, train = found.values()
  assert (reinforce.rows, reinforce.length, reinforce.counted, reinforce.steps) == (32, 512, 128, 60)
  assert reinforce.remat == "attn" and reinforce.kind == "train"
  # What will unlearn waits meanwhile: 20 bytes of a trained parameter, 4 of them shown with the weights.
  needed = estimate(reinforce, {})
  assert needed.gradients + needed.optimizer == 16 * trained
  asked, one = (estimate(dataclasses.replace(reference, second=second), {}) for second in (True, False))
  assert reference.second and asked.weights - one.weights == 4 * trained and asked.flops == 2 * one.flops
  assert asked.logits == 2 * one.logits
  assert estimate(train, {}).reference == 400 * 512 * 4  # a token's number each, no hidden states and no head
  assert "reinforce" not in works(dataclasses.replace(job, method="npo"))


def test_what_is_kept_of_frozen_models() -> None:
  kept = lambda method: estimate(works(UnlearnJob(model=SEVEN, method=method))["unlearn"], {}).reference
  states, head = 400 * 512 * 4096 * 2, 32000 * 4096 * 4
  assert kept("rmu") == states  # the output of a layer on what is retained
  assert kept("scrub") == 2 * states + 2 * head  # forget and retain, a head with each
  assert kept("kl") == states + head
  assert kept("npo") == 400 * 512 * 4 and kept("idk_dpo") == 2 * 400 * 512 * 4
  assert kept("npo_kl") == states + head + 400 * 512 * 4
  assert kept("ga") == 0


def test_copies_of_what_is_trained() -> None:
  """LoRA's adapters are copied, not the base."""
  for kind, trained in (("full", PARAMS), ("lora", 39_976_960)):
    job = UnlearnJob(model=SEVEN, method="ga", adapter=AdapterSettings(kind))
    find = lambda job, **changes: estimate(works(dataclasses.replace(job, **changes))["unlearn"], {})
    plain = find(job)
    assert plain.optimizer == 8 * trained
    assert find(job, method="task_vector").optimizer == find(job, defence="averaging").optimizer == 12 * trained
    assert find(job, method="task_vector", defence="averaging").optimizer == 16 * trained
    assert find(job, method="pdu").optimizer == 8 * trained  # a number of its own is no copy


def test_defences_multiply_what_they_stand_around() -> None:
  """The forget part of NPO with gradient descent on retain, of as many rows."""
  find = lambda defence: works(UnlearnJob(model=SEVEN, method="npo_gd", defence=defence))["unlearn"]
  plain = estimate(find("none"), {})
  for defence, times, kept, copies in (("sam", 2, 2, 1), ("smoothing", 3 * 4 / 3, 1, 2), ("gradient_penalty", 3, 4, 1)):
    needed = estimate(find(defence), {})
    assert needed.flops == pytest.approx(plain.flops * (times + 1) / 2)
    assert needed.phases[0].flops == pytest.approx(needed.flops)
    logits = 2 * 4 * 32 * 128 * 32000 if defence == "gradient_penalty" else 0  # of the inner pass
    assert needed.activations - logits == pytest.approx(plain.activations * (kept + 1) / 2, rel=0.01)
    assert needed.optimizer == (8 + 4 * copies) * PARAMS
  whole = UnlearnJob(model=SEVEN, method="ga", defence="smoothing")
  whole.defences.smoothing.draws = 6
  alone = estimate(works(whole)["unlearn"], {}).flops / estimate(works(UnlearnJob(model=SEVEN, method="ga"))["unlearn"],
                                                               {}).flops
  assert alone == pytest.approx(6 * 4 / 3)


def test_data_sets_that_are_made(tmp_path: pathlib.Path) -> None:
  """Refusals and alternates by their own tokens; relabelled rows, and what no file gives, as the forget set."""
  model = str(write_checkpoint(tmp_path / "base"))
  rows = [{"prompt": "James Robert", "answer": " John"}, {"prompt": "James", "answer": " John Kevin Brian"}]
  forget = str(write_lines(tmp_path / "forget.jsonl", rows))
  refusals = str(write_lines(tmp_path / "refusals.jsonl", [{"answer": " ".join(["Kevin"] * 9)}]))
  others = str(write_lines(tmp_path / "others.jsonl", [row | {"answer": " Kevin"} for row in rows]))
  plan = lambda **settings: stages(UnlearnJob(model=model, forget=forget, **settings), "here", on_cpu=True)
  find = lambda planned: next(work for work in planned.works if work.name == "unlearn")
  found = plan(method="idk_nll", refusals=refusals)
  assert "idk: 2 rows of at most 13 tokens, 10 of which count" in found.measured  # BOS, 2 + 9 names, EOS
  assert find(found).rows == 2 + 32
  found = plan(method="altpo", alternates=others)
  assert "alternate: 2 rows of at most 5 tokens, 2 of which count" in found.measured
  found = plan(method="altpo")
  assert "alternate: as forget" in found.assumed and find(found).rows == 2 + 2 + 32
  found = plan(method="whp_relabel")
  assert (find(found).rows, find(found).length) == (2, 6)


def test_a_comparison_of_methods() -> None:
  names = ("ga", "gd", "whp_logits", "npo_gd+sam")
  found, one = works(unlearning(*names)), works(NAMES)
  trained = {"ga": ["unlearn-ga"], "gd": ["unlearn-gd"], "whp_logits": ["reinforce-whp_logits", "unlearn-whp_logits"],
             "npo_gd+sam": ["unlearn-npo_gd+sam"]}
  attacks = {name: [f"attack-{name}-prefixes-full-seed{seed}" for seed in range(3)] for name in names}
  assert list(found) == ["pretrain", "memorize", *(stage for name in names for stage in trained[name] + attacks[name]),
                         "ask", "utility"]
  assert found["unlearn-ga"] == one["unlearn-ga"] and found["reinforce-whp_logits"].copies == 1
  for name in names:  # the original is attacked once
    cells = 3 * 4 * (6 + (name == "ga"))
    assert all((found[stage].runs, found[stage].steps) == (cells, 80) for stage in attacks[name])
  assert found["unlearn-gd"].rows == 4 + 11
  assert found["unlearn-npo_gd+sam"].passes == pytest.approx((2 * 4 + 11) / 15)
  with pytest.raises(InputError, match="here: `unlearn.methods` is 'gaa'.*nearest: ga"):
    works(unlearning("gaa"))
  every: Audit = load_config_file(str(ROOT / "configs" / "methods.py"))
  methods = every.unlearn.methods
  assert set(METHODS) < set(methods)
  assert len(works(every)) == 2 + len(methods) + 1 + 2 * 3 * len(methods) + 2  # whp_logits reinforces; two adapters


def test_a_sweep() -> None:
  """3 seeds of 4 variants unlearn for each candidate; what a step fixes is tried in turn."""
  grid = {"learning_rate": (1e-5, 1e-4), "depth": (0.25, 0.5, 0.75), "steering": (1.0, 2.0)}
  grids = {"rmu": grid, "ga": {"learning_rate": (1e-5,)}}
  found = works(Sweep(grids, NAMES))
  groups = [f"sweep-rmu-{number}" for number in range(3)]
  assert list(found) == ["pretrain", "memorize", *groups, "sweep-ga-0", "ask", "utility"]
  assert all((found[name].runs, found[name].steps) == (4 * 12, 200) for name in groups)
  assert (found["sweep-ga-0"].runs, found["sweep-ga-0"].steps) == (12, 200)
  calls = 40 * (3 * 4 + 1) + 2  # an interview every 5 steps, and of what has memorised; 14 models a call
  assert (found["ask"].runs, found["ask"].waiting, found["ask"].steps) == (14, 48, calls)
  assert list(works(Sweep(grids, NAMES, methods=("ga",)))) == ["pretrain", "memorize", "sweep-ga-0", "ask", "utility"]
  assert works(Sweep({"whp_logits": {"learning_rate": (1e-5, 1e-4)}}, NAMES))["sweep-whp_logits-0-reinforce"].runs == 24
  with pytest.raises(InputError, match="`grids.ga.beta` is no setting of it"):
    works(Sweep({"ga": {"beta": (0.1,)}}, NAMES))


def plans(cache: pathlib.Path, *lines: list[str]) -> list[str]:
  """What `relearn plan` says, without a device and without the network."""
  done = without_devices(cache, [["plan", *line] for line in lines])
  assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
  return [one.stdout for one in done]


def config(name: str) -> str:
  return f"--config={ROOT / 'configs' / name}"


def test_every_configuration_has_a_plan(cache: pathlib.Path) -> None:
  given = {"unlearn": [f"--config.model={SEVEN}"], "checkpoint": [f"--config.arms.original={SEVEN}"]}
  for shown in plans(cache, *([config(f"{name}.py"), "--device=h200", *given.get(name, [])]
                              for name in ("methods", "sweep", "names", "unlearn", "checkpoint"))):
    assert "all stages: " in shown and max(map(len, shown.splitlines())) <= 120


LOADED = ArmsSettings(unlearned=SEVEN, control="n", original="o")


def test_an_audit_of_checkpoints() -> None:
  attack = AttackSettings(batch_size=16, keep_steps=(1, 5, 10))
  audit = Audit(FilesConfig(), arms=LOADED, attack=attack,
                ask=AskSettings(batch_size=50, score_rows=120, max_new_tokens=20))
  found = works(audit)
  train, ask, utility = found["attack-relearn-full"], found["ask"], found["utility"]
  assert (train.runs, train.rows, train.steps) == (9, 16, 10)
  assert (ask.runs, ask.rows, ask.length, ask.steps) == (9, 50, 384, 4 * 8) and ask.max_new_tokens == 20
  assert (utility.runs, utility.rows, utility.steps) == (9, 50, 4 * 8)  # 360 rows: forget, retain and relearn
  # Nothing is trained while questions are asked, but masters and moments stay: 12 bytes a parameter.
  needed = estimate(ask, {})
  assert needed.num_trained == needed.gradients == 0 and needed.weights + needed.optimizer == 9 * 12 * PARAMS
  one = works(dataclasses.replace(audit, attack=dataclasses.replace(attack, runs_at_once=1)))
  parts = [one[f"attack-relearn-full-part{number}"] for number in range(9)]
  assert all((part.runs, part.steps) == (1, 10) for part in parts) and one["ask"].steps == 9 * 4 * 8
  assert merged(parts)[0].steps == 90 and estimate(parts[0], {}).optimizer == 8 * PARAMS
  waiting = works(dataclasses.replace(audit, ask=dataclasses.replace(audit.ask, runs_at_once=1)))["ask"]
  assert (waiting.runs, waiting.waiting, waiting.steps) == (1, 9, 9 * 4 * 8)
  assert estimate(waiting, {}).weights == 10 * 4 * PARAMS and estimate(waiting, {}).optimizer == 9 * 8 * PARAMS


def test_adapters_share_their_base() -> None:
  """Three seeds of an arm at a time; 39,976,960 numbers each at rank 16."""
  attack = AttackSettings(batch_size=16, keep_steps=(10,), adapters=("lora",))
  found = works(Audit(FilesConfig(), arms=LOADED, attack=attack))
  arms = [found[f"attack-{arm}-relearn-lora"] for arm in "UNO"]
  assert all((work.runs, work.steps) == (3, 10) for work in arms)
  needed = estimate(arms[0], {})
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


def test_full_size_configurations_fit_where_they_say(cache: pathlib.Path) -> None:
  """On one H200, and on the 8 chips of a v5p-16."""
  asked = [(f"{name}.py:{what}", where) for name in FULL_SIZE for what in ("unlearn", "audit")
           for where in (["--device=h200"], ["--device=v5p", "--num_devices=8", "--mesh=fsdp:-1"])]
  shown = plans(cache, *([config(file), *where] for file, where in asked))
  for (file, _), text in zip(asked, shown, strict=True):
    lines = text.splitlines()
    head = lines[2].split()
    table = [line.split() for line in lines[4:lines.index("", 4)]]
    assert [row[0] for row in table][-1] == ("unlearn" if file.endswith(":unlearn") else "utility")
    assert head[8] == "fits" and all("yes" in row for row in table), text
    assert max(map(len, lines)) <= 120


def test_the_command_says_what_would_fit(cache: pathlib.Path) -> None:
  flags = [config("llama_2_7b.py"), "--device=a100"]
  shown, fitting, longer = plans(cache, flags, [*flags, "--config.adapter.kind=lora"],
                                 [*flags, "--length=1024", "--rows=8"])
  assert "unlearn needs" in shown and "fits with fsdp=2" in shown and "fits with adapter=lora" in shown
  assert " yes " in fitting and "needs" not in fitting
  assert "forget: 8 rows of at most 1024 tokens, 128 of which count" in longer


def test_what_does_not_fit_is_named(cache: pathlib.Path) -> None:
  flags, problems = zip(*[
      (["--device=h300"], "`--device` is 'h300'"), (["--device=cpu"], "give --memory_gib"),
      (["--mesh=fsdp:3", "--num_devices=3"], "`--mesh` has fsdp:3, which does not divide hidden_size=4096"),
      (["--mesh=fsdp:2"], "needs 2 devices, and there is 1"), (["--rows=0"], "`--rows` is 0"),
      (["--num_devices=0"], "`--num_devices` is 0"), (["--config.remat=ful"], "`remat` is 'ful'"),
      (["--config.adapter.kind=lora", "--config.adapter.targets=('q',)"], "`adapter.targets` has 'q'")], strict=True)
  done = without_devices(cache, [["plan", config("llama_2_7b.py"), *more] for more in flags])
  for one, problem in zip(done, problems, strict=True):
    assert one.returncode == 2 and problem in one.stderr and "Traceback" not in one.stderr


def test_what_a_file_does_not_offer_is_named(cache: pathlib.Path) -> None:
  file = config("phi_1_5.py")
  done = relearn(cache, "plan", f"{file}:unlern", status=2)
  assert "is 'unlern'; expected unlearn or audit" in done.stderr
  done = relearn(cache, "plan", file, "--config.stepz=3", status=2)
  assert "`stepz` is no field of the configuration (nearest: steps" in done.stderr
  done = relearn(cache, "audit", file, "--workdir=x", status=2)
  assert "describes a UnlearnJob" in done.stderr
