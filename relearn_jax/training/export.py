"""`relearn export`: one run of a checkpoint as a Hugging Face folder."""

import pathlib
from typing import Any

import jax

from relearn_jax.errors import InputError
from relearn_jax.models.config import ModelConfig, RopeScaling
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.training import checkpoints


def model_of(about: dict[str, Any]) -> Model:
  """The architecture that a checkpoint's description states."""
  values = dict(about["model"])
  scaling = values.pop("rope_scaling")
  values["eos_ids"] = tuple(values["eos_ids"])
  return Model(ModelConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None))


def export_run(checkpoint: pathlib.Path, output: pathlib.Path, run: str | None = None) -> str:
  """Writes one run's weights, with config and tokenizer; returns the run's name.

  Args:
    checkpoint: a step's folder, such as WORKDIR/checkpoints/unlearn/000040.
    output: a folder that does not exist yet.
    run: which of the stacked runs, such as "U-7-0"; may be left out where there is one.

  Raises:
    InputError: no complete checkpoint, no such run, or an output that holds something.
  """
  about = checkpoints.describe(checkpoint)
  names = list(about["runs"])
  if run is None and len(names) > 1:
    raise InputError(f"is not given, and the checkpoint holds {len(names)} runs: {', '.join(names)}", file=checkpoint,
                     field="--run", mend="name one of them")
  run = run or names[0]
  if run not in names:
    raise InputError(f"is {run!r}; the checkpoint holds {', '.join(names)}", file=checkpoint, field="--run",
                     mend="name one of them")
  model = model_of(about)
  stacked = checkpoints.load_tree(checkpoint, model.abstract(), len(names))
  params = jax.tree.map(lambda leaf: leaf[names.index(run)], stacked)
  export(params, model, output, source=(checkpoint / about["tokenizer"]).resolve())
  return run
