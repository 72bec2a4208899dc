"""How many models of an attack are trained side by side."""

import dataclasses

import pytest

from relearn_jax.models.config import ModelConfig
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.fit import device_memory, runs_that_fit
from relearn_jax.plan.presets import preset
from relearn_jax.plan.work import Work


def attack(**changes: object) -> Work:
  config = preset("microsoft/phi-1_5")
  assert isinstance(config, ModelConfig)
  return dataclasses.replace(Work("attack", "train", config, runs=12, rows=4, length=64, counted=64, groups=True),
                             **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [1, 3, 7, 12])
def test_as_many_as_the_estimate_allows(runs: int) -> None:
  memory = estimate(attack(runs=runs), {}).total
  assert runs_that_fit(attack(), {}, memory) == runs
  assert runs_that_fit(attack(), {}, memory - 1) == max(runs - 1, 1)


def test_one_is_tried_where_the_estimate_allows_none_and_devices_share_the_runs() -> None:
  assert runs_that_fit(attack(), {}, 1.0) == 1
  memory = estimate(attack(runs=2), {}).total
  assert runs_that_fit(attack(), {"runs": 4}, memory) == 8


def test_the_machine_has_memory() -> None:
  assert 2**28 < device_memory() < 2**50
