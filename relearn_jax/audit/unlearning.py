"""Unlearning: chains that have memorised their case unlearn it by a method; points of U and of its control are kept.

A stage of a larger grid does only what an earlier one left undone: chains are found again by what they depend on.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit.acquire import Trained, ask_once, every, finishing, gone, memorized_place, train
from relearn_jax.audit.audit_config import UnlearnMethod
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain, Point, select_points
from relearn_jax.audit.interview import Answers, finite_by_name, load_answers
from relearn_jax.audit.shelf import StageFolder, open_folder
from relearn_jax.audit.stages import Planned
from relearn_jax.models.model import Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import take_runs
from relearn_jax.parallel.processes import agree, remove
from relearn_jax.training.checkpoints import saved_steps, step_path
from relearn_jax.training.ended import Ledger
from relearn_jax.training.train_settings import rate_share


def forget_nll(hyper: Any) -> Any:
  """What reinforcing minimises."""
  return nll("forget")


def left_to_unlearn(exp: Experiment, stage: Planned) -> list[Chain]:
  """The chains of a stage of unlearning that an earlier one has not done."""
  assert stage.method
  return [chain for chain in stage.chains if exp.unlearned_key(chain, stage.method, stage.kind) not in exp.done]


def wanted(exp: Experiment, stages: Sequence[Planned]) -> list[Chain]:
  """The chains whose memorised weights some stage that is left starts from."""
  found = {chain for stage in stages if stage.kind in ("reinforce", "unlearn") for chain in left_to_unlearn(exp, stage)}
  found |= {cell.point.chain for stage in stages for cell in stage.cells
            if cell.point.depth is None and exp.attacked_key(cell) not in exp.done}
  return [chain for chain in exp.chains if chain in found]


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
  return exp.take([memorized_place(exp, chain) for chain in mine])


def start_reinforced(exp: Experiment, method: UnlearnMethod, runs: Iterable[tuple[StageFolder, str]]) -> Params:
  """The reinforced models of some runs, each of a stage's folder, on the mesh."""
  steps = int(method.recipe.hyper["reinforce_steps"])
  return exp.take([(folder.path, steps, run) for folder, run in runs])


class _Trajectory:
  """What U chains say along their unlearning, and which steps are points.

  A chain that has been asked at its last depth, and its control, are used no further: what becomes of them then does
  not matter.

  Attributes:
    points: U chain -> its points so far, at which its control is kept too.
    last: the last point of U chains that an earlier stage has unlearned, and whose controls are here.
  """

  def __init__(self, exp: Experiment, folder: StageFolder, method: UnlearnMethod, mine: Sequence[Chain],
               ledger: Ledger):
    self.exp, self.folder, self.ledger = exp, folder, ledger
    self.u_chains, self.runs = [chain for chain in mine if chain.arm == "U"], [chain.name for chain in mine]
    self.names, self.curves = [chain.name for chain in self.u_chains], dict[Chain, dict[int, float]]()
    elsewhere = {dataclasses.replace(chain, arm="U") for chain in mine} - set(self.u_chains)
    before = unlearned_points(exp, method) if elsewhere else {}
    self.known = {chain: before.get(chain, []) for chain in exp.chains if chain in elsewhere}
    self.last = max((step for steps in self.known.values() for step in steps), default=0)
    self.points: dict[Chain, list[int]] = dict(self.known)

  def watch(self, step: int, answers: Answers) -> bool:
    """Takes up the answers at a step; returns whether every chain is through, or has ended."""
    config, ledger = self.exp.config.unlearn, self.ledger
    ledger.look(step, "answers", finite_by_name(answers))
    for chain, value, finite in zip(self.u_chains, self.exp.mean_scores(answers), answers.finite, strict=True):
      curve = self.curves.setdefault(chain, {})
      if finite and not ledger.has_ended(chain.name, step):
        curve[step] = float(value)
    # As it is at this step: what is on disk from before a kill may know more.
    lost = [chain for chain in self.u_chains if ledger.has_ended(chain.name, step)]
    until = {chain: {at: value for at, value in curve.items() if at <= step} for chain, curve in self.curves.items()}
    found = select_points(until, config.max_score, config.depths, lost)
    self.points = self.known | found
    through = [chain for chain, steps in found.items() if len(steps) == config.depths]
    ledger.finish(name for chain in through for name in (chain.name, partner(chain).name))
    return len(through) + len(lost) == len(self.u_chains) and step >= self.last

  def on_keep(self, step: int, params: Params) -> bool:
    """Asks, and keeps the weights of chains that are at a point, and of their controls."""
    exp = self.exp
    some = lambda tree: take_runs(tree, np.arange(len(self.u_chains)))  # U chains come first
    through = step >= self.last
    if self.u_chains:
      through = self.watch(step, ask_once(exp, self.folder, step, lambda: exp.interviewer().ask_all(
          some(params), exp.scored_rows(self.u_chains), self.names)).answers())
    self.ledger.finish(partner(chain).name for chain, steps in self.known.items() if step >= max(steps, default=0))
    exp.shelf.keep(self.folder.path, step, params, self.runs, self.runs if exp.config.keep_weights else self._at(step),
                   exp.model, self.folder.name)
    return through

  def is_through(self, last: int) -> bool:
    """Whether answers and weights of all points are on disk; takes up what is, a kill may have come at any time."""
    through = not self.u_chains
    for step in self.folder.asked():
      through = self.watch(step, load_answers(self.folder.answers(step))) or step == last
    return through and all(self.exp.shelf.has((self.folder.path, step, name))
                           for step in {step for steps in self.points.values() for step in steps}
                           for name in self._at(step))

  def _at(self, step: int) -> list[str]:
    """The runs of this stage that are kept at a step."""
    here = {name for chain, steps in self.points.items() if step in steps for name in (chain.name, partner(chain).name)}
    return [run for run in self.runs if run in here]


def unlearn(exp: Experiment, stage: Planned) -> None:
  """Chains unlearn until every U chain that has not ended has been asked at its last depth.

  Weights of points alone are kept: of a U chain at the steps of its depths, and of its control at the same.

  Raises:
    AllEnded: no run is left.
  """
  mine, method, config = left_to_unlearn(exp, stage), stage.method, exp.config.unlearn
  if not mine or not method:
    return
  idle = {chain.name for chain in gone(exp, method)}
  runs = [chain.name for chain in mine]
  if idle >= set(runs):
    return  # nobody is left to unlearn; the audit says so where that is so of all methods
  folder = open_folder(exp.checkpoints, stage.name, {c.name: exp.unlearned_key(c, method) for c in mine})
  ledger = Ledger(folder.path, folder.name, runs, f"unlearn.settings.{method.recipe.method}.learning_rate",
                  method.learning_rate, idle)
  trajectory = _Trajectory(exp, folder, method, mine, ledger)
  # Controls alone go as far as their partners did.
  last = config.max_steps if trajectory.u_chains else trajectory.last
  reinforced = (lambda: start_reinforced(exp, method, [
      exp.done[exp.unlearned_key(chain, method, "reinforce")] for chain in mine])
  ) if method.recipe.published.reinforces else None
  how = Trained(method.recipe.build, {name: exp.rows(mine, name) for name in sorted(method.recipe.objective.rows)},
                {"learning_rate": method.learning_rate, "weight_decay": method.weight_decay, **method.recipe.traced},
                every(last, config.keep_every), config.batch_size,
                config.num_microbatches, [chain.seed for chain in mine], config.remat,
                lambda step: rate_share(config, config.max_steps, step))
  with finishing(exp, folder):
    if last and not trajectory.is_through(last):
      train(exp, folder, runs, how, lambda: start_memorized(exp, mine), trajectory.on_keep, ledger,
            reinforced=reinforced)


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
  for name in agree(lambda: [folder.name for folder in exp.checkpoints.glob("reinforce-*")]):
    folder = exp.checkpoints / name
    exp.shelf.forget(folder)
    for step in saved_steps(folder):
      remove(step_path(folder, step))
