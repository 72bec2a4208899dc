"""`relearn unlearn`: one checkpoint unlearns one forget set, and is written as a Hugging Face folder."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relearn_jax.data.order import Order, small_batches
from relearn_jax.data.packing import num_packed, packing_line, sequences_of
from relearn_jax.data.prepared import PreparedRows
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked, load_params, read_leaves, tensors_digest, weights_digest
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.export import export, rounding
from relearn_jax.models.lora import check_lora, export_peft, init_lora, merge_lora
from relearn_jax.models.model import Model, Params, whole
from relearn_jax.models.precision import DTYPES, compute_dtype
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import (
  check_mesh,
  make_mesh,
  map_runs,
  repeat_runs,
  row_shards,
  shard_rows,
  to_first,
  to_host,
)
from relearn_jax.parallel.processes import agree, is_alone, is_first
from relearn_jax.training import checkpoints
from relearn_jax.training.ended import AllEnded, Ended, Ledger, finite_runs
from relearn_jax.training.job import PATHS, UnlearnJob, check_job
from relearn_jax.training.log import TrainLog
from relearn_jax.training.references import ReferenceCache, rows_digest
from relearn_jax.training.stage import OnKeep, Stage, run_stage
from relearn_jax.training.step import NOTHING, Frozen, model_outputs
from relearn_jax.training.streams import Stream
from relearn_jax.training.train_settings import make_model, rate_share
from relearn_jax.training.unlearn_rows import input_files, read_rows
from relearn_jax.workdir import check_inputs_alike, claim_workdir, file_digests, is_claimed, only_process

STAGE, RUN, REINFORCE = "unlearn", "U", "reinforce"


def default_mesh() -> str:
  """All accelerators share the model, and so do several processes; on CPU one device, which uses all cores."""
  return "fsdp:1" if jax.default_backend() == "cpu" and is_alone() else "fsdp:-1"


def unlearn(job: UnlearnJob, where: str, workdir: pathlib.Path, mesh: str | None = None) -> bool:
  """Runs or continues a job; returns False where nothing was left to do.

  Writes `model/` (a Hugging Face folder; an adapter is merged into it), `adapter/` (a PEFT folder, where one is
  trained), `checkpoints/unlearn/<step>/`, `train_log.jsonl` (a row a step), `config.json` and `inputs.json` (digests
  of the files that were read) into `workdir`.

  Args:
    job: what to do.
    where: the file it came from, for messages.
    workdir: with another configuration in it, or begun with other contents of files, it is refused.
    mesh: sizes of the axes; see `default_mesh`.

  Raises:
    InputError: anything that is wrong with the settings, the checkpoint or the rows, before a device is
      used; or a loss, a gradient or a weight that is not finite, by stage and step (no model is written then).
  """
  check_job(job, where)
  checked, tokenizer = open_checkpoint(job.model, "model")
  rows = read_rows(job, checked, tokenizer)
  if lora := job.adapter.lora():
    check_lora(Model(checked.config), lora, where, "adapter")
  if mesh is not None:
    check_mesh(mesh, checked.config)
  done, claimed = agree(lambda: [(workdir / name).exists() for name in ("model", "config.json")])
  if done and not claimed:
    raise InputError("is there, without the configuration that it was made by", file=workdir / "model",
                     field="--workdir", mend="give another folder")
  inputs = file_digests(input_files(job, checked))
  check_inputs_alike(lambda: inputs)
  is_claimed(workdir, job, inputs, PATHS)  # before statistics of other rows are found wanting
  if not done:
    cache = _cache(job, workdir, checked, rows)
    if job.dtype == "auto":  # the recipe holds the precision, which then depends on the device
      cache.check("rows", "weights", "needs")
    else:
      dataclasses.replace(cache, recipe=_recipe(job, where)).check()
  known = claim_workdir(workdir, job, inputs, PATHS)
  with only_process(workdir):
    if known and done:
      checkpoints.remove_resumes(workdir / "checkpoints")
      return False
    cache = dataclasses.replace(cache, recipe=_recipe(job, where))
    cache.check()
    sizes = check_mesh(default_mesh() if mesh is None else mesh, checked.config)
    _train(job, where, workdir, checked, rows, make_mesh(sizes, config=checked.config), cache)
  return True


def _cache(job: UnlearnJob, workdir: pathlib.Path, checked: Checked, rows: Mapping[str, TokenRows | PreparedRows]
           ) -> ReferenceCache:
  """Where statistics of the model before unlearning are kept, and which rows and weights they are made from."""
  needs = job.recipe.objective.needs
  folder = pathlib.Path(job.references) if job.references else workdir / "checkpoints" / "references"
  wanted = {need.rows for need in needs}
  digests = {name: rows_digest(held) for name, held in rows.items() if name in wanted and isinstance(held, TokenRows)}
  return ReferenceCache(folder, needs, digests, weights_digest(checked) if needs else "", "")


def _recipe(job: UnlearnJob, where: str) -> str:
  """What else decides the statistics: precision, and how a second model is reinforced."""
  recipe, how = job.recipe, {"dtype": jnp.dtype(compute_dtype(job.dtype, where)).name}
  if job.attention != "auto":
    how |= {"attention": job.attention}
  if recipe.published.reinforces:
    how |= {key: f"{recipe.hyper[key]:g}" for key in ("reinforce_steps", "reinforce_learning_rate")}
    how |= {key: str(getattr(job, key)) for key in ("adapter", "batch_size", "seed", "weight_decay")}
  return json.dumps(how, sort_keys=True)


def _train(job: UnlearnJob, where: str, workdir: pathlib.Path, checked: Checked,
           rows: Mapping[str, TokenRows | PreparedRows], mesh: Mesh, cache: ReferenceCache) -> None:
  lora, dtype, recipe = job.adapter.lora(), compute_dtype(job.dtype, where), job.recipe
  model = make_model(checked, job, dtype, job.attention)
  frozen = NOTHING if lora is None else Frozen(shared=load_params(checked, model, dtype=dtype, mesh=mesh))

  def start() -> Params:
    one = load_params(checked, model, mesh=mesh) if lora is None else init_lora(model, lora, jax.random.key(job.seed))
    return repeat_runs(one, 1, mesh, model.axes())

  def on_keep(step: int, params: Params) -> bool:
    if job.keep_every:
      path = checkpoints.step_path(workdir / "checkpoints" / STAGE, step)
      if not checkpoints.is_saved(path):
        about = checkpoints.description(model, [RUN], STAGE, step, tokenizer=str(checked.path.resolve()), lora=lora)
        checkpoints.save_tree(path, params, 1, about)
    if step == job.steps:
      _check_outputs(job, model, params, rows.get("forget", rows[min(rows)]), mesh, frozen)  # not all methods read it
      _export(job, workdir, checked, model, params, mesh)
    return False

  log, decay = TrainLog(workdir / "train_log.jsonl"), {"weight_decay": job.weight_decay}
  orders = _orders(job, rows)

  def run(stage: Stage, on_keep: OnKeep, field: str, **more: Any) -> None:
    folder = workdir / "checkpoints" / stage.name
    run_stage(stage, model, start, mesh, folder, log, on_keep=on_keep, save_every=job.checkpoint_seconds, frozen=frozen,
              ledger=Ledger(folder, stage.name, stage.runs, field, stage.hyper["learning_rate"]), **more)

  def reinforced() -> Params:
    """The model after learning the forget set even better; kept, since its making may be killed."""
    steps, kept = int(recipe.hyper["reinforce_steps"]), []
    path = checkpoints.step_path(workdir / "checkpoints" / REINFORCE, steps)
    like = start()
    if checkpoints.is_saved(path):
      return checkpoints.restore(path, like, 1)
    del like

    def on_keep(step: int, params: Params) -> bool:
      about = checkpoints.description(model, [RUN], REINFORCE, step, tokenizer=str(checked.path.resolve()), lora=lora)
      checkpoints.save_tree(path, params, 1, about)
      kept.append(params)
      return False
    run(Stage(REINFORCE, [RUN], lambda _: nll("forget"), {"forget": rows["forget"]},
              {"learning_rate": recipe.hyper["reinforce_learning_rate"], **decay}, [steps],
              {name: order for name, order in orders.items() if name == "forget"}, job.num_microbatches), on_keep,
        f"methods.{job.method}.reinforce_learning_rate")
    return kept[0]

  every = job.keep_every or job.steps
  stage = Stage(
      STAGE, [RUN], recipe.build, rows, {"learning_rate": job.learning_rate, **decay, **recipe.traced},
      sorted({*range(every, job.steps, every), job.steps}), orders, job.num_microbatches,
      lambda step: rate_share(job, job.steps, step))
  run(stage, on_keep, "learning_rate", reinforced=reinforced if recipe.published.reinforces else None, cache=cache)


def _orders(job: UnlearnJob, rows: Mapping[str, TokenRows | PreparedRows]) -> dict[str, list[Order]]:
  """An order of each data set that steps do not see whole; what packing has brought is said."""
  orders: dict[str, list[Order]] = {}
  for name, held in rows.items():
    if isinstance(held, PreparedRows):
      orders[name] = [Order(len(held), min(job.batch_size, len(held)), job.seed)]
      continue
    size = job.batch_size
    if held.segments is not None:
      size = sequences_of(size, num_packed(held), held.tokens.shape[1])
      if is_first():
        print(packing_line(name, held))
    orders |= small_batches({name: held}, size, [job.seed])
  return orders


def _check_outputs(job: UnlearnJob, model: Model, params: Params, forget: TokenRows | PreparedRows, mesh: Mesh,
                   frozen: Frozen) -> None:
  """Raises `AllEnded` unless log-probabilities after the last update, which no loss has seen, are finite."""
  def one(run: tuple[Params, Params | None, TokenRows], shared: Params | None) -> jax.Array:
    params, own, rows = run
    return jnp.where(rows.mask > 0, model_outputs(model, whole(params, own, shared), rows).logprobs, 0.0)
  size = -(-job.batch_size // job.num_microbatches)  # as many rows as there is memory for
  if isinstance(forget, PreparedRows):
    stream = Stream(forget, [Order(len(forget), min(size, len(forget)), job.seed)], mesh, row_shards(mesh), 1)
    some = stream.lay(stream.read(0))
  else:
    some = shard_rows(jax.tree.map(lambda leaf: leaf[:, :size], forget), mesh)
  finite = finite_runs(jax.jit(map_runs(one, mesh))((params, frozen.own, some), frozen.shared))
  if not to_host(finite, 1)[0]:
    raise AllEnded([Ended(RUN, STAGE, job.steps, "answers")], "learning_rate", job.learning_rate)


def _export(job: UnlearnJob, workdir: pathlib.Path, checked: Checked, model: Model, trained: Params, mesh: Mesh
            ) -> None:
  """Writes what was trained, `[1, ...]` on the mesh; `model/` comes last, since it says that the job is done."""
  if lora := job.adapter.lora():
    adapter = jax.tree.map(lambda leaf: leaf[0], to_host(trained, 1))
    if is_first() and not (workdir / "adapter").exists():
      export_peft(adapter, model, lora, workdir / "adapter", base=job.model, base_fingerprint=tensors_digest(checked),
                  field="--workdir")
    # Merged into the base in fp32: the copy that was trained on may be in fewer bits than what it learned needs.
    one = to_first(merge_lora(load_params(checked, model, mesh=mesh), adapter, lora.scale))
  else:
    one = jax.tree.map(lambda leaf: leaf[0], to_first(trained, 1))
  before = ((path, to_first(leaf)) for path, leaf in read_leaves(checked, model, mesh=mesh))
  rounds = job.save_dtype != "float32"
  if not is_first():
    for _ in before if rounds else ():
      pass  # takes part in what process 0 asks for
    return
  if rounds:
    print(rounding(one, before, job.save_dtype, "--config.save_dtype"))
  export(one, model, workdir / "model", source=checked.path, dtype=DTYPES[job.save_dtype], field="--workdir")
