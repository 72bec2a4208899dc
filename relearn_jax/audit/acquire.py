"""How models that know are had: one is pretrained, and every chain memorises its case, in stages that resume.

A stage of a larger grid does only what an earlier one left undone: chains are found again by what they depend on.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit import pretrained
from relearn_jax.audit.audit_config import UnlearnMethod
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain
from relearn_jax.audit.interview import Answers, finite_by_name, load_answers, save_answers
from relearn_jax.audit.shelf import Place, StageFolder, open_folder
from relearn_jax.audit.stages import MEMORIZE, PRETRAIN, Planned
from relearn_jax.data.order import small_batches
from relearn_jax.models.model import Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs
from relearn_jax.parallel.processes import agree
from relearn_jax.progress import progress
from relearn_jax.training.ended import AllEnded, Ledger
from relearn_jax.training.stage import OnKeep, Stage, run_stage
from relearn_jax.training.step import NOTHING, Build, Frozen, StepLog
from relearn_jax.training.train_settings import rate_share


def memorize_nll(hyper: Any) -> Any:
  """What memorising minimises."""
  return nll("memorize")


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


@dataclasses.dataclass(frozen=True)
class Said:
  """What stacked runs answered after a number of steps.

  Attributes:
    finite: name of a run -> whether it is.
    answers: waits until they are read.
  """

  finite: dict[str, bool]
  answers: Callable[[], Answers]


def ask_once(exp: Experiment, folder: StageFolder, step: int, ask: Callable[[], Answers], scale: float = 1.0) -> Said:
  """Answers of a stage's runs: those that were kept, or asked for now, and read and kept beside the device's work.

  Args:
    exp: what is shared.
    folder: of the stage.
    step: of training, after which they are asked.
    ask: gives answers whose texts are yet to be read.
    scale: of the adapters that are asked.
  """
  path = folder.answers(step)
  if agree(path.exists):
    kept = load_answers(path)
    return Said(finite_by_name(kept), lambda: kept)
  said, interviewer = ask(), exp.interviewer(scale)
  read = exp.beside.do(lambda: interviewer.read(said))
  exp.beside.do(lambda: save_answers(path, read.result()))
  return Said(finite_by_name(said), read.result)


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
  schedule: Callable[[int], float] = lambda step: 1.0


def train(exp: Experiment, folder: StageFolder, names: Sequence[str], how: Trained, start: Callable[[], Params],
          on_keep: OnKeep, ledger: Ledger, *, reinforced: Callable[[], Params] | None = None,
          frozen: Frozen = NOTHING, model: Any = None, resumes: bool = True) -> None:
  """`run_stage` in an audit's folder; without `resumes` a stage that was killed begins anew."""
  stage = Stage(folder.name, names, how.build, how.data, how.hyper, how.keep,
                small_batches(how.data, how.batch_size, how.seeds), how.num_microbatches, how.schedule)
  model = model or dataclasses.replace(exp.model, remat=how.remat)
  run_stage(stage, model, start, exp.mesh, folder.path, exp.log, on_keep=on_keep, frozen=frozen,
            save_every=exp.config.checkpoint_seconds if resumes else float("inf"), reinforced=reinforced, ledger=ledger,
            settle=exp.beside.wait)


def left_to_memorize(exp: Experiment, stage: Planned, wanted: Iterable[Chain]) -> list[Chain]:
  """The wanted chains of a stage of memorising whose weights are not there, and that have not ended."""
  wanted, ended = set(wanted), gone(exp)
  there = lambda chain: exp.memorized_keys[chain] in exp.done and exp.shelf.has(memorized_place(exp, chain))
  return [chain for chain in stage.chains if chain in wanted and chain not in ended and not there(chain)]


def memorize(exp: Experiment, stage: Planned, wanted: Iterable[Chain]) -> None:
  """The wanted chains learn their case, and are asked.

  Args:
    exp: what is shared.
    stage: of all chains.
    wanted: those whose weights a later stage starts from.

  Raises:
    AllEnded: no run of the stage is left.
  """
  config, mine = exp.config.memorize, left_to_memorize(exp, stage, wanted)
  if not mine:
    return
  runs = [chain.name for chain in mine]
  folder = open_folder(exp.checkpoints, stage.name, {chain.name: exp.memorized_keys[chain] for chain in mine})
  ledger = Ledger(folder.path, folder.name, runs, "memorize.learning_rate", config.learning_rate)

  def ask(step: int, params: Params) -> None:
    said = ask_once(exp, folder, step, lambda: exp.interviewer().ask_all(params, exp.scored_rows(mine), runs))
    ledger.look(step, "answers", said.finite)

  def on_keep(step: int, params: Params) -> bool:
    if step == config.steps:
      exp.fingerprint(folder, params, len(runs))
      exp.shelf.keep(folder.path, step, params, runs, runs, exp.model, folder.name)
      ask(step, params)
    return False
  how = Trained(memorize_nll, {"memorize": exp.rows(mine, "memorize")},
                {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}, every(config.steps, 25),
                config.batch_size, config.num_microbatches, [chain.seed for chain in mine], config.remat,
                lambda step: rate_share(config, config.steps, step))
  start = lambda: repeat_runs(exp.base_params, len(runs), exp.mesh, exp.model.axes())
  places = [(folder.path, config.steps, run) for run in runs]
  with finishing(exp, folder):
    if all(map(exp.shelf.has, places)):  # a kill came after the last step
      ask(config.steps, exp.take(places))
    else:
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
  if exp.config.arms.memorized:
    return exp.given, 0, chain.arm
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
      if one := exp.ended(key):
        found[chain] = one.step if step is None else step
        break
  return found
