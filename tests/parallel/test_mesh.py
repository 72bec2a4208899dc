"""Runs on a mesh: padded, spread, mapped, and brought back whole."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.parallel.mesh import (
    map_runs,
    pad_runs,
    padded_runs,
    repeat_runs,
    runs_mesh,
    runs_sharding,
    shard_runs,
    to_host,
)
from relearn_jax.parallel.start import cache_dir

SPREAD = """
import jax, jax.numpy as jnp, numpy as np
from relearn_jax.parallel.mesh import *
mesh = runs_mesh()
assert mesh.size == 8
values = {"x": np.arange(22.0, dtype=np.float32).reshape(11, 2)}
laid = shard_runs(values, mesh)
assert laid["x"].shape == (16, 2) and len(laid["x"].addressable_shards) == 8
assert {shard.data.shape for shard in laid["x"].addressable_shards} == {(2, 2)}
np.testing.assert_array_equal(to_host(laid, 11)["x"], values["x"])
mapped = jax.jit(map_runs(lambda run, shared: run["x"].sum() * shared, mesh))(laid, jnp.float32(3))
assert len(mapped.sharding.device_set) == 8
np.testing.assert_array_equal(to_host(mapped, 11), values["x"].sum(1) * 3)
same = repeat_runs({"x": jnp.arange(3.0)}, 11, mesh)["x"]
assert same.shape == (16, 3) and len(same.sharding.device_set) == 8
four = runs_mesh(4)
assert padded_runs(11, four) == 12 and padded_runs(8, four) == 8
print("fine")
"""


def test_runs_spread_over_eight_devices() -> None:
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", SPREAD], env=environment, capture_output=True, text=True)
  assert done.stdout == "fine\n", done.stderr


def test_padding_repeats_the_first_runs() -> None:
  tree = {"x": np.arange(6).reshape(3, 2)}
  assert pad_runs(tree, 3)["x"] is tree["x"]
  assert pad_runs(tree, 8)["x"][:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0, 2]


def test_the_form_for_accelerators_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
  """On CPU the runs of a device go one after the other; elsewhere all at once, or as `stacked` says."""
  mesh = runs_mesh(1)
  values = shard_runs(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), mesh)
  function = lambda run, shared: jnp.tanh(run) @ shared
  shared = jnp.arange(4.0)
  want = jax.jit(map_runs(function, mesh))(values, shared)

  class Elsewhere:
    platform = "gpu"

  class Other:
    """The mesh, as it would be on another platform."""
    devices = np.array([Elsewhere()])
    size, shape, axis_names = 1, {"runs": 1}, ("runs",)

  calls: list[Any] = []

  def shard_map(inner: Any, **_: Any) -> Any:
    return inner
  monkeypatch.setattr(jax, "shard_map", shard_map)
  got = jax.jit(map_runs(function, Other()))(values, shared)  # type: ignore[arg-type]
  np.testing.assert_allclose(got, want, rtol=1e-6)

  def stacked(runs: Any, shared: Any) -> Any:
    calls.append(runs.shape)
    return jnp.tanh(runs) @ shared
  np.testing.assert_allclose(map_runs(function, Other(), stacked)(values, shared), want, rtol=1e-6)  # type: ignore[arg-type]
  assert calls == [(5, 4)]


def test_layout_is_by_run() -> None:
  mesh = runs_mesh(1)
  laid = repeat_runs({"x": jnp.arange(3.0)}, 2, mesh)["x"]
  assert laid.sharding.is_equivalent_to(runs_sharding(mesh), 2)
  assert padded_runs(7, mesh) == 7 and isinstance(to_host(laid), np.ndarray)


def test_the_cache_is_where_a_user_expects_it(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("RELEARN_CACHE", "/a")
  assert cache_dir() == pathlib.Path("/a")
  monkeypatch.delenv("RELEARN_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", "/b")
  assert cache_dir() == pathlib.Path("/b/relearn_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/c")
  assert cache_dir() == pathlib.Path("/c/.cache/relearn_jax")
