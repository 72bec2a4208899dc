"""Ratios of the seconds of training steps that follow each other in one process, A, B, A, B: what a change brings.

usage: PYTHONPATH=. python benchmarks/pairs.py softmax|packing|slots|prefix [--repeats=N]

softmax: a step with the softmax's own derivative against one in which JAX derives it operation by operation.
slots: completions of a file of prompts by slots against batches that are worked through as a whole, of prompts whose
  completions end by chance, after a geometric number of tokens, or never.
prefix: completions of prompts behind a prefix that is read once against prompts that are read whole; the last line of
  each shape has a local judge's proportions.
packing: a step over packed rows against the same rows apart, of lengths as those of the TOFU questions and answers.
"""

import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from relearn_jax.audit.attack import relearn_nll
from relearn_jax.bench.shapes import random_params, shape_config
from relearn_jax.bench.timing import in_turns, ratio
from relearn_jax.bench.train_speed import Stepper
from relearn_jax.data.batches import bucketize
from relearn_jax.data.packing import pack_rows, packing_line
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import stack_rows
from relearn_jax.generation.prefix import read_prefix
from relearn_jax.generation.prompt_files import complete
from relearn_jax.generation.slots import complete_rows
from relearn_jax.models import attention
from relearn_jax.models.model import Model, split_layers, unroll
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, repeat_runs, shard_rows
from relearn_jax.training.step import make_begin, make_step

MESH = make_mesh(parse_mesh("runs:1"), jax.devices()[:1])
# Quantiles of the tokens of TOFU's 4,000 rows, questions and answers, by a BPE of 4,096 tokens.
QUANTILES = (19, 37, 44, 50, 55, 59, 64, 68, 74, 84, 172)


def derived(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """`attention.softmax` without its own rule."""
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  return weights * (1.0 / jnp.sum(weights, axis=-1, keepdims=True))


def make_rows(number: int, vocab: int, length: int | None = None) -> list[Encoded]:
  """Random rows of one length, or of TOFU's."""
  rng = np.random.default_rng(0)
  lengths = np.interp(rng.uniform(0, 10, number), np.arange(11), QUANTILES).astype(int) if length is None else [
      length] * number
  return [Encoded(rng.integers(3, vocab, size).tolist()) for size in lengths]


def stepper(shape: str, rows, positions: int) -> tuple[Stepper, int]:
  """A compiled step of all parameters, and its temporary memory."""
  config = dataclasses.replace(shape_config(shape), max_positions=positions)
  model = Model(config, unroll=unroll(config))
  hyper = {"learning_rate": jnp.full(1, 1e-5), "weight_decay": jnp.zeros(1)}
  params = repeat_runs(random_params(model, jnp.float32, MESH), 1, MESH, model.axes())
  state = make_begin(relearn_nll, model.axes(), MESH)(params, hyper)
  make_step.cache_clear()
  rest = ({"relearn": shard_rows(rows, MESH)}, hyper)
  compiled = make_step(model, relearn_nll, MESH).lower(state, *rest).compile()
  return Stepper(compiled, (state, rest)), compiled.memory_analysis().temp_size_in_bytes


def show(what: str, old: tuple[Stepper, int], new: tuple[Stepper, int], repeats: int) -> None:
  """One line: new / old."""
  took = in_turns({"old": old[0], "new": new[0]}, repeats)
  found = ratio(took["new"], took["old"])
  print(f"{what}: {found.median:.2f} [{found.low:.2f}, {found.high:.2f}] of the seconds in {found.repeats} pairs, "
        f"{new[1] / old[1]:.2f} of the temporary memory", flush=True)


def softmax(repeats: int) -> None:
  own = attention.softmax
  for shape, number, length in (("names", 16, 64), ("names", 8, 128), ("names", 4, 512), ("small", 2, 512)):
    rows = stack_rows(make_rows(number, shape_config(shape).vocab_size, length), 1)
    made = []
    for form in (derived, own):
      attention.softmax = form  # type: ignore[assignment]
      jax.clear_caches()
      made.append(stepper(shape, rows, length))
    show(f"{shape}, {number} rows of {length}", *made, repeats)


def packing(repeats: int) -> None:
  for shape, number in (("names", 64), ("small", 16)):
    rows = make_rows(number, shape_config(shape).vocab_size)
    packed = pack_rows(rows, 1)
    print(packing_line(shape, packed))
    show(f"{shape}, {number} rows", *(stepper(shape, some, max(QUANTILES)) for some in (stack_rows(rows, 1), packed)),
         repeats)


def slots(repeats: int) -> None:
  for shape, number, size, length, new in (("names", 256, 32, 32, 32), ("small", 128, 16, 64, 64)):
    config = shape_config(shape)
    model, rng = Model(config), np.random.default_rng(0)
    params = split_layers(random_params(model, jnp.float32, MESH))
    asked = [rng.integers(1, config.vocab_size, size).tolist()
             for size in rng.integers(length // 2 + 1, length + 1, number)]
    keys = jax.random.split(jax.random.key(0), number)
    for share in (2 / new, 0):  # of the vocabulary, that ends a row; models with random weights sample it evenly
      given = {"model": model, "max_new_tokens": new, "eos_ids": tuple(range(round(share * config.vocab_size)))}

      def whole(given=given, keys=keys, asked=asked, params=params, size=size, length=length) -> dict:
        found = {}
        for batch in bucketize(asked, buckets=(length,), batch_size=size):
          some = keys[np.resize(batch.indices, size)]
          got = jax.device_get(complete(params, batch.tokens, batch.lengths, 1.0, some, **given))
          found |= {row: got.tokens[i, :got.num_tokens[i]].tolist() for i, row in enumerate(batch.indices.tolist())}
        return found

      def in_slots(given=given, keys=keys, asked=asked, params=params, size=size, length=length) -> dict:
        (rows,) = bucketize(asked, buckets=(length,))
        done = complete_rows(params, rows, keys[rows.indices][:, None], 1.0, batch_size=size, **given)
        return {one.row: one.tokens for one in done}
      with jax.default_matmul_precision("highest"):
        lengths = [len(row) for row in whole().values()]
        assert in_slots() == whole()
        took = in_turns({"old": whole, "new": in_slots}, repeats)
      found = ratio(took["new"], took["old"])
      print(f"{shape}, {number} prompts, {size} slots, {np.mean(lengths):.0f} of {new} tokens on average: "
            f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}] of the seconds", flush=True)


def prefix(repeats: int) -> None:
  new = 64
  for shape, number in (("names", 64), ("small", 16)):
    for size, shared, own in ((16, 32, 64), (16, 64, 64), (16, 128, 64), (16, 256, 64), (8, 144, 256)):
      config = dataclasses.replace(shape_config(shape), max_positions=1024)
      model, rng = Model(config), np.random.default_rng(0)
      params = split_layers(random_params(model, jnp.float32, MESH))
      draw = lambda length, rng=rng, config=config: rng.integers(1, config.vocab_size, length).tolist()
      begin, ends = draw(shared), [draw(length) for length in rng.integers(own // 2 + 1, own + 1, number)]
      given = {"model": model, "batch_size": size, "max_new_tokens": new, "eos_ids": ()}
      seconds: dict[str, list[float]] = {"old": [], "new": []}

      def complete_all(name: str, params=params, begin=begin, ends=ends, shared=shared, own=own, given=given,
                       seconds=seconds) -> dict:
        clock = time.process_time()
        read = read_prefix(params, np.array(begin, np.int32), model=given["model"]) if name == "new" else None
        (rows,) = bucketize(ends if read else [begin + end for end in ends], buckets=(own if read else shared + own,))
        found = {one.row: one.tokens for one in complete_rows(params, rows, None, 0.0, prefix=read, **given)}
        seconds[name].append(time.process_time() - clock)
        return found
      with jax.default_matmul_precision("highest"):
        old, got = complete_all("old"), complete_all("new")
        took = in_turns({name: functools.partial(complete_all, name) for name in seconds}, repeats)
      found = ratio(took["new"], took["old"])
      cpu = np.median(np.divide(seconds["new"], seconds["old"])[1:])
      print(f"{shape}, {number} prompts, {size} slots, {shared} tokens shared, up to {own} of each, {new} new: "
            f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}] of the seconds, {cpu:.2f} of CPU; "
            f"{sum(old[row] == got[row] for row in old)} with the same tokens", flush=True)


if __name__ == "__main__":
  count = next((int(flag.split("=")[1]) for flag in sys.argv[2:] if flag.startswith("--repeats=")), 20)
  {"softmax": softmax, "packing": packing, "slots": slots, "prefix": prefix}[sys.argv[1]](count)
