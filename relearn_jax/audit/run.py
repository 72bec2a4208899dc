"""The names audit from an empty folder to a report, in stages that can each be killed and run again.

Every stage leaves files behind that say it is done: `checkpoints/` holds weights, and under
`checkpoints/scores/` what the models answered. The results are a pure function of those.
"""

import contextlib
import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit import base
from relearn_jax.audit.arms import Cell, Run, all_cases, all_runs, attacked_cells, mean_asr, select_points
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.evaluate import Interviewer, Scores, finite_by_name, once
from relearn_jax.cases.base import Case, Text
from relearn_jax.data.rows import Encoded, stack_runs
from relearn_jax.data.texts import encode_texts
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.model import Model, Params, unroll
from relearn_jax.models.sources import load_tokenizer
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, shard_runs
from relearn_jax.progress import progress
from relearn_jax.training import checkpoints
from relearn_jax.training.ended import Ended, Ledger, read_ended
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
      ledger = Ledger(self.checkpoints / "pretrain", "pretrain", ["base"], "base.learning_rate", config.learning_rate)
      ledger.rewind(0)
      with self.log.stage("pretrain", ledger) as rows, contextlib.ExitStack() as bars:
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
    def encode(case: Case) -> list[Encoded]:
      return encode_texts(self.tokenizer, select(case), case.name, self.model.config.max_positions,
                          anchors=dict(case.anchors) if relabelled else None)
    return stack_runs([encode(self.cases[run]) for run in runs])

  def unlearn_rows(self, runs: Sequence[Run], names: Collection[str]) -> dict[str, TokenRows]:
    """The data sets that an unlearning method reads, by the names that objectives have for them."""
    made: dict[str, Callable[[], TokenRows]] = {
        "forget": lambda: self.token_rows(runs, lambda case: case.forget),
        "retain": lambda: self.token_rows(runs, lambda case: case.retain),
        "idk": lambda: self.token_rows(runs, lambda case: case.refusals),
        "alternate": lambda: self.token_rows(runs, lambda case: case.alternates),
        "relabelled": lambda: self.token_rows(runs, lambda case: case.forget, relabelled=True)}
    return {name: made[name]() for name in sorted(names)}

  def ledger(self, stage: str, names: Sequence[str], field: str, rates: Any, idle: Iterable[str] = ()) -> Ledger:
    """Of the runs that end in a stage; see `training.ended.Ledger`."""
    return Ledger(self.checkpoints / stage, stage, names, field, rates, idle)

  def ended(self, stage: str) -> dict[str, Ended]:
    """Name of a run -> how it ended in a stage."""
    return read_ended(self.checkpoints / stage)

  def gone(self) -> dict[Run, int]:
    """Runs that have ended -> unlearn step from which there is no model of theirs; 0: not even one that memorised."""
    before, reinforced, unlearned = (self.ended(stage) for stage in ("memorize", "reinforce", "unlearn"))
    return {run: 0 if run.name in before else 1 if run.name in reinforced else unlearned[run.name].step
            for run in self.runs if run.name in before or run.name in reinforced or run.name in unlearned}

  def score(self, name: str, params: Params, runs: Sequence[Run], relearn: TokenRows | None = None) -> Scores:
    """The answers of stacked models, once; on a second call from `checkpoints/scores/`."""
    retain = self.token_rows(runs, lambda case: case.retain)
    return once(self.scores / f"{name}.npz", lambda: self.ask(params, retain, len(runs), relearn=relearn))

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
  """All runs learn their case, and are asked; the result is step 0 of the unlearning trajectory."""
  config, names = audit.config.memorize, [run.name for run in audit.runs]
  ledger = audit.ledger("memorize", names, "memorize.learning_rate", config.learning_rate)

  def ask(params: Params) -> None:
    ledger.look(config.steps, "answers", finite_by_name(names, audit.score("memorize", params, audit.runs)))
  if checkpoints.is_saved(checkpoints.step_path(audit.checkpoints / "unlearn", 0)):
    asked = (audit.scores / "memorize.npz").exists()
    return ask({} if asked else shard_runs(audit.load_kept("unlearn", 0, len(names)), audit.mesh))
  stage = Stage(
      "memorize", names, lambda hyper: nll("memorize"),
      {"memorize": audit.token_rows(audit.runs, lambda case: case.memorize)},
      {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay},
      keep=every(config.steps, 25))

  def on_keep(step: int, params: Params) -> bool:
    if step == config.steps:
      audit.save_params("unlearn", 0, params, names)
      ask(params)
    return False
  start = lambda: repeat_runs(audit.base_params, len(names), audit.mesh, audit.model.axes())
  run_audit_stage(audit, stage, start, on_keep, ledger)


def unlearn(audit: Audit) -> dict[Run, dict[int, float]]:
  """All runs unlearn until every U run that has not ended has been kept at its last depth; returns their curves.

  A run that is there, and its control, are used no further: what becomes of them then does not matter.

  Returns:
    Attack success of every U run at each kept step at which it had not ended, step 0 included.
  """
  config, recipe = audit.config.unlearn, audit.config.recipe
  names, settings = [run.name for run in audit.runs], audit.config.method_config
  u_runs = [run for run in audit.runs if run.arm == "U"]
  curves: dict[Run, dict[int, float]] = {run: {} for run in u_runs}
  ledger = audit.ledger("unlearn", names, f"methods.{audit.config.method}.learning_rate", settings.learning_rate,
                        {*audit.ended("memorize"), *audit.ended("reinforce")})

  def ask(step: int, params: Params) -> bool:
    some = jax.tree.map(lambda leaf: leaf[:len(u_runs)], params)  # U runs come first
    scores = audit.score(f"unlearn-{step:06d}", some, u_runs)
    ledger.look(step, "answers", finite_by_name([run.name for run in u_runs], scores))
    for run, value, finite in zip(u_runs, mean_asr(scores.asr), scores.finite, strict=True):
      if finite and not ledger.has_ended(run.name, step):
        curves[run][step] = float(value)
    # As it is at this step: what is on disk from before a kill may know more.
    gone = {run: 0 for run in u_runs if ledger.has_ended(run.name, step)}
    points = select_points(curves, config.max_asr, config.depths, gone)
    there = [run for run in u_runs if len(points[run.variant, run.seed]) == config.depths
             and points[run.variant, run.seed][-1] <= step]
    ledger.finish(Run(run.variant, run.seed, arm).name for run in there for arm in ("U", "N"))
    return len(there) + len(gone) == len(u_runs)

  def done() -> bool:
    """Reads the curves of a stage that ended before; they decide where it ended."""
    steps = sorted(int(path.stem.split("-")[1]) for path in audit.scores.glob("unlearn-*.npz"))
    return any(ask(step, {}) for step in steps) or steps[-1:] == keep[-1:]

  keep = every(config.max_steps, config.keep_every)
  if done():
    return curves
  memorized = audit.load_kept("unlearn", 0, len(names))
  ask(0, memorized)

  def on_keep(step: int, params: Params) -> bool:
    audit.save_params("unlearn", step, params, names)
    return ask(step, params)

  def reinforced() -> Params:
    params = reinforce(audit, start, audit.config, audit.runs, names, idle=audit.ended("memorize"))
    ledger.ignore(audit.ended("reinforce"))
    return params

  start = lambda: shard_runs(memorized, audit.mesh)
  stage = Stage(
      "unlearn", names, recipe.build, audit.unlearn_rows(audit.runs, recipe.objective.rows),
      {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay, **recipe.traced}, keep)
  run_audit_stage(audit, stage, start, on_keep, ledger, reinforced)
  return curves


def reinforce(audit: Audit, start: Callable[[], Params], config: AuditConfig, runs: Sequence[Run],
              names: Sequence[str], name: str = "reinforce", idle: Iterable[str] = ()) -> Params:
  """Runs learn their forget set even better: the second model that some methods compare with.

  Args:
    audit: what is shared.
    start: gives the models before it.
    config: with the method's settings.
    runs: whose forget sets.
    names: of the runs, in checkpoints.
    name: of the stage.
    idle: names of runs that have ended before.
  """
  recipe = config.recipe
  steps, rate = int(recipe.hyper["reinforce_steps"]), recipe.hyper["reinforce_learning_rate"]
  if not checkpoints.is_saved(checkpoints.step_path(audit.checkpoints / name, steps)):
    stage = Stage(
        name, names, lambda hyper: nll("forget"), audit.unlearn_rows(runs, ["forget"]),
        {"learning_rate": rate, "weight_decay": config.method_config.weight_decay},
        [steps])

    def on_keep(step: int, params: Params) -> bool:
      audit.save_params(name, step, params, names)
      return False
    ledger = audit.ledger(name, names, f"methods.{config.method}.reinforce_learning_rate", rate, idle)
    run_audit_stage(audit, stage, start, on_keep, ledger)
  return shard_runs(audit.load_kept(name, steps, len(names)), audit.mesh)


def relearn(audit: Audit, seed: int, cells: Sequence[Cell]) -> None:
  """The attacks on everything of one seed: every arm and depth gets the same batches and steps, at every rate.

  Args:
    audit: what is shared.
    seed: which.
    cells: what is attacked; see `arms.cells_of_seed`. The stage stacks them, one rate after the other.
  """
  config, stage_name = audit.config.relearn, f"relearn-seed{seed}"
  attacked = attacked_cells(audit.config, cells)
  names, last = [cell.name for cell in attacked], config.keep_steps[-1]
  ledger = audit.ledger(stage_name, names, "relearn.learning_rates", config.learning_rates,
                        [cell.name for cell in attacked if cell.missing])
  rows = audit.token_rows([cell.run for cell in attacked], lambda case: case.relearn_sets[0].rows)

  def start() -> Params:
    return shard_runs(_gather(audit, attacked), audit.mesh)

  def ask(step: int, params: Params) -> None:
    asked = attacked if step else cells  # before the attack all rates are the same models
    some = lambda tree: tree if len(asked) == len(attacked) else jax.tree.map(lambda leaf: leaf[:len(asked)], tree)
    scores = audit.score(f"{stage_name}-{step:06d}", some(params), [cell.run for cell in asked], some(rows))
    ledger.look(step, "answers", finite_by_name(names[:len(asked)], scores))

  def on_keep(step: int, params: Params) -> bool:
    if step == last:
      audit.save_params(stage_name, step, params, names)
    ask(step, params)
    return False

  if (audit.scores / f"{stage_name}-{last:06d}.npz").exists():
    for step in (0, *config.keep_steps):  # from the disk; a kill may have come before the ledger was written
      ask(step, {})
    return
  ask(0, start())
  stage = Stage(
      stage_name, names, lambda hyper: nll("relearn"), {"relearn": rows},
      {"learning_rate": np.repeat(np.array(config.learning_rates, np.float32), len(cells)),
       "weight_decay": config.weight_decay}, config.keep_steps)
  run_audit_stage(audit, stage, start, on_keep, ledger)


def run_audit_stage(audit: Audit, stage: Stage, start: Callable[[], Params], on_keep: OnKeep, ledger: Ledger,
                    reinforced: Callable[[], Params] | None = None, *, resume: bool = True) -> None:
  """`run_stage` in an audit's folder; without `resume` a stage that was killed begins anew."""
  run_stage(stage, audit.model, start, audit.mesh, audit.checkpoints / stage.name, audit.log,
            on_keep=on_keep, save_every=audit.config.checkpoint_seconds if resume else float("inf"),
            reinforced=reinforced, ledger=ledger)


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
