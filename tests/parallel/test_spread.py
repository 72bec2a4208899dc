"""A run spread over devices and processes: the same losses, gradients, weights and answers."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from relearn_jax.parallel.mesh import check_divides, fill_mesh, make_mesh, parse_mesh

from ..small import CONFIG

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIXED, MESHES = "data:2,fsdp:2,tensor:2", ["runs:8", "fsdp:8", "runs:2,data:2,tensor:2"]


def spawn(rank: int, port: int, devices: int, workdir: pathlib.Path, kinds: str, *meshes: str
          ) -> subprocess.Popen[str]:
  # Processes that work together compile for themselves: one would take what another has just written.
  own = {key: value for key, value in os.environ.items() if rank < 0 or key != "JAX_COMPILATION_CACHE_DIR"}
  environment = {**own, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.parallel.spread", str(rank), str(port), str(workdir), kinds, *meshes]
  return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def results(process: subprocess.Popen[str]) -> dict[str, Any]:
  out, error = process.communicate(timeout=500)
  assert process.returncode == 0, error[-6000:]
  return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def single(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """On one device."""
  return results(spawn(-1, 0, 1, workdir, "full,lora", "runs:1"))["runs:1"]


def assert_agrees(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
  for mine, other in zip(ours, theirs, strict=True):
    for log, expected in zip(mine["logs"], other["logs"], strict=True):
      np.testing.assert_allclose(log["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(log["norm"], expected["norm"], rtol=1e-5)
    assert mine["weights"].keys() == other["weights"].keys()
    for name, value in mine["weights"].items():
      assert value == pytest.approx(other["weights"][name], rel=1e-5), name
    if "tokens" in other:
      assert mine["tokens"] == other["tokens"]
      np.testing.assert_allclose(mine["logprob"], other["logprob"], atol=2e-5)
      # The states differ by rounding, which Adam's division by small moments makes larger in a few weights.
      assert mine["restored"] <= 1e-4


@pytest.mark.parametrize("meshes", [[MIXED], pytest.param(MESHES, marks=pytest.mark.slow)])
def test_meshes_agree_with_one_device(single: list[dict[str, Any]], workdir: pathlib.Path, meshes: list[str]) -> None:
  found = results(spawn(-1, 0, 8, workdir, "full,lora", *meshes))
  assert list(found) == meshes
  for ours in found.values():
    assert_agrees(ours, single)


@pytest.mark.slow  # tests/parallel/test_several.py has two processes that audit, generate and score
@pytest.mark.parametrize("kinds", ["full", "full,lora"])
def test_two_processes_agree_with_one_device(single: list[dict[str, Any]], workdir: pathlib.Path, kinds: str) -> None:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [spawn(rank, port, 2, workdir, kinds, "runs:2,fsdp:2") for rank in range(2)]
  for found in [results(process) for process in processes]:
    assert_agrees(found["runs:2,fsdp:2"], single[:len(kinds.split(","))])


@pytest.mark.parametrize(("text", "problem"), [
    ("runs:1,modle:2", "has axis 'modle'"), ("runs:x", "has size 'x' for axis 'runs'"), ("runs:0", "has size '0'"),
    ("runs:1,runs:2", "gives axis 'runs' twice"), ("runs:-1,fsdp:-1", "is 'runs:-1,fsdp:-1'"), ("", "has axis ''")])
def test_meshes_that_are_none(text: str, problem: str) -> None:
  with pytest.raises(ValueError, match=problem):
    parse_mesh(text)


def test_sizes_are_filled_in() -> None:
  assert parse_mesh("tensor:2, fsdp:-1") == {"runs": 1, "data": 1, "fsdp": -1, "tensor": 2}
  assert fill_mesh(parse_mesh("tensor:2,fsdp:-1"), 8) == {"runs": 1, "data": 1, "fsdp": 4, "tensor": 2}
  with pytest.raises(ValueError, match="`--mesh` is runs:1,data:1,fsdp:16,tensor:1, which needs 16 devices, and there "
                     "are 8; make an axis smaller"):
    fill_mesh(parse_mesh("fsdp:16"), 8)


@pytest.mark.parametrize(("text", "dimension"), [
    ("fsdp:3", "hidden_size=32"), ("tensor:8", "num_attention_heads=4"), ("tensor:4", "num_key_value_heads=2")])
def test_a_mesh_that_does_not_divide_names_the_dimension(text: str, dimension: str) -> None:
  with pytest.raises(ValueError, match=f"has {text}, which does not divide {dimension}; expected one of 1, 2"):
    check_divides(parse_mesh(text), CONFIG)
  with pytest.raises(ValueError, match="which does not divide|needs"):
    make_mesh(parse_mesh(text), config=CONFIG)
