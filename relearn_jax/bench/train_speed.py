"""Training steps of stacked runs: tokens per second, MFU, seconds of compilation, memory against the plan."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit.attack import relearn_nll
from relearn_jax.bench.compiling import compile_twice
from relearn_jax.bench.formulas import compute_share, mfu
from relearn_jax.bench.peak_memory import Peak, anonymous, let_go, peak_memory
from relearn_jax.bench.rates import Rates
from relearn_jax.bench.shapes import random_params
from relearn_jax.bench.timing import repeat
from relearn_jax.data.rows import host_rows
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, Params, unroll
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.mesh import repeat_runs, runs_sharding, shard_rows, use_mesh
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work
from relearn_jax.training.step import NOTHING, Frozen, make_begin, make_step

LEARNING_RATE = 1e-5
Base = Callable[[Model, Any, Mesh], Params]  # (architecture, precision, mesh) -> parameters on it


class Batch(NamedTuple):
  """Rows of stacked runs `[runs, rows, T]` on the host, and their tokens."""

  rows: TokenRows
  real: int
  padded: int


def make_batch(work: Work, seed: int = 0) -> Batch:
  """Random rows: lengths drawn evenly from half of the padded length to all of it, which the first row has.

  All tokens but a row's first count in the loss.
  """
  rng = np.random.default_rng(seed)
  lengths = rng.integers(-(-work.length // 2), work.length + 1, (work.runs, work.rows))
  lengths[:, 0] = work.length
  there = np.arange(work.length) < lengths[..., None]
  tokens = rng.integers(1, work.config.vocab_size, there.shape, dtype=np.int32) * there
  mask = (there & (np.arange(work.length) > 0)).astype(np.float32)
  return Batch(host_rows(tokens, mask), int(there.sum()), there.size)


def training_model(work: Work, dtype: Any) -> Model:
  """The model as jobs train it."""
  scale = LoraConfig(work.lora_rank).scale if work.adapter == "lora" else 1.0
  return Model(work.config, dtype=dtype, unroll=unroll(work.config), remat=work.remat, lora_scale=scale)


class Training:
  """A stacked training step of `training.step`, and what it starts from."""

  def __init__(self, work: Work, dtype: Any, mesh: Mesh, base: Base = random_params):
    self.work, self.dtype, self.mesh, self.base = work, dtype, mesh, base
    self.model = training_model(work, dtype)
    self.step: Any = make_step(self.model, relearn_nll, mesh)
    self.batch = make_batch(work)

  def start(self) -> tuple[Any, tuple[Any, ...]]:
    """The state at step 0, and the step's other arguments."""
    runs, mesh, axes = self.work.runs, self.mesh, self.model.axes()
    frozen, lora = NOTHING, LoraConfig(self.work.lora_rank)
    if self.work.adapter == "lora":
      frozen = Frozen(shared=self.base(self.model, self.dtype, mesh))
      one = init_lora(self.model, lora, jax.random.key(0))
    else:
      one = self.base(self.model, jnp.float32, mesh)
    params = repeat_runs(one, runs, mesh, axes)
    del one
    each = lambda value: jax.device_put(np.full(runs, value, np.float32), runs_sharding(mesh))
    hyper = {"learning_rate": each(LEARNING_RATE), "weight_decay": each(0.0)}
    state = make_begin(relearn_nll, axes, mesh)(params, hyper)
    rows = {"relearn": shard_rows(self.batch.rows, mesh)}
    return state, (rows, hyper, None, frozen)


class Stepper:
  """Takes a step after the other from the state that it holds, and lets go of the one before."""

  def __init__(self, step: Callable[..., Any], at: tuple[Any, tuple[Any, ...]]):
    self.step, self.state, self.rest = step, *at

  def __call__(self) -> Any:
    self.state, log = self.step(self.state, *self.rest)
    return self.state, log


def measure_training(work: Work, dtype: Any, mesh: Mesh, rates: Rates, repeats: int, base: Base = random_params
                     ) -> dict[str, Any]:
  """One row of the results; see `formulas`."""
  laid: Mapping[str, int] = dict(mesh.shape)
  with use_mesh(mesh):
    training = Training(work, dtype, mesh, base)
    begin = time.perf_counter()
    at = [jax.block_until_ready(training.start())]
    made = time.perf_counter() - begin
    compiled, compiling = compile_twice(lambda: training.step.lower(at[0][0], *at[0][1]))
    used = compiled.memory_analysis()
    at.clear()
    let_go()  # what compilation has freed must not hide what steps need
    before = anonymous()
    step = Stepper(compiled, training.start())
    jax.block_until_ready(step.state)
    let_go()
    with peak_memory(before) as peak:
      jax.block_until_ready(step())
      jax.block_until_ready(step())
    took = repeat(step, repeats, warm=False)
  needed, matmul = estimate(work, laid), rates.matmul.median * rates.share(mesh.size)
  tokens = lambda number: took.map(lambda seconds: number / seconds)
  share = took.map(lambda seconds: mfu(work, seconds, matmul))
  return {
      "name": work.name, "adapter": work.adapter, "runs": work.runs, "remat": work.remat, "rows": work.rows,
      "length": work.length, "mesh": {axis: size for axis, size in laid.items() if size > 1},
      "parameters": needed.num_params, "trained": needed.num_trained,
      "step_seconds": took, "real_tokens_per_second": tokens(training.batch.real),
      "padded_tokens_per_second": tokens(training.batch.padded), "mfu": share,
      "mfu_real": share.median * training.batch.real / training.batch.padded,
      "compute_share": compute_share(work, laid, took.median, matmul), "start_seconds": made, **compiling,
      "memory": memory_row(needed.total, used, peak, mesh)}


def memory_row(planned: int, used: Any, peak: Peak, mesh: Mesh) -> dict[str, Any]:
  """Bytes a device: by the plan, by the compiler (arguments, temporary, output), and what was seen.

  On CPU it is a device's share of what the process held for all of them.
  """
  devices = mesh.size if mesh.devices.flat[0].platform == "cpu" else 1
  seen = None if peak.bytes is None else peak.bytes // devices
  compiler = None if used is None else (used.argument_size_in_bytes + used.temp_size_in_bytes
                                        + used.output_size_in_bytes - used.alias_size_in_bytes)
  return {"plan": planned, "compiler": compiler, "peak": seen, "source": peak.source,
          "plan_over_compiler": planned / compiler if compiler else None,
          "plan_over_peak": planned / seen if seen else None}


def train_works(base: Work, adapters: tuple[str, ...], remats: tuple[str, ...], runs: tuple[int, ...]) -> list[Work]:
  """Every kind of step, as a plan names its arrays; a LoRA's base is shared by its runs, in compute precision."""
  found = []
  for adapter in adapters:
    for remat in remats:
      for number in runs:
        name = adapter + (f" x {number}" if number > 1 else "") + (f", remat {remat}" if remat != "none" else "")
        lora = adapter == "lora"
        found.append(dataclasses.replace(
            base, name=name, adapter=adapter, remat=remat, runs=number, shared=lora,
            param_dtype=base.compute_bytes if lora else 4))
  return found
