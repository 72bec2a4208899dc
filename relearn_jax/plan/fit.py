"""How many models of an attack fit side by side: what `attack.runs_at_once` is where it is 0."""

import dataclasses
import os
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.stages import AtOnce
from relearn_jax.parallel.memory import told_memory
from relearn_jax.parallel.processes import everyone
from relearn_jax.plan.audit_plan import attack_work, measured
from relearn_jax.plan.devices import USABLE
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work


def runs_that_fit(work: Work, mesh: Mapping[str, int], memory: float) -> int:
  """The largest number of runs, at most `work.runs`, whose estimate is within `memory` bytes a device; at least 1."""
  fits = lambda runs: estimate(dataclasses.replace(work, runs=runs), mesh).total <= memory
  low, high = 1, work.runs
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def device_memory() -> float:
  """Bytes that a device may use: what it says, or on CPU a share of the machine's memory."""
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return told_memory() or physical / jax.local_device_count()


def fitting(exp: Experiment, mesh: Mesh) -> AtOnce:
  """For `pipeline.audit`: decides from the plan of each attack, on the devices that there are."""
  memory, sizes, on_cpu = min(everyone(device_memory())) * USABLE, measured(exp), jax.default_backend() == "cpu"
  return lambda stage: runs_that_fit(attack_work(exp.config, stage, sizes, on_cpu), dict(mesh.shape), memory)
