"""The flags of `relearn bench`; nothing here imports an array library, so that help is quick."""

import pathlib
import shlex

from absl import flags


def define_bench(values: flags.FlagValues) -> None:
  """All but `--model` and `--output`, which are paths."""
  text = lambda name, default, told: flags.DEFINE_string(name, default, told, flag_values=values)
  whole = lambda name, default, told: flags.DEFINE_integer(name, default, told, flag_values=values)
  several = lambda name, default, told: flags.DEFINE_list(name, default, told, flag_values=values)
  text("shape", None, "Named shape with random weights: tiny, names, small (the default), llama_71m, phi_115m, "
       "llama_220m, phi_1_5, llama_2_7b, llama_3_1_8b, zephyr_7b_beta or qwen2_5_7b.")
  several("what", ["train", "decode", "load"], "Parts: train, decode, load, attention. Compilation and memory are "
          "measured with training and decoding.")
  flags.DEFINE_bool("grid", False, "Measure the throughput of unlearn and relearn grids instead: cells per hour of "
                    "short names audits on a model of the shape's sizes.", flag_values=values)
  text("compare", "", "torch: the same work through transformers too, in turns; with --grid, an audit by hand. "
       "On a GPU both sides share its memory: see XLA_PYTHON_CLIENT_MEM_FRACTION.")
  text("audit", "", "Which audit is done by hand too, with --grid --compare=torch: short (if left out), or default, "
       "that of configs/names.py, which takes minutes on either side.")
  text("mesh", None, "Devices that share the work, such as fsdp:-1; by default as `unlearn` has it for one run, and as "
       "`audit` has it for stacked runs.")
  text("dtype", "auto", "Precision of products: auto (bfloat16 on accelerators, float32 on CPU), float32 or bfloat16.")
  whole("batch_size", 8, "Rows of a training step of each run.")
  whole("length", 128, "Tokens of a training row, with padding.")
  several("adapters", ["full", "lora"], "What is trained: full (all parameters), lora.")
  several("runs", ["1", "4"], "Stacked runs of a training step.")
  several("remat", ["none"], "What a layer keeps for its backward pass: none (all of it), dots, attn, full (nothing).")
  whole("lora_rank", 16, "Rank of adapters.")
  several("decode_batches", ["1", "16"], "Batch sizes of decoding.")
  whole("prompt_length", 64, "Tokens of a prompt.")
  whole("max_new_tokens", 32, "Tokens that are generated after it.")
  whole("repeats", 10, "Timed calls of each kind, at most.")


def run_bench(values: flags.FlagValues) -> str:
  """Measures and returns the tables.

  Raises:
    InputError: a flag is wrong.
  """
  from relearn_jax.bench.bench_settings import settings_of
  from relearn_jax.bench.run_bench import bench
  from relearn_jax.parallel.start import start
  settings = settings_of(values)
  given = sorted(name for name in values if values[name].present and name != "output")  # where it lies decides nothing
  command = shlex.join(["relearn", "bench", *(f"--{name}={_said(values[name].value)}" for name in given)])
  start()
  return bench(settings, command, None if values.output is None else pathlib.Path(values.output))


def _said(value: object) -> str:
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)
