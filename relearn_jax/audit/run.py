"""The names audit from an empty folder to a report, in stages that can each be killed and run again.

Every stage leaves files behind that say it is done: `checkpoints/` holds weights, and under
`checkpoints/scores/` what the models answered. The results are a pure function of those.
"""

import contextlib
import pathlib
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit import base
from relearn_jax.audit.arms import Cell, Run, all_cases, all_runs, mean_asr, select_points
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.evaluate import Interviewer, Scores, once
from relearn_jax.cases.base import Case, Text
from relearn_jax.data.rows import encode, stack_runs
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.model import Model, Params, unroll
from relearn_jax.models.sources import load_tokenizer
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, shard_runs
from relearn_jax.progress import progress
from relearn_jax.training import checkpoints
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import OnKeep, Stage, run_stage
from relearn_jax.training.step import StepLog


class Audit:
  """What the stages share: the configuration, the folder, the base model, cases as token rows."""

  def __init__(self, config: AuditConfig, workdir: pathlib.Path, mesh: Mesh | None = None):
    self.config, self.workdir = config, workdir
    self.checkpoints = workdir / "checkpoints"
    self.scores = self.checkpoints / "scores"
    self.log = TrainLog(workdir / "train_log.jsonl")
    self.mesh = mesh or runs_mesh()
    self.runs = all_runs(config)
    self.cases: dict[Run, Case] = all_cases(config)

  def load_base(self, cache: pathlib.Path) -> None:
    """Takes the base from the workdir, else from the cache, else trains it."""
    config, folder = self.config.base, self.checkpoints / "base"
    if not folder.exists():
      self.log.truncate("pretrain", 0)
      with self.log.stage("pretrain", 1) as rows, contextlib.ExitStack() as bars:
        bar = None

        def on_step(step: int, report: StepLog, learning_rate: float, batch: np.ndarray) -> None:
          nonlocal bar
          bar = bar or bars.enter_context(progress(config.steps, "pretrain"))  # none for a base from the cache
          rows.add(step, report, learning_rate, int(np.count_nonzero(batch)), batch.size)
          bar.update(1)
        cached = base.cached_base(config, cache, on_step)
      self.checkpoints.mkdir(parents=True, exist_ok=True)
      base.copy_base(cached, folder)
    checked = check_checkpoint(folder)
    self.tokenizer = load_tokenizer(folder, checked.config)
    self.model = Model(checked.config, unroll=unroll(checked.config))
    self.base_params = load_params(checked, self.model)
    evaluate = self.config.evaluate
    most = max(len(self.runs), len(self.config.case.variants) * (2 * self.config.unlearn.depths + 1))
    self.ask = Interviewer(
        self.model, self.tokenizer, self.cases[self.runs[0]].questions, self.mesh,
        max_new_tokens=evaluate.max_new_tokens, buckets=evaluate.buckets,
        runs_per_call=min(evaluate.runs_per_call, most))

  def token_rows(self, runs: Sequence[Run], select: Callable[[Case], Sequence[Text]], *, relabelled: bool = False
                 ) -> TokenRows:
    """A corpus of several runs' cases, `[runs, rows, length]`; with the anchors replaced in the labels, if asked."""
    anchors = lambda run: dict(self.cases[run].anchors) if relabelled else None
    return stack_runs([[encode(self.tokenizer, row, anchors(run)) for row in select(self.cases[run])] for run in runs])

  def unlearn_rows(self, runs: Sequence[Run], names: Collection[str]) -> dict[str, TokenRows]:
    """The data sets that an unlearning method reads, by the names that objectives have for them."""
    made: dict[str, Callable[[], TokenRows]] = {
        "forget": lambda: self.token_rows(runs, lambda case: case.forget),
        "retain": lambda: self.token_rows(runs, lambda case: case.retain),
        "idk": lambda: self.token_rows(runs, lambda case: case.refusals),
        "alternate": lambda: self.token_rows(runs, lambda case: case.alternates),
        "relabelled": lambda: self.token_rows(runs, lambda case: case.forget, relabelled=True)}
    return {name: made[name]() for name in sorted(names)}

  def score(self, name: str, params: Params, runs: Sequence[Run]) -> Scores:
    """The answers of stacked models, once; on a second call from `checkpoints/scores/`."""
    retain = self.token_rows(runs, lambda case: case.retain)
    return once(self.scores / f"{name}.npz", lambda: self.ask(params, retain, len(runs)))

  def save_params(self, stage: str, step: int, params: Params, names: Sequence[str]) -> None:
    """Keeps a step's parameters, unless they are there."""
    path = checkpoints.step_path(self.checkpoints / stage, step)
    if not checkpoints.is_saved(path):
      about = checkpoints.description(self.model, list(names), stage, step)
      checkpoints.save_tree(path, params, len(names), about)

  def load_kept(self, stage: str, step: int, num_runs: int) -> Params:
    """A kept step's parameters on the host, `[runs, ...]`."""
    path = checkpoints.step_path(self.checkpoints / stage, step)
    return checkpoints.load_tree(path, self.base_params, num_runs)


def memorize(audit: Audit) -> None:
  """All runs learn their case; the result is step 0 of the unlearning trajectory."""
  config, names = audit.config.memorize, [run.name for run in audit.runs]
  if checkpoints.is_saved(checkpoints.step_path(audit.checkpoints / "unlearn", 0)):
    return
  stage = Stage(
      "memorize", names, lambda hyper: nll("memorize"),
      {"memorize": audit.token_rows(audit.runs, lambda case: case.memorize)},
      {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay},
      keep=every(config.steps, 25))

  def on_keep(step: int, params: Params) -> bool:
    if step == config.steps:
      audit.save_params("unlearn", 0, params, names)
    return False
  start = lambda: repeat_runs(audit.base_params, len(names), audit.mesh, audit.model.axes())
  run_audit_stage(audit, stage, start, on_keep)


def unlearn(audit: Audit) -> dict[Run, dict[int, float]]:
  """All runs unlearn until every U run has been kept at its last depth; returns their curves.

  Returns:
    Attack success of every U run at each kept step, step 0 included.
  """
  config, recipe = audit.config.unlearn, audit.config.recipe
  names, settings = [run.name for run in audit.runs], audit.config.method_config
  u_runs = [run for run in audit.runs if run.arm == "U"]
  curves: dict[Run, dict[int, float]] = {run: {} for run in u_runs}

  def ask(step: int, params: Params) -> bool:
    some = jax.tree.map(lambda leaf: leaf[:len(u_runs)], params)  # U runs come first
    scores = audit.score(f"unlearn-{step:06d}", some, u_runs)
    for run, value in zip(u_runs, mean_asr(scores.asr), strict=True):
      curves[run][step] = float(value)
    points = select_points(curves, config.max_asr, config.depths)
    return all(len(steps) == config.depths for steps in points.values())

  def done() -> bool:
    """Reads the curves of a stage that ended before; they decide where it ended."""
    for path in sorted(audit.scores.glob("unlearn-*.npz")):
      if ask(int(path.stem.split("-")[1]), {}):
        return True
    return bool(curves[u_runs[0]]) and max(curves[u_runs[0]]) == keep[-1]

  keep = every(config.max_steps, config.keep_every)
  if done():
    return curves
  memorized = audit.load_kept("unlearn", 0, len(names))
  audit.score("memorize", shard_runs(memorized, audit.mesh), audit.runs)
  ask(0, memorized)

  def on_keep(step: int, params: Params) -> bool:
    audit.save_params("unlearn", step, params, names)
    return ask(step, params)

  start = lambda: shard_runs(memorized, audit.mesh)
  stage = Stage(
      "unlearn", names, recipe.build, audit.unlearn_rows(audit.runs, recipe.objective.rows),
      {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay, **recipe.traced}, keep)
  run_audit_stage(audit, stage, start, on_keep, lambda: reinforce(audit, start, audit.config, audit.runs, names))
  return curves


def reinforce(audit: Audit, start: Callable[[], Params], config: AuditConfig, runs: Sequence[Run],
              names: Sequence[str], name: str = "reinforce") -> Params:
  """Runs learn their forget set even better: the second model that some methods compare with.

  Args:
    audit: what is shared.
    start: gives the models before it.
    config: with the method's settings.
    runs: whose forget sets.
    names: of the runs, in checkpoints.
    name: of the stage.
  """
  recipe = config.recipe
  steps = int(recipe.hyper["reinforce_steps"])
  if not checkpoints.is_saved(checkpoints.step_path(audit.checkpoints / name, steps)):
    stage = Stage(
        name, names, lambda hyper: nll("forget"), audit.unlearn_rows(runs, ["forget"]),
        {"learning_rate": recipe.hyper["reinforce_learning_rate"], "weight_decay": config.method_config.weight_decay},
        [steps])

    def on_keep(step: int, params: Params) -> bool:
      audit.save_params(name, step, params, names)
      return False
    run_audit_stage(audit, stage, start, on_keep)
  return shard_runs(audit.load_kept(name, steps, len(names)), audit.mesh)


def relearn(audit: Audit, seed: int, cells: Sequence[Cell]) -> None:
  """The attack on everything of one seed: every arm and depth gets the same batches and steps."""
  config, runs = audit.config.relearn, [cell.run for cell in cells]
  names, stage_name = [cell.name for cell in cells], f"relearn-seed{seed}"
  last = config.keep_steps[-1]
  if (audit.scores / f"{stage_name}-{last:06d}.npz").exists():
    return

  def start() -> Params:
    return shard_runs(_gather(audit, cells), audit.mesh)

  def on_keep(step: int, params: Params) -> bool:
    if step == last:
      audit.save_params(stage_name, step, params, names)
    audit.score(f"{stage_name}-{step:06d}", params, runs)
    return False

  audit.score(f"{stage_name}-{0:06d}", start(), runs)
  stage = Stage(
      stage_name, names, lambda hyper: nll("relearn"),
      {"relearn": audit.token_rows(runs, lambda case: case.relearn_sets[0].rows)},
      {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}, config.keep_steps)
  run_audit_stage(audit, stage, start, on_keep)


def run_audit_stage(audit: Audit, stage: Stage, start: Callable[[], Params], on_keep: OnKeep,
                    reinforced: Callable[[], Params] | None = None, *, resume: bool = True) -> None:
  """`run_stage` in an audit's folder; without `resume` a stage that was killed begins anew."""
  run_stage(stage, audit.model, start, audit.mesh, audit.checkpoints / stage.name, audit.log,
            on_keep=on_keep, save_every=audit.config.checkpoint_seconds if resume else float("inf"),
            reinforced=reinforced)


def _gather(audit: Audit, cells: Sequence[Cell]) -> Params:
  """The weights that each cell starts from, `[cells, ...]`, picked from the trajectory."""
  out = jax.tree.map(lambda leaf: np.empty((len(cells), *leaf.shape), leaf.dtype), audit.base_params)
  for step in sorted({cell.unlearn_step for cell in cells}):
    kept = audit.load_kept("unlearn", step, len(audit.runs))
    here = [i for i, cell in enumerate(cells) if cell.unlearn_step == step]
    source = [audit.runs.index(cells[i].run) for i in here]

    def pick(to: np.ndarray, leaf: np.ndarray, here: list[int] = here, source: list[int] = source) -> None:
      to[here] = leaf[source]
    jax.tree.map(pick, out, kept)
  return out


def every(last: int, interval: int) -> list[int]:
  """Steps interval, 2 * interval, ... and the last."""
  return sorted({*range(interval, last + 1, interval), last})
