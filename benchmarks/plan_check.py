"""What a plan estimates, against the compiler and against a run on this machine: `python benchmarks/plan_check.py`.

Each case is a stage of the kind that the commands run (a training step of `training.step`, or prompts read and
decoded), of a random model, in a fresh process on one CPU device. Compared with `plan.estimate` are:

- what the compiler reserves: `memory_analysis()` of the compiled program, arguments, temporary and output;
- what the process holds at its peak: anonymous memory while steps are taken, above what it held after compilation and
  before there were weights, as benchmarks/resident.py reads it;
- seconds of a step, the median, against those of the plan for "cpu" with this machine's cores.

The tables give the plan's figure divided by what was found: above 1, the plan says more than it takes.
"""

import argparse
import ctypes
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import resident

from relearn_jax.generation.decode import decode, prefill
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, unroll
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import runs_mesh
from relearn_jax.plan.devices import GIB, get_device
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work
from relearn_jax.training.step import NOTHING, Frozen, init_state, make_step

MB = 1e6
LLAMA = ModelConfig(
    architecture="llama", vocab_size=32000, hidden_size=512, intermediate_size=1376, num_layers=12, num_heads=8,
    num_kv_heads=8, head_dim=64, max_positions=2048, norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    tie_embeddings=False, bos_id=1, eos_ids=())
PHI = dataclasses.replace(
    LLAMA, architecture="phi", vocab_size=51200, hidden_size=640, intermediate_size=2560, num_layers=10, num_heads=10,
    num_kv_heads=10, rotary_dim=32)
TRAIN: dict[str, Any] = {"kind": "train", "rows": 8, "length": 128, "counted": 127}
GENERATE: dict[str, Any] = {"kind": "generate", "rows": 16, "length": 128, "max_new_tokens": 32}
CASES = [Work(f"{name} {adapter} {remat}", config=config, adapter=adapter, remat=remat, shared=adapter == "lora",
              **TRAIN)
         for name, config in (("llama", LLAMA), ("phi", PHI))
         for adapter, remat in (("full", "none"), ("full", "dots"), ("full", "attn"), ("full", "full"),
                                ("lora", "none"), ("lora", "full"))]
CASES += [Work(f"{name} generate", config=config, **GENERATE) for name, config in (("llama", LLAMA), ("phi", PHI))]
HEAD = ["case", "parameters", "plan", "compiler", "run", "plan / compiler", "plan / run", "plan, s", "run, s",
        "plan / run, time"]


def fill(tree: Any) -> Any:
  """Arrays of a tree's shapes, small random numbers or zeros for integers, one at a time from the host."""
  rng = np.random.default_rng(0)

  def leaf(shape: Any) -> jax.Array:
    if np.issubdtype(shape.dtype, np.integer):
      return jnp.zeros(shape.shape, shape.dtype)
    return jnp.asarray(rng.random(shape.shape, np.float32) * 0.04 - 0.02, shape.dtype)
  return jax.tree.map(leaf, tree)


def zeros(tree: Any) -> Any:
  """As `fill`, of zeros."""
  return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), tree)


def fill_shapes(tree: Any) -> Any:
  """Traced zeros of a tree's shapes, to be used under `jax.eval_shape`."""
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def training(work: Work) -> tuple[Any, Callable[[Any], Any], Callable[[], Any]]:
  """The compiled step, what takes one step from a state to the next, and what makes the first state."""
  lora, objective = LoraConfig(rank=work.lora_rank) if work.adapter == "lora" else None, nll("forget")
  model = Model(work.config, unroll=unroll(work.config), remat=work.remat, lora_scale=lora.scale if lora else 1.0)
  stack = lambda leaf: jax.ShapeDtypeStruct((work.runs, *leaf.shape), leaf.dtype)
  base = model.abstract()
  trained = jax.eval_shape(lambda: init_lora(model, lora, jax.random.key(0))) if lora else base
  state = jax.tree.map(stack, jax.eval_shape(lambda: init_state(fill_shapes(trained), objective)))
  frozen = Frozen(shared=base) if lora else NOTHING
  of: Any = lambda dtype: jax.ShapeDtypeStruct((work.runs, work.rows, work.length), dtype)
  batch = {"forget": TokenRows(of(jnp.int32), of(jnp.float32))}
  hyper: Any = {key: jax.ShapeDtypeStruct((work.runs,), jnp.float32) for key in ("learning_rate", "weight_decay")}
  step: Any = make_step(model, lambda _: objective, runs_mesh(1))
  compiled = step.lower(state, batch, hyper, None, frozen).compile()

  def first() -> Any:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, work.config.vocab_size, (work.runs, work.rows, work.length)).astype(np.int32)
    mask = np.ones(tokens.shape, np.float32)
    mask[..., 0] = 0
    rest = ({"forget": TokenRows(jnp.asarray(tokens), jnp.asarray(mask))},
            {"learning_rate": jnp.full(work.runs, 1e-5), "weight_decay": jnp.zeros(work.runs)}, None, fill(frozen))
    moments = state._replace(params=None)
    return zeros(moments)._replace(params=fill(state.params)), rest

  def take(at: Any) -> Any:
    after, _ = compiled(at[0], *at[1])  # the state is donated
    return jax.block_until_ready(after), at[1]
  return compiled, take, first


def generating(work: Work) -> tuple[Any, Callable[[Any], Any], Callable[[], Any]]:
  """As `training`: prompts are read and answered as one step."""
  model = Model(work.config)

  def answer(params: Any, tokens: Any, lengths: Any) -> Any:
    prompted = prefill(model, params, tokens, lengths, work.max_new_tokens - 1)
    return decode(model, params, prompted, max_new_tokens=work.max_new_tokens, eos_ids=work.config.eos_ids)
  of: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  compiled = jax.jit(answer).lower(model.abstract(), of(work.rows, work.length), of(work.rows)).compile()

  def first() -> Any:
    return (fill(model.abstract()), jnp.ones((work.rows, work.length), jnp.int32),
            jnp.full(work.rows, work.length, jnp.int32))

  def take(at: Any) -> Any:
    jax.block_until_ready(compiled(*at))
    return at
  return compiled, take, first


def run(name: str, steps: int) -> None:
  """The child: one case."""
  work = next(work for work in CASES if work.name == name)
  compiled, take, first = (training if work.kind == "train" else generating)(work)
  used = compiled.memory_analysis()
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compilation has freed must not hide what steps need
  resident.mark("before")
  at = first()
  jax.block_until_ready(at)
  gc.collect()
  jax.device_put(np.zeros(()))  # lets go of the host's copies
  resident.mark("start")
  at = take(at)
  at = take(at)
  resident.mark("end")
  seconds = []
  for _ in range(steps):
    begin = time.perf_counter()
    at = take(at)
    seconds.append(time.perf_counter() - begin)
  resident.finish({"compiler": used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
                   - used.alias_size_in_bytes, "seconds": seconds})


def main() -> None:
  """Runs each case in a process of its own and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", nargs="+", default=[""], help="parts of names, such as llama or 'full none' "
                      "(default: all)")
  parser.add_argument("--steps", type=int, default=3, help="timed, after two others (default: %(default)s)")
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
  parser.add_argument("--memory_gib", type=float, default=whole, help="of this machine (default: %(default).0f)")
  parser.add_argument("--run", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.run:
    run(flags.run, flags.steps)
    return
  cores = len(os.sched_getaffinity(0))
  device = get_device("cpu", memory_bytes=int(flags.memory_gib * GIB), cores=cores)
  rows = []
  for work in CASES:
    if not any(part in work.name for part in flags.cases):
      continue
    needed = estimate(work, {})
    seen = resident.watch([os.path.abspath(__file__), "--run", work.name, "--steps", str(flags.steps)],
                          JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
    compiler, held = seen.result["compiler"], seen.peak - seen.before
    seconds = statistics.median(seen.result["seconds"])
    rows.append([
        work.name, f"{needed.num_params / 1e6:.0f} M", f"{needed.total / MB:.0f}", f"{compiler / MB:.0f}",
        f"{held / MB:.0f}", f"{needed.total / compiler:.2f}", f"{needed.total / held:.2f}",
        f"{needed.seconds(device):.2f}", f"{seconds:.2f}", f"{needed.seconds(device) / seconds:.2f}"])
    print("  ".join(rows[-1]), flush=True)
  print(f"\nmemory in MB of 1e6 bytes; {cores} cores\n")
  print(resident.table(HEAD, rows))


if __name__ == "__main__":
  main()
