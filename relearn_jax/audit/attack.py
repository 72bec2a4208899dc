"""The attack: points of one kind, stacked, are finetuned on a relearn set and asked at the steps that are kept.

Every arm of a stage sees the same rows in the same order, at the same learning rates and steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relearn_jax.audit.acquire import Said, Trained, ask_once, train
from relearn_jax.audit.api_settings import API
from relearn_jax.audit.audit_config import FULL
from relearn_jax.audit.experiment import FIELDS, Experiment
from relearn_jax.audit.given import Wanted
from relearn_jax.audit.grid import Cell
from relearn_jax.audit.interview import Answers, finite_by_name, load_answers
from relearn_jax.audit.remote_attack import attack_remotely, place
from relearn_jax.audit.shelf import StageFolder, open_folder
from relearn_jax.audit.stages import Planned
from relearn_jax.errors import InputError
from relearn_jax.models.lora import init_lora
from relearn_jax.models.model import Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import stack_trees, take_runs
from relearn_jax.training.ended import AllEnded, Ledger, read_ended
from relearn_jax.training.step import NOTHING, Frozen


def relearn_nll(hyper: Any) -> Any:
  """What an attack minimises; one function for all, so that cells share an executable."""
  return nll("relearn")


def attack(exp: Experiment, stage: Planned, cells: Sequence[Cell], following: Planned | None = None) -> None:
  """Attacks and asks the cells that no earlier stage has done.

  Args:
    exp: what is shared.
    stage: as planned.
    cells: those of the stage whose points there are, with their unlearn steps.
    following: the next stage, whose weights are read meanwhile.

  Raises:
    InputError: a loaded model, asked as it is, gives no finite numbers.
  """
  keys = {cell: exp.attacked_key(cell) for cell in cells}
  mine = [cell for cell in cells if keys[cell] not in exp.done]
  if not mine:
    return
  folder = open_folder(exp.checkpoints, stage.name, {cell.name: keys[cell] for cell in mine})
  lora = stage.attack.adapter not in (FULL, API) and exp.config.attack.lora.learning_rates
  ledger = Ledger(folder.path, folder.name, [cell.name for cell in mine],
                  "attack.lora.learning_rates" if lora else "attack.learning_rates",
                  [cell.attack.learning_rate for cell in mine])
  try:
    if stage.attack.adapter == API:
      attack_remotely(exp, stage, mine, folder, ledger)
    elif exp.config.attack.keep_steps[-1] in folder.asked():  # a kill may have come before the ledger was written
      for step in folder.asked():
        ledger.look(step, "answers", finite_by_name(load_answers(folder.answers(step))))
    else:
      _train_and_ask(exp, stage, mine, folder, ledger, following)
  except AllEnded:
    pass  # of this stage; the others may go on
  exp.finish(folder)


def _train_and_ask(exp: Experiment, stage: Planned, mine: Sequence[Cell], folder: StageFolder, ledger: Ledger,
                   following: Planned | None) -> None:
  config, names, kind = exp.config.attack, [cell.name for cell in mine], stage.attack
  model = exp.adapted(kind.adapter)
  held, frozen = _weights(exp, mine)
  if exp.config.arms.loaded:
    exp.given_weights.read_ahead(_wanted(exp, following) if following else ())
  # Before the attack all rates are the same models.
  points = list(dict.fromkeys(cell.point for cell in mine))
  first = [next(i for i, cell in enumerate(mine) if cell.point == point) for point in points]

  def ask(step: int, params: Params) -> Said:
    every = list(range(len(mine)))
    some = first if step == 0 else every
    part = lambda tree: tree if some == every else take_runs(tree, np.array(some))
    asked = [mine[i] for i in some]
    rows = exp.scored_rows([cell.point.chain for cell in asked], kind.relearn_set)
    return ask_once(exp, folder, step, lambda: exp.interviewer(model.lora_scale).ask_all(
        part(params), rows, [cell.name for cell in asked], frozen=Frozen(part(frozen.own), frozen.shared)),
                    model.lora_scale)

  def on_keep(step: int, params: Params) -> bool:
    if step == config.keep_steps[-1]:
      exp.fingerprint(folder, params, len(names))
      if exp.config.keep_weights:
        exp.shelf.keep(folder.path, step, params, names, names, model, folder.name)
        exp.shelf.forget(folder.path)
    ledger.look(step, "answers", ask(step, params).finite)
    return False

  before = ask(0, held[0]).finite
  for cell in (mine[i] for i in first):
    if not before[cell.name] and exp.config.arms.loaded:
      raise InputError("gives no finite numbers for questions and scored rows", file=exp.checked[cell.point.arm].path,
                       field=FIELDS[cell.point.arm], mend="give a checkpoint whose log-probabilities are finite")
  ledger.look(0, "answers", before)
  how = Trained(relearn_nll, {"relearn": exp.rows([cell.point.chain for cell in mine], kind.relearn_set)},
                {"learning_rate": np.array([cell.attack.learning_rate for cell in mine], np.float32),
                 "weight_decay": config.weight_decay}, config.keep_steps, stage.batch_size, config.num_microbatches,
                [cell.point.seed for cell in mine])
  train(exp, folder, names, how, held.pop, on_keep, ledger, frozen=frozen, model=model)


def _weights(exp: Experiment, mine: Sequence[Cell]) -> tuple[list[Params], Frozen]:
  """What is trained, in a list that can be emptied: a second reference would be a second copy; and what is frozen."""
  kind = mine[0].attack
  lora, model = exp.config.attack.adapter(kind.adapter), exp.adapted(kind.adapter)
  loaded = bool(exp.config.arms.loaded)
  if lora is None:
    if not loaded:
      return [_points(exp, mine)], NOTHING
    bases = {arm: exp.given_weights.take(arm, jnp.float32) for arm in dict.fromkeys(cell.point.arm for cell in mine)}
    return [stack_trees([bases[cell.point.arm] for cell in mine], exp.mesh, model.axes())], NOTHING
  frozen = (Frozen(shared=exp.given_weights.freeze(mine[0].point.arm, exp.dtype)) if loaded
            else Frozen(own=_points(exp, mine)))
  fresh = {seed: init_lora(model, lora, jax.random.key(seed)) for seed in dict.fromkeys(c.point.seed for c in mine)}
  return [stack_trees([fresh[cell.point.seed] for cell in mine], exp.mesh, model.axes())], frozen


def _wanted(exp: Experiment, stage: Planned) -> list[Wanted]:
  """The loaded weights that an attack begins with; none of a provider's."""
  full = exp.config.attack.adapter(stage.attack.adapter) is None
  own = [] if stage.attack.adapter == API else stage.points
  return list(dict.fromkeys((point.arm, jnp.float32 if full else exp.dtype) for point in own))


def _points(exp: Experiment, mine: Sequence[Cell]) -> Params:
  """The weights of trained points, stacked on the mesh."""
  return exp.take([place(exp, cell.point) for cell in mine])


@dataclasses.dataclass(frozen=True)
class Attacked:
  """What became of a cell.

  Attributes:
    answers: by step, 0 among them; none from the step on at which it ended.
    index: of its run in each.
  """

  answers: Mapping[int, Answers]
  index: Mapping[int, int]


def attacked(exp: Experiment, cell: Cell, cache: dict[Any, Answers]) -> Attacked | None:
  """The answers of a cell, from the folder of whatever stage made the attack; None where none did."""
  if (found := exp.done.get(exp.attacked_key(cell))) is None:
    return None
  folder, run = found
  end = read_ended(folder.path).get(run)
  answers, index = {}, {}
  for step in folder.asked():
    if end is not None and end.step <= step:
      continue
    path = folder.answers(step)
    if path not in cache:
      cache[path] = load_answers(path)
    names = cache[path].runs.tolist()
    # Before the attack the first rate of a point answers for all.
    first = (name for name in names if step == 0 and name.startswith(cell.point.name + "-lr"))
    mine = run if run in names else next(first, None)
    if mine is not None:
      answers[step], index[step] = cache[path], names.index(mine)
  return Attacked(answers, index)
