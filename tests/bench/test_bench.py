"""`relearn bench` on a model of a second: its JSON, its tables, what it refuses; and beside torch if installed."""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.attack import relearn_nll
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.bench import bench_settings, run_bench, train_speed
from relearn_jax.bench.bench_settings import BenchSettings
from relearn_jax.bench.bench_text import _compare, bench_text
from relearn_jax.bench.compare_audit import rehearsal
from relearn_jax.bench.compiling import compile_twice, fresh_cache
from relearn_jax.bench.formulas import FORMULAS
from relearn_jax.bench.grid_speed import (
  SINGLY,
  STACKED,
  count_cells,
  default_audit,
  grid_audit,
  measure_grid,
  short_audit,
  singly,
)
from relearn_jax.bench.peak_memory import anonymous, peak_memory
from relearn_jax.bench.separate_speed import SAMPLE, cell_audit, measure_commands
from relearn_jax.bench.shapes import SHAPES, num_params, random_params, shape_config
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, runs_mesh
from relearn_jax.plan.work import Work
from relearn_jax.training.step import make_step

from .. import small
from ..command import CONFIG, relearn, without_devices

TINY = shape_config("tiny")
FLAGS = ["--batch_size=2", "--length=16", "--prompt_length=8", "--max_new_tokens=4", "--lora_rank=2", "--repeats=2"]


def spread_of(value: Any) -> bool:
  return value["low"] <= value["median"] <= value["high"] and value["repeats"] >= 1 and value["median"] > 0


@pytest.fixture(scope="module")
def measured(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
  output = tmp_path_factory.mktemp("bench") / "bench.json"
  done = relearn(cache, "bench", "--shape=tiny", "--what=train,decode,load,attention", "--runs=2",
                 "--decode_batches=3", f"--output={output}", *FLAGS)
  return json.loads(output.read_text()), done.stdout


def test_json_says_what_was_measured_on_what(measured: tuple[dict[str, Any], str]) -> None:
  found, _ = measured
  assert found["schema_version"] == 1 and found["formulas"] == FORMULAS and found["left_out"] == []
  assert found["device"]["kind"] == "cpu" and found["device"]["number"] == 2 and found["device"]["cores"] >= 1
  assert {"python", "jax", "jaxlib", "flax", "optax"} <= found["versions"].keys()
  assert found["date"].startswith("20") and found["command"].startswith("relearn bench --")
  assert "--runs=2" in found["command"] and "--mesh" not in found["command"]
  assert found["model"]["parameters"] == 7792 and found["settings"]["runs"] == [2]
  assert all(spread_of(found["rates"][key]) for key in ("matmul", "read", "update"))
  assert found["rates"]["bandwidth_bytes"] == max(found["rates"][key]["median"] for key in ("read", "update"))


def test_training_rows(measured: tuple[dict[str, Any], str]) -> None:
  rows = {row["name"]: row for row in measured[0]["train"]}
  assert rows.keys() == {"full x 2", "lora x 2"} and rows["full x 2"]["mesh"] == {"runs": 2}
  assert rows["full x 2"]["trained"] == rows["full x 2"]["parameters"] == 7792 > rows["lora x 2"]["trained"]
  for row in rows.values():
    assert all(spread_of(row[key]) for key in (
        "step_seconds", "real_tokens_per_second", "padded_tokens_per_second", "mfu"))
    padded = row["padded_tokens_per_second"]["median"] * row["step_seconds"]["median"]
    assert padded == pytest.approx(row["runs"] * 2 * 16)
    assert row["real_tokens_per_second"]["median"] < row["padded_tokens_per_second"]["median"]
    assert 0 < row["mfu_real"] < row["mfu"]["median"] < 1
    assert row["compute_share"] == pytest.approx(row["mfu"]["median"])  # nothing is computed again
    assert row["cache_hit"] and row["compile_seconds_cached"] < row["compile_seconds_cold"]
    assert row["memory"]["plan"] > 0 and row["memory"]["compiler"] > 0


def test_decoding_loading_and_attention_rows(measured: tuple[dict[str, Any], str]) -> None:
  found, _ = measured
  decode, = found["decode"]
  assert decode["batch"] == 3 and decode["cache_hit"]
  assert spread_of(decode["tokens_per_second"]) and 0 < decode["bandwidth_share"]["median"] < 1
  load, = found["load"]
  assert load["bytes"] > load["loaded_bytes"] == 4 * 7792 and spread_of(load["gib_per_second_page_cache"])
  assert {row["name"] for row in found["attention"]} == {"relearn_jax", "einsum", "jax.nn, xla"}
  assert all("failed" not in row and spread_of(row["with_backward_seconds"]) for row in found["attention"])


def test_the_tables_are_those_of_the_json_file(measured: tuple[dict[str, Any], str]) -> None:
  found, shown = measured
  assert shown.startswith(bench_text(found)) and "JSON: " in shown
  for cell in ("| full x 2 ", "| batch 3 ", "| checkpoint ", "| relearn_jax (einsum) ", "| jax.nn, xla ",
               "MFU, real", "plan / compiler"):
    assert cell in shown


def test_the_step_is_the_one_that_the_package_trains_with() -> None:
  """The very function of `make_step`, with what it has compiled; an attack's own objective."""
  work, mesh = Work("full", "train", TINY, rows=2, length=8, counted=7), runs_mesh(1)
  training = train_speed.Training(work, jnp.float32, mesh)
  assert training.step is make_step(train_speed.training_model(work, jnp.float32), relearn_nll, mesh)
  state, rest = training.start()
  before = np.asarray(state.params["embed"]["weight"])
  stepper = train_speed.Stepper(training.step, (state, rest))
  after, log = stepper()
  assert np.isfinite(np.asarray(log.loss)).all() and int(after.step[0]) == 1
  assert (np.asarray(after.params["embed"]["weight"]) != before).any()


def test_a_model_that_is_given_is_measured(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder, output = small.write_checkpoint(tmp_path / "model"), tmp_path / "bench.json"
  relearn(cache, "bench", f"--model={folder}", "--what=load", "--mesh=fsdp:2", f"--output={output}", *FLAGS)
  found = json.loads(output.read_text())
  assert found["load"][0]["bytes"] == (folder / "model.safetensors").stat().st_size
  assert found["load"][0]["mesh"] == {"fsdp": 2} and found["model"]["name"] == str(folder)


def test_random_weights_are_those_of_an_initialised_model_in_kind() -> None:
  model, mesh = Model(TINY), make_mesh(parse_mesh("fsdp:2"))
  made, plain = random_params(model, jnp.bfloat16, mesh), model.init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, plain) and num_params(made) == 7792
  for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(plain), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.std(ours.astype(jnp.float32))) == pytest.approx(float(jnp.std(theirs)), abs=2e-3)
  spread = made["layers"]["attn"]["q"]["weight"]
  assert spread.addressable_shards[0].data.size == spread.size // 2


def test_what_does_not_fit_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(run_bench, "device_memory", lambda: 1e6)
  settings = BenchSettings(shape="tiny", what=("train",), runs=(1, 3), batch_size=2, length=16, repeats=1,
                           adapters=("full",), mesh="runs:2")
  found = bench_settings.check_settings(settings)
  parts = run_bench._Parts(settings, *found, jnp.float32, None, {"left_out": (left := [])}, pathlib.Path("."))
  assert list(parts.parts()) == []
  assert [one["part"] for one in left] == ["train full", "train full x 3"]
  assert "1 runs do not divide over 2 devices" in left[0]["why"]
  fits = run_bench._Parts(BenchSettings(shape="tiny", what=("train",), runs=(1,), batch_size=2, length=16),
                          *found, jnp.float32, None, {"left_out": left}, pathlib.Path("."))
  assert [name for _, name, _ in fits.parts()] == ["full", "lora"]
  monkeypatch.setattr(run_bench, "device_memory", lambda: 1e5)
  assert list(fits.parts()) == [] and "the plan says 0.0 GiB a device" in left[-1]["why"]


def test_what_fails_for_memory_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  def parts(self: Any) -> Any:
    def fail() -> Any:
      yield {"name": "before", "failed": "no", "length": 1, "rows": 1}
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    return [("attention", "first", fail), ("attention", "second", lambda: [
        {"name": "after", "failed": "no", "length": 1, "rows": 1}])]
  monkeypatch.setattr(run_bench._Parts, "parts", parts)
  shown = run_bench.bench(BenchSettings(shape="tiny", repeats=1), "here", tmp_path / "bench.json")
  found = json.loads((tmp_path / "bench.json").read_text())
  assert [row["name"] for row in found["attention"]] == ["before", "after"]
  assert found["left_out"] == [{"part": "attention first", "why": "RESOURCE_EXHAUSTED: out of memory"}]
  assert "Left out: attention first: RESOURCE_EXHAUSTED: out of memory" in shown


def test_the_second_compilation_comes_from_the_cache() -> None:
  def traced(x: jax.Array) -> jax.Array:
    return jnp.sin(x) @ x
  with fresh_cache():
    folder = jax.config.values["jax_compilation_cache_dir"]
    compiled, seconds = compile_twice(lambda: jax.jit(traced).lower(jnp.ones((4, 4))))
    assert seconds["cache_hit"] and any(pathlib.Path(folder).iterdir())
  assert not pathlib.Path(folder).exists() and jax.config.values["jax_compilation_cache_dir"] != folder
  assert float(compiled(jnp.ones((4, 4)))[0, 0]) == pytest.approx(4 * np.sin(1.0), rel=1e-5)


@pytest.mark.skipif(anonymous() is None, reason="needs /proc")
def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
  with peak_memory() as peak:
    held = np.ones(20_000_000)  # 160 MB
    del held
  assert peak.bytes is not None and 150e6 < peak.bytes < 400e6


def test_refused_flags(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  shape = lambda *flags: ["bench", "--shape=tiny", *flags]
  wanted = [
      (["bench", "--shape=llama_7b"], ["`--shape` is 'llama_7b', which is no named shape (nearest: llama_2_7b"]),
      (["bench", "--model=/nowhere"], ["`--model` does not exist"]),
      (["bench", "--model=x", "--shape=tiny"], ["`--shape` is given beside --model; give one of them"]),
      (shape("--what=train,sleep"), ["`--what` has 'sleep'; expected some of train, decode, load, attention"]),
      (shape("--what="), ["`--what` is empty"]),
      (shape("--adapters=qlora"), ["`--adapters` has 'qlora'; expected some of full, lora"]),
      (shape("--remat=some"), ["`--remat` has 'some'; expected some of none, dots, attn, full"]),
      (shape("--runs=1,x"), ["`--runs` has 'x'; expected numbers"]),
      (shape("--runs=0"), ["`--runs` is 0; expected at least 1"]),
      (shape("--decode_batches="), ["`--decode_batches` is empty"]),
      (shape("--length=500"), ["`--length` is 500 tokens, and the model has 128 positions"]),
      (shape("--prompt_length=120"), ["`--prompt_length` is 152 tokens with --max_new_tokens"]),
      (shape("--max_new_tokens=1"), ["`--max_new_tokens` is 1; expected at least 2"]),
      (shape("--repeats=0"), ["`--repeats` is 0; expected at least 1"]),
      (shape("--dtype=float8"), ["`--dtype` is 'float8'"]),
      (shape("--mesh=fsdp:3"), ["`--mesh` has fsdp:3, which does not divide hidden_size=16"]),
      (shape("--compare=mlx"), ["`--compare` is 'mlx'; expected torch"]),
      (shape("--audit=long", "--grid", "--compare=torch"), ["`--audit` has 'long'; expected some of short, default"]),
      (shape("--audit=default", "--grid"), ["`--audit` says which audit is done by hand, and none is; give --grid"]),
      (["bench", "--shape=llama_2_7b", "--grid"], ["`--shape` is 'llama_2_7b' with 6738 M parameters"]),
      (["bench", "--shape=phi_1_5", "--grid"], ["`--shape` is 'phi_1_5', and a grid pretrains a plain Llama"]),
      (["bench", "--model=x", "--grid"], ["`--model` is given, and a grid pretrains a small model"]),
      (shape(f"--output={tmp_path}"), [f"{tmp_path}: `--output` cannot be written (it is a folder)"]),
      (shape("--shap=tiny"), ["Unknown command line flag 'shap'"])]
  for (_, words), done in zip(wanted, without_devices(cache, [line for line, _ in wanted]), strict=True):
    assert done.returncode == 2 and all(word in done.stderr for word in words), (words, done.stderr)


def test_without_torch_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"`--compare` is torch, which is not installed; pip install .*\[parity\]"):
    bench_settings.check_settings(BenchSettings(shape="tiny", compare="torch"))


def test_help_names_every_shape(cache: pathlib.Path) -> None:
  shown = relearn(cache, "bench", "--help").stdout
  assert all(name in shown for name in SHAPES) and "  --output: " in shown


def test_beside_torch(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Both sides begin with the same loss and say the same tokens."""
  pytest.importorskip("torch")
  output = tmp_path / "bench.json"
  shown = relearn(cache, "bench", "--shape=tiny", "--what=train,decode", "--adapters=full", "--runs=2",
                  "--decode_batches=3", "--compare=torch", f"--output={output}", *FLAGS).stdout
  found = json.loads(output.read_text())
  generated, trained = found["compare"]
  assert generated["equal_tokens"] == 1.0 and spread_of(generated["times_as_fast_as"]["transformers generate"])
  assert trained["loss_before"]["torch"] == pytest.approx(trained["loss_before"]["relearn_jax"], abs=1e-4)
  assert spread_of(trained["times_as_fast_as"]["torch"]) and trained["seconds"].keys() == {"relearn_jax", "torch"}
  assert found["other_side"]["packages"]["torch"] and found["other_side"]["python"].startswith("3.")
  assert "Other side: Python 3." in shown and "| train full x 2 " in shown


@pytest.mark.slow
def test_the_audit_by_hand_is_the_same_experiment() -> None:
  pytest.importorskip("torch")
  from relearn_jax.bench.compare_audit import compare_audit
  found = compare_audit(short_audit(TINY, methods=("ga",), adapters=("full",), dtype="float32"), "", "runs:-1", 1)
  # Each cell is asked after 1 and 10 steps; points before, and U along unlearning.
  assert found["cells"] == 12 and found["compared"] == 2 * 12 + 6 + 2 and found["of_one_side_alone"] == 0
  assert found["difference_of_mean_answer_logprobs"]["all, largest"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("way, mesh", [(STACKED, "runs:-1"), (SINGLY, "runs:1")])
def test_a_grid(way: str, mesh: str) -> None:
  cold, warm, again = measure_grid(TINY, mesh, way, 1)
  assert [row["start"] for row in (cold, warm, again)] == ["cold", "warm", "again"] and cold["cells"] == 40
  assert again["seconds"].median < warm["seconds"].median < cold["seconds"].median
  assert cold["cells_per_hour"].median == pytest.approx(3600 * 40 / cold["seconds"].median)
  assert sum(cold["stages"].values()) <= cold["seconds"].median


@pytest.mark.slow
def test_a_grid_by_commands() -> None:
  """Cells by themselves are told as a whole grid, with the number that was run."""
  apart, together = measure_commands(TINY, "runs:-1", ("lora",), "auto")
  assert apart["cells"] == together["cells"] == 24 and apart["run"] == apart["seconds"].repeats == SAMPLE
  assert apart["name"] == "separate commands, cold (2 of 24 run, times 24)"
  assert apart["stages"].keys() == {"attack-U-prefixes-lora"} and apart["mesh"] == {}
  assert 24 * sum(apart["stages"].values()) <= apart["seconds"].high
  assert apart["seconds"].low > together["seconds"].median


def test_a_grid_of_adapters_has_24_cells_of_which_each_is_an_audit_of_its_own() -> None:
  """U, N and O of two seeds at four learning rates; a cell is a loaded model's."""
  assert count_cells(grid_audit(TINY, ("lora",))) == 3 * 2 * 4
  assert grid_audit(TINY, ("full", "lora")) == short_audit(TINY)
  cell = cell_audit(TINY, ("lora",), "auto")
  cell.arms.unlearned = "a model"
  assert count_cells(cell) == 1


@pytest.mark.slow
def test_the_default_audit_by_hand_is_the_same_experiment() -> None:
  """All that the short one has not: chains that are asked as they unlearn, and attacked at several steps."""
  pytest.importorskip("torch")
  from relearn_jax.bench.compare_audit import BATCHED, OURS, compare_audit
  whole, cut = default_audit(TINY), dataclasses.replace
  found = compare_audit(cut(
      whole, case=cut(whole.case, variants=(7,), num_questions=12), seeds=(0, 1),
      arms=cut(whole.arms, pretrain=cut(whole.arms.pretrain, steps=20, warmup_steps=2)),
      memorize=cut(whole.memorize, steps=20), attack=cut(whole.attack, keep_steps=(1, 3)),
      unlearn=cut(whole.unlearn, max_steps=20, depths=2)), "", "runs:-1", 1)
  steps = found["unlearn_steps"]
  assert steps.keys() == {"U-7-0", "U-7-1"} and all(2 == len(each) for each in steps.values())
  last = max(map(max, steps.values()))
  points = 2 * (2 * 2 + 1)
  asked = 4 + 2 * last // 5 + points + 3 * points * 2
  assert found["amount"][OURS] == found["amount"][BATCHED] == (
      points, 4 * (20 + last) + 3 * points * 3, asked, 12 * asked, 12 * (4 + 2 * last // 5) + 16 * 7 * points)
  assert found["difference_of_mean_answer_logprobs"]["all, largest"] < 1e-3
  assert found["of_one_side_alone"] == 0 and found["equal_unlearn_steps"] == 2


def test_the_default_audit_is_that_of_its_file() -> None:
  assert default_audit(shape_config("names")) == load_config_file(str(CONFIG))


def test_how_much_an_audit_was_stands_below_the_table() -> None:
  spread, same = {"median": 2.0, "low": 1.0, "high": 3.0}, {"steps": 2400, "asked": 3}
  row = {"name": "short", "seconds": {"relearn_jax": spread, "torch": spread}, "times_as_fast_as": {"torch": spread},
         "amount": {"relearn_jax": same, "torch": same}, "difference_of_mean_answer_logprobs": {"median": 1.5e-6}}
  assert _compare([row]).splitlines()[-2:] == [
      "", "short: 2,400 steps, 3 asked (relearn_jax and torch). Mean log-probabilities of answers differ by 1.5e-06 "
      "(median)."]
  other = {"relearn_jax": same, "torch": {"steps": 2399, "asked": 3}}
  assert "2,400 steps, 3 asked (relearn_jax); 2,399 steps, 3 asked (torch)" in _compare([row | {"amount": other}])


def test_a_rehearsal_has_the_same_cells() -> None:
  """Cells make shapes; and no chain ends before its last depth."""
  whole = default_audit(TINY)
  short = rehearsal(whole)
  assert count_cells(short) == count_cells(whole) == 252
  assert short.unlearn.max_steps == short.unlearn.depths == whole.unlearn.depths
  check_audit(short, "")


def test_cells_of_a_grid() -> None:
  """Two seeds, two rates, two adapters: U and N of two methods, and the original, which is attacked once."""
  config = short_audit(TINY)
  assert count_cells(config) == 2 * 2 * 2 * (2 * 2 + 1)
  singly(config)
  assert count_cells(config) == 40 and config.attack.runs_at_once == config.ask.runs_at_once == 1
