"""What devices exchange within a compiled step: nothing across runs; with fsdp, weights and gradients."""

import re

import jax
import numpy as np
import pytest

from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, repeat_runs, shard_rows, shard_runs
from relearn_jax.training.step import make_begin, make_step

from ..small import CONFIG, MODEL, params
from ..training.test_step import DATA

COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
                        r"|send|recv)(?:-start)?\(")


def build(hyper: object) -> object:
  return nll("forget")


def collectives(text: str) -> set[str]:
  """Kinds of exchanges in the compiled program of a training step of two runs on a mesh of two devices."""
  mesh = make_mesh(parse_mesh(text), config=CONFIG)
  rows = shard_rows(jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], 2, 0), DATA["forget"]), mesh)
  hyper = shard_runs({"learning_rate": np.full(2, 1e-3, np.float32), "weight_decay": np.zeros(2, np.float32)}, mesh)
  state = make_begin(build, MODEL.axes(), mesh)(repeat_runs(params(), 2, mesh, MODEL.axes()), hyper)
  step = make_step(MODEL, build, mesh)
  compiled = step.lower(state, {"forget": rows}, hyper).compile().as_text()
  assert "num_partitions=2" in compiled
  return set(COLLECTIVE.findall(compiled))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_step_exchanges_nothing_across_runs() -> None:
  assert collectives("runs:2") == set()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_step_of_spread_runs_gathers_weights_and_sums_gradients() -> None:
  found = collectives("fsdp:2")
  assert "all-gather" in found  # of weights, for the devices' own rows
  assert found & {"reduce-scatter", "all-reduce"}  # of gradients over rows
