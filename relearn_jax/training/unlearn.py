"""`relearn unlearn`: one checkpoint unlearns one forget set, and is written as a Hugging Face folder."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relearn_jax.cases.files import read_texts
from relearn_jax.data.order import small_batches
from relearn_jax.data.texts import encode_rows, stack_rows
from relearn_jax.data.tokens import check_chat_template
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked, load_params
from relearn_jax.models.export import export
from relearn_jax.models.lora import check_lora, export_peft, init_lora, merge_lora
from relearn_jax.models.model import Model, Params
from relearn_jax.models.sources import open_checkpoint
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.methods import get_method
from relearn_jax.parallel.mesh import check_mesh, make_mesh, repeat_runs, to_host
from relearn_jax.training import checkpoints
from relearn_jax.training.job import UnlearnJob, check_job
from relearn_jax.training.log import TrainLog
from relearn_jax.training.settings import DTYPES, compute_dtype, make_model
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.step import NOTHING, Frozen, TrainState
from relearn_jax.workdir import claim_workdir, only_process

STAGE, RUN = "unlearn", "U"


def default_mesh() -> str:
  """All accelerators share the model; on CPU one device, which uses all cores."""
  return "fsdp:1" if jax.default_backend() == "cpu" else "fsdp:-1"


def learning_rates(job: UnlearnJob, step: int) -> float:
  """What the learning rate is multiplied with at a step, counted from 0, as transformers' schedulers do it.

  step / warmup_steps during warmup (0 at the very first step); then 1, or with t the share of the steps
  after warmup that are done, 1 - t or (1 + cos(pi t)) / 2.
  """
  if step < job.warmup_steps:
    return step / job.warmup_steps
  share = (step - job.warmup_steps) / (job.steps - job.warmup_steps)
  return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[job.schedule]


def unlearn(job: UnlearnJob, where: str, workdir: pathlib.Path, mesh: str | None = None) -> bool:
  """Runs or continues a job; returns False where nothing was left to do.

  Writes `model/` (a Hugging Face folder; an adapter is merged into it), `adapter/` (a PEFT folder, where one is
  trained), `checkpoints/unlearn/<step>/`, `train_log.jsonl` (a row a step) and `config.json` into `workdir`.

  Args:
    job: what to do.
    where: the file it came from, for messages.
    workdir: with another configuration in it, it is refused.
    mesh: sizes of the axes; see `default_mesh`.

  Raises:
    InputError: anything that is wrong with the settings, the checkpoint or the rows, before a device is
      used; or weights that are no longer finite at the end.
  """
  check_job(job, where)
  checked, tokenizer = open_checkpoint(job.model, "model")
  rows = _read_rows(job, checked, tokenizer)
  if lora := job.adapter.lora():
    check_lora(Model(checked.config), lora, where, "adapter")
  if mesh is not None:
    check_mesh(mesh, checked.config)
  known = claim_workdir(workdir, job)
  with only_process(workdir):
    if known and (workdir / "model").is_dir():
      checkpoints.remove_resumes(workdir / "checkpoints")
      return False
    sizes = check_mesh(default_mesh() if mesh is None else mesh, checked.config)
    _train(job, where, workdir, checked, rows, make_mesh(sizes, config=checked.config))
  return True


def _read_rows(job: UnlearnJob, checked: Checked, tokenizer: Any) -> dict[str, TokenRows]:
  """The data sets that the method reads, of one run."""
  if job.chat_template:
    check_chat_template(tokenizer, checked.path, "chat_template")
  objective = get_method(job.method).build(dataclasses.asdict(job.hyper))
  found = {}
  for name in sorted(objective.rows):
    path = pathlib.Path(getattr(job, name))
    rows = encode_rows(tokenizer, read_texts(path), path, checked.config.max_positions, chat=job.chat_template)
    found[name] = stack_rows(rows, 1)
  return found


def _train(job: UnlearnJob, where: str, workdir: pathlib.Path, checked: Checked, rows: dict[str, TokenRows],
           mesh: Mesh) -> None:
  lora, dtype, method = job.adapter.lora(), compute_dtype(job.dtype, where), get_method(job.method)
  model = make_model(checked, job, dtype)
  frozen = NOTHING if lora is None else Frozen(shared=load_params(checked, model, dtype=dtype, mesh=mesh))

  def start() -> Params:
    one = load_params(checked, model, mesh=mesh) if lora is None else init_lora(model, lora, jax.random.key(job.seed))
    return repeat_runs(one, 1, mesh, model.axes())

  def on_keep(step: int, state: TrainState) -> bool:
    if job.keep_every:
      path = checkpoints.step_path(workdir / "checkpoints" / STAGE, step)
      if not checkpoints.is_saved(path):
        about = checkpoints.description(model, [RUN], STAGE, step, tokenizer=str(checked.path.resolve()), lora=lora)
        checkpoints.save_tree(path, state.params, 1, about)
    if step == job.steps:
      _export(job, workdir, checked, model, to_host(state.params, 1), mesh)
    return False

  hyper = {"learning_rate": job.learning_rate, "weight_decay": job.weight_decay,
           **{name: getattr(job.hyper, name) for name in method.hyper}}
  every = job.keep_every or job.steps
  stage = Stage(
      STAGE, [RUN], method.build, rows, hyper, sorted({*range(every, job.steps, every), job.steps}),
      small_batches(rows, job.batch_size, [job.seed]), job.num_microbatches, lambda step: learning_rates(job, step))
  run_stage(stage, model, start, mesh, workdir / "checkpoints" / STAGE, TrainLog(workdir / "train_log.jsonl"),
            on_keep=on_keep, save_every=job.checkpoint_seconds, frozen=frozen)


def _export(job: UnlearnJob, workdir: pathlib.Path, checked: Checked, model: Model, trained: Params, mesh: Mesh
            ) -> None:
  """Writes what was trained, `[1, ...]` on the host; `model/` comes last, since it says that the job is done."""
  one = jax.tree.map(lambda leaf: leaf[0], trained)
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(one)):
    raise InputError("led to weights that are NaN or infinite", file=workdir / "config.json", field="learning_rate",
                     mend=f"lower it (it is {job.learning_rate:g}), or take fewer steps")
  if lora := job.adapter.lora():
    if not (workdir / "adapter").exists():
      export_peft(one, model, lora, workdir / "adapter", base=job.model)
    # Merged into the base in fp32: the copy that was trained on may be in fewer bits than what it learned needs.
    one = merge_lora(load_params(checked, model, mesh=mesh), one, lora.scale)
  export(one, model, workdir / "model", source=checked.path, dtype=DTYPES[job.save_dtype])
