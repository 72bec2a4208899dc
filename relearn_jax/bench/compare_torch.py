"""This package beside torch on the same work, in turns: steps of training, and generation; see `compare_audit` too."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.bench import torch_side
from relearn_jax.bench.decode_speed import make_prompts
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
