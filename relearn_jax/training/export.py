"""`relearn export`: one run of a checkpoint as a Hugging Face folder."""

import pathlib
from typing import Any

import jax

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.config import ModelConfig, RopeScaling
from relearn_jax.models.export import export
from relearn_jax.models.lora import LoraConfig, export_peft, init_lora, merge_lora
from relearn_jax.models.model import Model
from relearn_jax.training import checkpoints


def model_of(about: dict[str, Any]) -> Model:
  """The architecture that a checkpoint's description states."""
  values = dict(about["model"])
  scaling = values.pop("rope_scaling")
  values["eos_ids"] = tuple(values["eos_ids"])
  return Model(ModelConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None))


def export_run(checkpoint: pathlib.Path, output: pathlib.Path, run: str | None = None, *, merge: bool = False) -> str:
  """Writes one run's weights, with config and tokenizer; returns the run's name.

  An adapter is written as a PEFT folder, or merged into its base, in fp32.

  Args:
    checkpoint: a step's folder, such as WORKDIR/checkpoints/unlearn/000040.
    output: a folder that does not exist yet.
    run: which of the stacked runs, such as "U-7-0"; may be left out where there is one.
    merge: write base and adapter as one model.

  Raises:
    InputError: no complete checkpoint, no such run, an output that holds something, or `merge` of a
      checkpoint without adapters.
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
  model, source, lora = model_of(about), (checkpoint / about["tokenizer"]).resolve(), lora_of(about)
  if merge and lora is None:
    raise InputError("is set, but the checkpoint holds whole models", file=checkpoint, field="--merge",
                     mend="leave it out")
  saved = model.abstract() if lora is None else jax.eval_shape(lambda: init_lora(model, lora, jax.random.key(0)))
  one = jax.tree.map(lambda leaf: leaf[names.index(run)], checkpoints.load_tree(checkpoint, saved, len(names)))
  if lora is None:
    export(one, model, output, source=source)
  elif merge:
    base = load_params(check_checkpoint(source), model)
    export(merge_lora(base, one, lora.scale), model, output, source=source)
  else:
    export_peft(one, model, lora, output, base=str(source))
  return run


def lora_of(about: dict[str, Any]) -> LoraConfig | None:
  """The form of the adapters that a checkpoint holds; None where it holds whole models."""
  values = about.get("lora")
  return None if values is None else LoraConfig(values["rank"], values["alpha"], tuple(values["targets"]))
