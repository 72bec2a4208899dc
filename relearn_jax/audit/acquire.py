"""How trained points are had: all chains memorise their case, then unlearn it by each method, in stages that resume.

A stage of a larger grid does only what an earlier one left undone: chains are found again by what they depend on.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from relearn_jax.audit import pretrained
from relearn_jax.audit.audit_config import UnlearnMethod
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain, Point, select_points
from relearn_jax.audit.interview import Answers, finite_by_name, load_answers, save_answers
from relearn_jax.audit.shelf import Place, StageFolder, open_folder
from relearn_jax.audit.stages import MEMORIZE, PRETRAIN, Planned
from relearn_jax.data.order import small_batches
from relearn_jax.models.model import Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, shard_runs, to_host
from relearn_jax.progress import progress
from relearn_jax.training.checkpoints import saved_steps
from relearn_jax.training.ended import AllEnded, Ledger, read_ended
from relearn_jax.training.stage import OnKeep, Stage, run_stage
from relearn_jax.training.step import NOTHING, Build, Frozen, StepLog


def relearn_nll(hyper: Any) -> Any:
  """What an attack minimises; one function for all, so that cells share an executable."""
  return nll("relearn")


def memorize_nll(hyper: Any) -> Any:
  """What memorising minimises."""
  return nll("memorize")


def forget_nll(hyper: Any) -> Any:
  """What reinforcing minimises."""
  return nll("forget")


def pretrain(exp: Experiment, cache: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts the pretrained model into `folder`: from the cache, or trained now."""
  settings = exp.config.arms.pretrain
  exp.log.truncate(PRETRAIN, 0)
  ledger = Ledger(exp.checkpoints / PRETRAIN, PRETRAIN, [PRETRAIN], "arms.pretrain.learning_rate",
                  settings.learning_rate)
  ledger.rewind(0)
  with exp.log.stage(PRETRAIN, ledger) as rows, contextlib.ExitStack() as bars:
    bar = None

    def on_step(step: int, report: StepLog, learning_rate: float, batch: np.ndarray) -> None:
      nonlocal bar
      bar = bar or bars.enter_context(progress(settings.steps, PRETRAIN))  # none for a model from the cache
      rows.add(step, report, learning_rate, int(np.count_nonzero(batch)), batch.size)
      bar.update(1)
    cached = pretrained.cached_base(settings, exp.config.case_config, cache, on_step)
  exp.checkpoints.mkdir(parents=True, exist_ok=True)
  pretrained.copy_base(cached, folder)


def every(last: int, interval: int) -> list[int]:
  """Steps interval, 2 * interval, ... and the last."""
  return sorted({*range(interval, last + 1, interval), last})


def ask_once(exp: Experiment, folder: StageFolder, step: int, ask: Callable[[], Answers]) -> Answers:
  """Answers of a stage's runs after a number of steps: those that were kept, or asked for now and kept."""
  path = folder.answers(step)
  if not path.exists():
    save_answers(path, ask())
  return load_answers(path)


@dataclasses.dataclass(frozen=True)
class Trained:
  """How a stage of the audit is trained, besides what it is called and who runs."""

  build: Build
  data: dict[str, Any]
  hyper: dict[str, Any]
  keep: Sequence[int]
  batch_size: int
  num_microbatches: int
  seeds: Sequence[int]
  remat: str = "none"


def train(exp: Experiment, folder: StageFolder, names: Sequence[str], how: Trained, start: Callable[[], Params],
          on_keep: OnKeep, ledger: Ledger, *, reinforced: Callable[[], Params] | None = None,
          frozen: Frozen = NOTHING, model: Any = None, resumes: bool = True) -> None:
  """`run_stage` in an audit's folder; without `resumes` a stage that was killed begins anew."""
  stage = Stage(folder.name, names, how.build, how.data, how.hyper, how.keep,
                small_batches(how.data, how.batch_size, how.seeds), how.num_microbatches)
  model = model or dataclasses.replace(exp.model, remat=how.remat)
  run_stage(stage, model, start, exp.mesh, folder.path, exp.log, on_keep=on_keep, frozen=frozen,
            save_every=exp.config.checkpoint_seconds if resumes else float("inf"), reinforced=reinforced, ledger=ledger)


def memorize(exp: Experiment, stage: Planned, wanted: Iterable[Chain]) -> None:
  """The wanted chains learn their case, and are asked.

  Args:
    exp: what is shared.
    stage: of all chains.
    wanted: those whose weights a later stage starts from.

  Raises:
    AllEnded: no run is left.
  """
  config, names = exp.config.memorize, {chain.name for chain in wanted}
  mine = [chain for chain in stage.chains
          if chain.name in names and chain not in gone(exp) and not exp.shelf.has(memorized_place(exp, chain))]
  if not mine:
    return
  runs = [chain.name for chain in mine]
  folder = open_folder(exp.checkpoints, stage.name, {chain.name: exp.memorized_keys[chain] for chain in mine})
  ledger = Ledger(folder.path, folder.name, runs, "memorize.learning_rate", config.learning_rate)

  def on_keep(step: int, params: Params) -> bool:
    if step == config.steps:
      exp.fingerprint(folder, to_host(params, len(runs)))
      exp.shelf.keep(folder.path, step, params, runs, runs, exp.model, folder.name)
      answers = ask_once(exp, folder, step, lambda: exp.interviewer()(params, exp.scored_rows(mine), runs))
      ledger.look(step, "answers", finite_by_name(answers))
    return False
  how = Trained(memorize_nll, {"memorize": exp.rows(mine, "memorize")},
                {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}, every(config.steps, 25),
                config.batch_size, config.num_microbatches, [chain.seed for chain in mine], config.remat)
  start = lambda: repeat_runs(exp.base_params, len(runs), exp.mesh, exp.model.axes())
  with finishing(exp, folder):
    train(exp, folder, runs, how, start, on_keep, ledger)


@contextlib.contextmanager
def finishing(exp: Experiment, folder: StageFolder) -> Iterator[None]:
  """Marks a stage as done behind it, also where all its runs have ended: they would end again."""
  try:
    yield
  except AllEnded:
    exp.finish(folder)
    raise
  exp.finish(folder)


def memorized_place(exp: Experiment, chain: Chain) -> Place:
  """Where a chain's memorised weights are, or would be."""
  found = exp.done.get(exp.memorized_keys[chain])
  return found[0].path if found else exp.checkpoints / MEMORIZE, exp.config.memorize.steps, chain.name


def gone(exp: Experiment, method: UnlearnMethod | None = None) -> dict[Chain, int]:
  """Chains that have ended -> unlearn step from which there is no model of theirs.

  Args:
    exp: what is shared.
    method: by which they unlearn; None: memorising alone counts.

  Returns:
    0 for those that did not even memorise.
  """
  found = {}
  for chain in exp.chains:
    keys: list[tuple[str, int | None]] = [(exp.memorized_keys[chain], 0)]
    if method:
      keys += [(exp.unlearned_key(chain, method, "reinforce"), 1), (exp.unlearned_key(chain, method), None)]
    for key, step in keys:
      if key in exp.done and (one := read_ended(exp.done[key][0].path).get(exp.done[key][1])):
        found[chain] = one.step if step is None else step
        break
  return found


def left_to_unlearn(exp: Experiment, stage: Planned) -> list[Chain]:
  """The chains of a stage of unlearning that an earlier one has not done."""
  assert stage.method
  return [chain for chain in stage.chains if exp.unlearned_key(chain, stage.method, stage.kind) not in exp.done]


def reinforce(exp: Experiment, stage: Planned) -> None:
  """Chains learn their forget set even better: the second model that some methods compare with.

  Raises:
    AllEnded: no run is left.
  """
  mine, method = left_to_unlearn(exp, stage), stage.method
  if not mine or not method:
    return
  runs = [chain.name for chain in mine]
  keys = {chain.name: exp.unlearned_key(chain, method, "reinforce") for chain in mine}
  folder = open_folder(exp.checkpoints, stage.name, keys)
  with finishing(exp, folder):
    train_reinforced(exp, folder, method, mine, runs, {chain.name for chain in gone(exp)})


def train_reinforced(exp: Experiment, folder: StageFolder, method: UnlearnMethod, mine: Sequence[Chain],
                     runs: Sequence[str], idle: Iterable[str] = ()) -> None:
  """Trains stacked runs on their forget sets and keeps them."""
  steps, rate = int(method.recipe.hyper["reinforce_steps"]), method.recipe.hyper["reinforce_learning_rate"]
  field = f"unlearn.settings.{method.recipe.method}.reinforce_learning_rate"
  unlearn = exp.config.unlearn

  def on_keep(step: int, params: Params) -> bool:
    exp.shelf.keep(folder.path, step, params, runs, runs, exp.model, folder.name)
    return False
  how = Trained(forget_nll, {"forget": exp.rows(mine, "forget")},
                {"learning_rate": rate, "weight_decay": method.weight_decay}, [steps], unlearn.batch_size,
                unlearn.num_microbatches, [chain.seed for chain in mine], unlearn.remat)
  train(exp, folder, runs, how, lambda: start_memorized(exp, mine), on_keep,
        Ledger(folder.path, folder.name, runs, field, rate, idle))


def start_memorized(exp: Experiment, mine: Sequence[Chain]) -> Params:
  """The memorised models of some chains, on the mesh."""
  return shard_runs(exp.shelf.take([memorized_place(exp, chain) for chain in mine], exp.one_run()), exp.mesh)


def start_reinforced(exp: Experiment, folder: StageFolder, method: UnlearnMethod, runs: Sequence[str]) -> Params:
  """The reinforced models of some runs, on the mesh."""
  steps = int(method.recipe.hyper["reinforce_steps"])
  return shard_runs(exp.shelf.take([(folder.path, steps, run) for run in runs], exp.one_run()), exp.mesh)


def unlearn(exp: Experiment, stage: Planned) -> None:
  """Chains unlearn until every U chain that has not ended has been asked at its last depth.

  Only points are kept: of a U chain at the steps of its depths, and of its control at the same. A chain that is there,
  and its control, are used no further: what becomes of them then does not matter.

  Raises:
    AllEnded: no run is left.
  """
  mine, method, config = left_to_unlearn(exp, stage), stage.method, exp.config.unlearn
  if not mine or not method:
    return
  runs, u_chains = [chain.name for chain in mine], [chain for chain in mine if chain.arm == "U"]
  u_names = [chain.name for chain in u_chains]
  folder = open_folder(exp.checkpoints, stage.name, {c.name: exp.unlearned_key(c, method) for c in mine})
  before = {chain.name for chain in gone(exp, method)}
  ledger = Ledger(folder.path, folder.name, runs, f"unlearn.settings.{method.recipe.method}.learning_rate",
                  method.learning_rate, before)
  curves: dict[Chain, dict[int, float]] = {chain: {} for chain in u_chains}

  def watch(step: int, answers: Answers) -> tuple[dict[Chain, list[int]], bool]:
    """The points as far as they are known at a step, and whether nothing is left to do."""
    ledger.look(step, "answers", finite_by_name(answers))
    for chain, value, finite in zip(u_chains, exp.mean_scores(answers), answers.finite, strict=True):
      if finite and not ledger.has_ended(chain.name, step):
        curves[chain][step] = float(value)
    # As it is at this step: what is on disk from before a kill may know more.
    lost = [chain for chain in u_chains if ledger.has_ended(chain.name, step)]
    points = select_points({c: {s: v for s, v in curves[c].items() if s <= step} for c in u_chains}, config.max_score,
                           config.depths, lost)
    there = [chain for chain in u_chains if len(points[chain]) == config.depths]
    ledger.finish(name for chain in there for name in (chain.name, partner(chain).name))
    return points, len(there) + len(lost) == len(u_chains)

  def on_keep(step: int, params: Params) -> bool:
    some = lambda tree: jax.tree.map(lambda leaf: leaf[:len(u_chains)], tree)  # U chains come first
    points, is_over = watch(step, ask_once(exp, folder, step, lambda: exp.interviewer()(
        some(params), exp.scored_rows(u_chains), u_names)))
    here = [name for chain in u_chains if step in points[chain] for name in (chain.name, partner(chain).name)]
    kept = runs if exp.config.keep_weights else here
    exp.shelf.keep(folder.path, step, params, runs, kept, exp.model, folder.name)
    return is_over

  second = exp.done.get(exp.unlearned_key(mine[0], method, "reinforce"))
  reinforced = (lambda: start_reinforced(exp, second[0], method, runs)) if second else None
  how = Trained(method.recipe.build, {name: exp.rows(mine, name) for name in sorted(method.recipe.objective.rows)},
                {"learning_rate": method.learning_rate, "weight_decay": method.weight_decay, **method.recipe.traced},
                every(config.max_steps, config.keep_every), config.batch_size, config.num_microbatches,
                [chain.seed for chain in mine], config.remat)
  begun = max(saved_steps(folder.path / "resume"), default=0)
  with finishing(exp, folder):
    for step in folder.asked():
      if step <= begun:  # before a kill; the stage does not come by it again
        watch(step, load_answers(folder.answers(step)))
    train(exp, folder, runs, how, lambda: start_memorized(exp, mine), on_keep, ledger, reinforced=reinforced)


def partner(chain: Chain) -> Chain:
  """The control of a U chain."""
  return dataclasses.replace(chain, arm="N")


def curves_of(exp: Experiment, method: UnlearnMethod) -> dict[Chain, dict[int, Answers]]:
  """What every U chain answered along its unlearning, by step."""
  found: dict[Chain, dict[int, Answers]] = {}
  for chain in exp.chains:
    if chain.arm == "U" and (there := exp.done.get(exp.unlearned_key(chain, method))):
      folder, _ = there
      found[chain] = {step: load_answers(folder.answers(step)) for step in folder.asked()}
  return found


def unlearned_points(exp: Experiment, method: UnlearnMethod) -> dict[Chain, list[int]]:
  """The unlearn steps at which each U chain is attacked, by depth; none of those that ended."""
  config, lost = exp.config.unlearn, gone(exp, method)
  curves = {chain: {step: float(exp.mean_scores(answers)[answers.runs.tolist().index(chain.name)])
                    for step, answers in by_step.items() if _is_finite(answers, chain)}
            for chain, by_step in curves_of(exp, method).items()}
  return select_points(curves, config.max_score, config.depths, lost)


def _is_finite(answers: Answers, chain: Chain) -> bool:
  return bool(answers.finite[answers.runs.tolist().index(chain.name)])


def resolved(exp: Experiment, point: Point, steps: dict[str, dict[Chain, list[int]]],
             lost: dict[str | None, dict[Chain, int]]) -> Point | None:
  """A planned point with its unlearn step; None where its chain never got there, or has ended before.

  Args:
    exp: what is shared.
    point: as planned.
    steps: method -> `unlearned_points`.
    lost: method, and None -> `gone`.
  """
  if exp.config.arms.loaded:
    return point
  chain = point.chain
  if point.depth is None:
    return None if chain in lost[None] else point
  assert point.method
  at = steps[point.method].get(dataclasses.replace(chain, arm="U"), [])
  if point.depth >= len(at) or lost[point.method].get(chain, at[point.depth] + 1) <= at[point.depth]:
    return None
  return dataclasses.replace(point, unlearn_step=at[point.depth])


def remove_reinforced(exp: Experiment) -> None:
  """Removes the weights of second models, which only unlearning compares with."""
  for folder in exp.checkpoints.glob("reinforce-*"):
    exp.shelf.forget(folder)
    for path in folder.iterdir():
      if path.name.isdigit():
        shutil.rmtree(path)
