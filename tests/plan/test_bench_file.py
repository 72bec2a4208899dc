"""A plan by what `relearn bench` measured: figures by hand, and what is refused."""

import copy
import json
import pathlib
from typing import Any

import pytest

from relearn_jax.errors import InputError
from relearn_jax.plan.bench_file import kind_name, measured_device
from relearn_jax.plan.devices import Device, get_device
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.presets import preset
from relearn_jax.plan.work import Work

from ..command import CONFIG, relearn

BENCH: dict[str, Any] = {
    "schema_version": 1, "date": "2026-11-25T12:00:00+00:00",
    "device": {"kind": "NVIDIA H100 80GB HBM3", "cores": 16},
    "rates": {"dtype": "bfloat16", "matmul_flops": 1400e12, "bandwidth_bytes": 6e12, "num_devices": 2},
    "train": [{"compute_share": share} for share in (0.5, 0.3, 0.4)],
    "decode": [{"bandwidth_share": {"median": share}} for share in (0.2, 0.6)]}
ON_CPU = BENCH | {"device": {"kind": "cpu", "cores": 2},
                  "rates": {"dtype": "float32", "matmul_flops": 100e9, "bandwidth_bytes": 20e9, "num_devices": 1}}


def write(folder: pathlib.Path, values: Any) -> pathlib.Path:
  path = folder / "bench.json"
  path.write_text(json.dumps(values))
  return path


def h100(path: pathlib.Path, **more: Any) -> Device:
  return measured_device(get_device("h100"), path, **{"cores": 1, "compute_bytes": {2}, **more})


def test_rates_are_a_devices_and_shares_are_medians(tmp_path: pathlib.Path) -> None:
  device = h100(write(tmp_path, BENCH))
  assert (device.flops, device.mfu, device.bandwidth, device.decoding) == (700e12, 0.4, 3e12, 0.4)
  assert device.memory_bytes == get_device("h100").memory_bytes
  assert "700 TFLOP/s bfloat16, of which 40% are reached in training (3 kinds of steps)" in device.measured
  assert "3000 GB/s, of which 40% are reached in decoding (2 batch sizes)" in device.measured
  assert "NVIDIA H100 80GB HBM3 on 2026-11-25" in device.measured


def test_a_step_takes_what_the_shares_say(tmp_path: pathlib.Path) -> None:
  """Training by its products at 280 TFLOP/s; one row of decoding by 1.2 TB/s, its prompt by all of 3 TB/s."""
  device, config = h100(write(tmp_path, BENCH)), preset("meta-llama/Llama-2-7b-hf")
  assert config is not None
  train = estimate(Work("t", "train", config, rows=16, length=512, remat="full", compute_bytes=2), {})
  assert train.seconds(device) == pytest.approx(train.flops / 280e12)
  decode = estimate(Work("d", "generate", config, rows=1, length=8, counted=1, max_new_tokens=64, param_dtype=2,
                         compute_bytes=2), {})
  assert decode.seconds(device) == pytest.approx(decode.phases[0].bytes / 3e12 + decode.phases[1].bytes / 1.2e12)


def test_benchmarks_in_a_list_are_taken_together_and_parts_may_lack(tmp_path: pathlib.Path) -> None:
  some = {key: value for key, value in BENCH.items() if key not in ("train", "decode")}
  device = h100(write(tmp_path, [some, some | {"train": [{"compute_share": 0.2}]}]))
  assert (device.mfu, device.bandwidth, device.decoding) == (0.2, 3e12, 1.0)
  device = h100(write(tmp_path, some))
  assert device.mfu == get_device("h100").mfu and "(a guess: no training was measured)" in device.measured


def test_kinds() -> None:
  wanted = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "TPU v5p": "v5p",
            "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v5 lite": None, "NVIDIA L4": None, "cpu": "cpu"}
  assert {kind: kind_name(kind) for kind in wanted} == wanted


def test_what_is_refused(tmp_path: pathlib.Path) -> None:
  def refused(values: Any, *words: str, **more: Any) -> None:
    with pytest.raises(InputError) as caught:
      h100(write(tmp_path, values), **more)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'bench.json'}: `--bench` ") and all(word in message for word in words)
  other = BENCH | {"device": {"kind": "NVIDIA H200", "cores": 16}}
  refused(other, "measured on 'NVIDIA H200', and the plan is for h100; give --device=h200")
  refused([BENCH, other], "is of NVIDIA H100 80GB HBM3 and of NVIDIA H200")
  refused(BENCH | {"device": {"kind": "NVIDIA L4", "cores": 1}}, "'NVIDIA L4'", "give a file that was measured on h100")
  refused(BENCH, "measured in bfloat16, and the plan multiplies in float32", "--dtype=float32", compute_bytes={4})
  refused(BENCH, "multiplies in float32", compute_bytes={2, 4})
  refused(BENCH | {"schema_version": 0}, "is no benchmark of this version")
  refused([], "is empty")
  refused({"a": 1}, "is no benchmark of this version")
  lacking = copy.deepcopy(BENCH)
  del lacking["rates"]["matmul_flops"]
  refused(lacking, "lacks what a benchmark has ('matmul_flops')")
  (tmp_path / "bench.json").write_text("{")
  with pytest.raises(InputError, match="is no JSON"):
    h100(tmp_path / "bench.json")


def test_the_command_says_what_was_measured(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, ON_CPU)
  flags = ["plan", f"--config={CONFIG}", "--device=cpu", "--memory_gib=8", f"--bench={path}"]
  shown = relearn(cache, *flags, "--num_devices=2").stdout
  assert "- cpu: 0.1 TFLOP/s float32, of which 40% are reached in training" in shown and "a guess" not in shown
  done = relearn(cache, *flags, status=2)
  assert "measured on 2 cores, and the plan is for 1; give --num_devices=2" in done.stderr
  assert "`--bench` cannot be read (No such file or directory)" in relearn(
      cache, *flags[:-1], "--bench=/nowhere/bench.json", "--num_devices=2", status=2).stderr
