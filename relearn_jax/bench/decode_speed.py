"""Greedy decoding at several batch sizes: tokens per second, and the share of the memory's bandwidth."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax.bench.compiling import compile_twice
from relearn_jax.bench.formulas import bandwidth_share, decode_bytes
from relearn_jax.bench.peak_memory import anonymous, let_go, peak_memory
from relearn_jax.bench.rates import Rates
from relearn_jax.bench.shapes import random_params
from relearn_jax.bench.timing import Spread, in_turns, spread
from relearn_jax.bench.train_speed import Base, memory_row
from relearn_jax.generation.gather import most_bytes
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.mesh import use_mesh
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Work


def make_prompts(work: Work, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Random prompts `[rows, length]`, all of that length, and their lengths."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, work.config.vocab_size, (work.rows, work.length), dtype=np.int32)
  return tokens, np.full(work.rows, work.length, np.int32)


class Decoding:
  """`relearn generate`'s own program: prompts are read, and a number of tokens follow each, whatever they are."""

  def __init__(self, work: Work, model: Model, params: Params):
    self.work, self.model, self.params = work, model, params
    self.prompts, self.lengths = make_prompts(work)

  def lower(self, new_tokens: int) -> Any:
    """The program, traced; without an id that ends a row, so that every row goes on to the last token."""
    return complete.lower(self.params, self.prompts, self.lengths, 0.0, None, model=self.model,
                          max_new_tokens=new_tokens, eos_ids=())

  def call(self, compiled: Any) -> Any:
    """What it generates."""
    return compiled(self.params, self.prompts, self.lengths, 0.0, None)


def measure_decoding(works: Sequence[Work], dtype: Any, mesh: Mesh, rates: Rates, repeats: int,
                     base: Base = random_params) -> Iterator[dict[str, Any]]:
  """A row for each batch size; see `formulas`. The model is made once."""
  # As `relearn generate` has it, where fp32 is asked for.
  with use_mesh(mesh), jax.default_matmul_precision("highest"):
    model = Model(works[0].config, dtype=dtype)
    params = jax.block_until_ready(base(model, dtype, mesh))
    for work in works:
      yield _measure(work, Decoding(work, model, params), mesh, rates, repeats)


def _measure(work: Work, decoding: Decoding, mesh: Mesh, rates: Rates, repeats: int) -> dict[str, Any]:
  laid, new = dict(mesh.shape), work.max_new_tokens
  whole, compiling = compile_twice(lambda: decoding.lower(new))
  first = decoding.lower(1).compile()
  let_go()
  held = anonymous()  # with the parameters, which on CPU are the process's own
  with peak_memory(None if held is None else held - sum(x.nbytes for x in jax.tree.leaves(decoding.params))) as peak:
    jax.block_until_ready(decoding.call(whole))
  took = in_turns({"whole": lambda: decoding.call(whole), "first": lambda: decoding.call(first)}, repeats)
  steps = step_seconds(took["whole"], took["first"], new)
  share, size = rates.share(mesh.size), mesh.size
  return {
      "name": work.name, "batch": work.rows, "prompt_length": work.length, "new_tokens": new,
      "mesh": {axis: number for axis, number in laid.items() if number > 1},
      "decode_seconds": steps, "tokens_per_second": steps.map(lambda seconds: work.rows / seconds),
      "tokens_per_second_with_prompts": spread(took["whole"]).map(lambda seconds: work.rows * new / seconds),
      "bytes_per_step": decode_bytes(work, laid),
      "bandwidth_share": steps.map(lambda s: bandwidth_share(work, laid, size, s, rates.bandwidth * share)),
      "prompt_tokens_per_second": spread(took["first"]).map(lambda seconds: work.rows * work.length / seconds),
      **compiling,
      "memory": memory_row(estimate(work, laid, most_bytes()).total, whole.memory_analysis(), peak, mesh)}


def step_seconds(whole: Sequence[float], first: Sequence[float], new_tokens: int) -> Spread:
  """Seconds of one decoding step: what further tokens add to the first, pair by pair of calls in turns.

  >>> step_seconds([1.5, 1.0, 2.0], [0.5, 0.5, 0.5], 11)
  Spread(median=0.1, low=0.05, high=0.15, repeats=3)
  """
  return spread([max(a - b, 1e-9) / (new_tokens - 1) for a, b in zip(whole, first, strict=True)])
