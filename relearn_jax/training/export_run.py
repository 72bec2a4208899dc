"""`relearn export`: one run of a checkpoint as a Hugging Face folder."""

import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params, read_leaves
from relearn_jax.models.config import ModelConfig, RopeScaling
from relearn_jax.models.export import export, rounding
from relearn_jax.models.lora import LoraConfig, export_peft, init_lora, merge_lora
from relearn_jax.models.model import Model, flatten
from relearn_jax.models.precision import DTYPES
from relearn_jax.training import checkpoints


def model_of(about: dict[str, Any]) -> Model:
  """The architecture that a checkpoint's description states."""
  values = dict(about["model"])
  scaling = values.pop("rope_scaling")
  values["eos_ids"] = tuple(values["eos_ids"])
  return Model(ModelConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None))


def export_run(checkpoint: pathlib.Path, output: pathlib.Path, run: str | None = None, *, merge: bool = False,
               save_dtype: str = "float32") -> tuple[str, str]:
  """Writes one run's weights, with config and tokenizer; returns the run's name, and what rounding did to the weights.

  An adapter is written as a PEFT folder, or merged into its base, in fp32. Nothing is said of float32, which rounds
  nothing.

  Args:
    checkpoint: a step's folder, such as WORKDIR/checkpoints/unlearn/000040.
    output: a folder that does not exist yet.
    run: which of the stacked runs, such as "U-7-0"; may be left out where there is one.
    merge: write base and adapter as one model.
    save_dtype: of the weights that are written: float32, as they were trained, or bfloat16.

  Raises:
    InputError: no complete checkpoint, no such run, an output that holds something, `merge` of a checkpoint without
      adapters, another `save_dtype`, or one that rounds an adapter.
  """
  if save_dtype not in DTYPES:
    raise InputError(f"is {save_dtype!r}", field="--save_dtype", mend=f"expected {' or '.join(DTYPES)}")
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
  if lora is not None and not merge and save_dtype != "float32":
    raise InputError(f"is {save_dtype}, and an adapter is written as it was trained", file=checkpoint,
                     field="--save_dtype", mend="leave it out, or give --merge")
  saved = model.abstract() if lora is None else jax.eval_shape(lambda: init_lora(model, lora, jax.random.key(0)))
  one = jax.tree.map(lambda leaf: leaf[names.index(run)], checkpoints.load_tree(checkpoint, saved, len(names)))
  if lora is not None and not merge:
    export_peft(one, model, lora, output, base=str(source))
    return run, ""
  if lora is not None:
    one = merge_lora(load_params(check_checkpoint(source), model), one, lora.scale)
  told = ""
  if save_dtype != "float32":
    told = rounding(one, _before(checkpoint, about, model, run), save_dtype, "--save_dtype")
  export(one, model, output, source=source, dtype=DTYPES[save_dtype])
  return run, told


def _before(checkpoint: pathlib.Path, about: dict[str, Any], model: Model, run: str
            ) -> Iterable[tuple[str, Any]] | None:
  """Path and value of the weights that a run's stage began from; None where they are not at hand."""
  if about["tokenizer"] != checkpoints.TOKENIZER:  # a job's, which began from the model that brought its tokenizer
    return read_leaves(check_checkpoint((checkpoint / about["tokenizer"]).resolve()), model)
  first = checkpoints.step_path(checkpoint.parent, 0)
  names = checkpoints.describe(first)["runs"] if checkpoints.is_saved(first) else []
  if run not in names:
    return None
  one = jax.tree.map(lambda leaf: leaf[names.index(run)], checkpoints.load_tree(first, model.abstract(), len(names)))
  return flatten(one).items()


def lora_of(about: dict[str, Any]) -> LoraConfig | None:
  """The form of the adapters that a checkpoint holds; None where it holds whole models."""
  values = about.get("lora")
  return None if values is None else LoraConfig(values["rank"], values["alpha"], tuple(values["targets"]))
