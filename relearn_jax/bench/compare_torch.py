"""This package beside torch on the same work, in turns: steps of training, generation, and a whole audit."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from jax.sharding import Mesh

from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.audit.results_file import ANSWERS_FILE
from relearn_jax.bench import torch_audit, torch_side
from relearn_jax.bench.decode_speed import make_prompts
from relearn_jax.bench.grid_speed import WHERE, audit_once, count_cells, short_audit
from relearn_jax.bench.timing import in_turns, ratio, spread
from relearn_jax.bench.train_speed import LEARNING_RATE, Base, Stepper, Training
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.lora import LoraConfig
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import to_host, use_mesh
from relearn_jax.plan.work import Work

OURS = "relearn_jax"
MOST_AUDITS = 3  # repeats


def beside(took: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Seconds of each side, and how often as fast ours is: their seconds / ours, pair by pair."""
  others = [name for name in took if name != OURS]
  return {"seconds": {name: spread(values) for name, values in took.items()},
          "times_as_fast_as": {name: ratio(took[name], took[OURS]) for name in others}}


def write_model(base: Base, config: ModelConfig, folder: pathlib.Path, mesh: Mesh) -> pathlib.Path:
  """The parameters that are measured, in fp32, as a folder that transformers loads."""
  model = Model(config)
  export(to_host(base(model, jnp.float32, mesh)), model, folder)
  return folder


def compare_training(work: Work, dtype: Any, mesh: Mesh, folder: pathlib.Path, repeats: int, base: Base
                     ) -> dict[str, Any]:
  """Steps of all runs: ours stacked, torch's one model after the other.

  Compiled by torch.compile too where one run of all parameters is trained; where that fails, why.
  """
  name, notes = jnp.dtype(dtype).name, dict[str, Any]()
  training = Training(work, dtype, mesh, base)
  rows = training.batch.rows
  lora = (work.lora_rank, LoraConfig(work.lora_rank).alpha) if work.adapter == "lora" else None
  make = lambda compiled: torch_side.trainers(folder, np.asarray(rows.tokens), np.asarray(rows.mask), LEARNING_RATE,
                                              name, lora=lora, compiled=compiled)
  with use_mesh(mesh):
    step = Stepper(training.step, training.start())
    _, log = jax.block_until_ready(step())
    eager = make(False)
    notes["loss_before"] = {OURS: float(np.asarray(log.loss)[0]), "torch": eager()}
    calls: dict[str, Callable[[], Any]] = {OURS: step, "torch": eager}
    if work.runs == 1 and lora is None:
      try:
        calls["torch.compile"] = make(True)
        notes["torch.compile"] = {"first_loss": calls["torch.compile"]()}
      except Exception as error:  # it needs a compiler of C++, among others, and raises many kinds
        del calls["torch.compile"]
        notes["torch.compile"] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    took = in_turns(calls, repeats)
  return {"name": f"train {work.name}", "rows": work.rows, "length": work.length, "runs": work.runs,
          **beside(took), **notes}


def compare_decoding(works: Sequence[Work], dtype: Any, mesh: Mesh, folder: pathlib.Path, repeats: int, base: Base
                     ) -> Iterator[dict[str, Any]]:
  """Greedy generation of a batch, prompts read, against transformers' generate on its default cache."""
  model = Model(works[0].config, dtype=dtype)
  other = torch_side.load(folder, jnp.dtype(dtype).name).eval()
  with use_mesh(mesh), jax.default_matmul_precision("highest"):
    params = base(model, dtype, mesh)
    for work in works:
      prompts, lengths = make_prompts(work)
      ours = lambda prompts=prompts, lengths=lengths, work=work: complete(
          params, prompts, lengths, 0.0, None, model=model, max_new_tokens=work.max_new_tokens, eos_ids=())
      theirs = lambda prompts=prompts, work=work: torch_side.generate(other, prompts, work.max_new_tokens)
      same = float(np.mean(np.asarray(ours().tokens) == theirs()))
      took = in_turns({OURS: ours, "transformers generate": theirs}, repeats)
      yield {"name": f"generate {work.name}", "batch": work.rows, "prompt_length": work.length,
             "new_tokens": work.max_new_tokens, **beside(took), "equal_tokens": same}


def compare_audit(config: ModelConfig, mesh: str, repeats: int) -> dict[str, Any]:
  """A short names audit, compiled, against the same experiment by hand in torch, batched and one prompt a call.

  Gradient ascent on all parameters, two learning rates of the attack, both sides in fp32. Ours writes everything that
  an audit writes.
  """
  plan = short_audit(config, methods=("ga",), adapters=("full",), dtype="float32")
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary:
    root = pathlib.Path(temporary)
    base = cached_base(plan.arms.pretrain, plan.case_config, root)
    exp, levels, number = Experiment(plan, WHERE, root / "by hand"), dict[str, torch_audit.Level](), 0

    def ours() -> None:
      nonlocal number
      number += 1
      audit_once(plan, root, f"audit{number}", mesh)

    def by_hand(one_prompt: bool) -> None:
      levels["torch"] = torch_audit.ByHand(exp, base, one_prompt).run()
    ours()  # compiles; torch has nothing to warm up but a moment's allocations
    took = in_turns({OURS: ours, "torch by hand, batched": lambda: by_hand(False),
                     "torch by hand, one prompt a call": lambda: by_hand(True)}, min(repeats, MOST_AUDITS), warm=False)
    mean = answer_levels(root / f"audit{number}" / ANSWERS_FILE)
  both = sorted(mean.keys() & levels["torch"].keys())
  return {"name": "names audit", "models": len(exp.chains), "cells": count_cells(plan), "questions": len(exp.asked),
          **beside(took), "compared": len(both),
          "largest_difference_of_mean_answer_logprobs": max(abs(mean[key] - levels["torch"][key]) for key in both)}


def answer_levels(path: pathlib.Path) -> torch_audit.Level:
  """As `ByHand.run`, from an audit's stored answers."""
  frame = pq.read_table(path).to_pandas()
  frame = frame[frame["kind"] == "question"]
  found: torch_audit.Level = {}
  columns = ["arm", "variant", "seed", "point", "relearn_step", "learning_rate"]
  for (arm, variant, seed, point, step, rate), rows in frame.groupby(columns, observed=True, dropna=False):
    if point == "relearned":
      found[f"{arm}-{variant}-{seed}-lr{rate:g}", int(step)] = float(rows["logprob"].mean())
  return found
