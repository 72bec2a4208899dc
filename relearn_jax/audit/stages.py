"""The stages of an audit: a pure function of its configuration, which the pipeline runs and `relearn plan` prices.

A stage has one name: here, in the log, in the checkpoints and among the seconds.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from relearn_jax.audit.api_settings import API
from relearn_jax.audit.audit_config import FULL, Audit, UnlearnMethod, unlearn_method
from relearn_jax.audit.grid import Attack, Cell, Chain, Point, attacks, chains, loaded_points, trained_points

PRETRAIN, MEMORIZE = "pretrain", "memorize"


@dataclasses.dataclass(frozen=True)
class Planned:
  """A stage.

  Attributes:
    name: of it.
    kind: what it does.
    steps: of training, at most.
    chains: the runs of "memorize", "reinforce" and "unlearn".
    cells: the runs of "attack"; the unlearn steps of their points are not known yet.
    method: of "reinforce" and "unlearn".
    batch_size: rows of a step of each data set; 0: all.
  """

  name: str
  kind: Literal["pretrain", "memorize", "reinforce", "unlearn", "attack"]
  steps: int
  chains: tuple[Chain, ...] = ()
  cells: tuple[Cell, ...] = ()
  method: UnlearnMethod | None = None
  batch_size: int = 0

  @property
  def runs(self) -> tuple[str, ...]:
    """Names of the stacked runs."""
    return tuple(chain.name for chain in self.chains) + tuple(cell.name for cell in self.cells) or (self.name,)

  @property
  def attack(self) -> Attack:
    """What the cells have in common: relearn set, adapter and batch size."""
    return self.cells[0].attack

  @property
  def points(self) -> tuple[Point, ...]:
    """The models that are attacked, each once."""
    return tuple(dict.fromkeys(cell.point for cell in self.cells))


AtOnce = Callable[[Planned], int]  # an attack of all its cells -> how many of them may be trained side by side


def plan_stages(config: Audit, relearn_sets: Sequence[str], at_once: AtOnce = lambda stage: len(stage.cells)
                ) -> list[Planned]:
  """All stages, in the order in which they run.

  Args:
    config: of the audit.
    relearn_sets: names of the case's relearn sets that are attacked with.
    at_once: decides where `attack.runs_at_once` is 0.
  """
  if config.arms.loaded:
    stages = _loaded_buckets(config, relearn_sets)
  else:
    stages = first_stages(config)
    for name in config.unlearn.methods:
      stages += unlearn_stages(config, unlearn_method(config.unlearn, name))
      stages += _trained_buckets(config, name, relearn_sets)
  found = []
  for stage in stages:
    found += _split(stage, config.attack.runs_at_once or at_once(stage)) if stage.kind == "attack" else [stage]
  return found


def first_stages(config: Audit) -> list[Planned]:
  """What does not depend on the method: the model that all begin as, and the models that have memorised the case."""
  memorize = config.memorize
  if config.arms.memorized:
    return []
  pretrain = [] if config.arms.start else [Planned(PRETRAIN, "pretrain", config.arms.pretrain.steps)]
  stage = Planned(MEMORIZE, "memorize", memorize.steps, tuple(chains(config)), batch_size=memorize.batch_size)
  return [*pretrain, *_split(stage, memorize.runs_at_once)]


def unlearn_stages(config: Audit, method: UnlearnMethod) -> list[Planned]:
  """Unlearning by a method, and before it the training of a second model that it may compare with."""
  every, size = tuple(chains(config)), config.unlearn.batch_size
  found = [Planned(f"unlearn-{method.name}", "unlearn", config.unlearn.max_steps, every, method=method,
                   batch_size=size)]
  if method.recipe.published.reinforces:
    steps = int(method.recipe.hyper["reinforce_steps"])
    found.insert(0, Planned(f"reinforce-{method.name}", "reinforce", steps, every, method=method, batch_size=size))
  return [part for stage in found for part in _split(stage, config.unlearn.runs_at_once)]


def _alike(config: Audit, relearn_sets: Sequence[str]) -> list[tuple[Attack, list[Attack]]]:
  """Attacks that differ in their learning rate alone, with the first of them."""
  groups: dict[tuple, list[Attack]] = {}
  for attack in attacks(config, relearn_sets):
    groups.setdefault((attack.relearn_set, attack.adapter, attack.batch_size), []).append(attack)
  return [(group[0], group) for group in groups.values()]


def _stage(config: Audit, name: str, points: Iterable[Point], group: Sequence[Attack]) -> Planned:
  """All of the points under one attack after the other."""
  first, points = group[0], list(points)
  batch = "" if first.batch_size is None else f"-batch{first.batch_size}"
  size = config.attack.batch_size if first.batch_size is None else first.batch_size
  return Planned(
      f"attack-{name}{first.relearn_set}-{first.adapter}{batch}", "attack", config.attack.keep_steps[-1],
      cells=tuple(Cell(point, attack) for attack in group for point in points), batch_size=size)


def _trained_buckets(config: Audit, method: str, relearn_sets: Sequence[str]) -> list[Planned]:
  """One for each seed and kind of attack on a method; the original is attacked beside the first method."""
  found = []
  for seed, (_, group) in itertools.product(config.seeds, _alike(config, relearn_sets)):
    points = trained_points(config, method, seed, original=method == config.unlearn.methods[0])
    stage = _stage(config, f"{method}-", points, group)
    found.append(dataclasses.replace(stage, name=f"{stage.name}-seed{seed}"))
  return found


def _loaded_buckets(config: Audit, relearn_sets: Sequence[str]) -> list[Planned]:
  """One for each kind of attack; where adapters are trained here, of one arm, whose frozen base all its runs share."""
  points, found = loaded_points(config), []
  for first, group in _alike(config, relearn_sets):
    if first.adapter in (FULL, API):
      found.append(_stage(config, "", points, group))
    else:
      found += [_stage(config, f"{arm}-", [point for point in points if point.arm == arm], group)
                for arm in config.arms.loaded]
  return found


def _split(stage: Planned, size: int) -> list[Planned]:
  """The stage in parts of at most `size` runs, numbered where there are several; 0: in one."""
  size = size or len(stage.runs)
  if size >= len(stage.runs):
    return [stage]
  return [dataclasses.replace(stage, name=f"{stage.name}-part{number}", chains=stage.chains[start:start + size],
                              cells=stage.cells[start:start + size])
          for number, start in enumerate(range(0, len(stage.runs), size))]
