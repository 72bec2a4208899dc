"""Choosing hyper-parameters of unlearning methods by their unlearned models alone; nothing is ever relearned here.

All candidates of a method, times the seeds, are entries of one stacked axis: one compiled step serves them all. The
rule: of the candidates whose runs all fell to a score of `unlearn.max_score` within `unlearn.max_steps`, the one that
then kept the most of the retained text (mean log-probability of its tokens, each run at its own first such step); where
none did, the one with the most runs that fell. A candidate of which a run ended before it fell, because something of it
was not finite, comes after all others, and is never chosen where no run of it is left.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit import acquire, unlearning
from relearn_jax.audit.acquire import Trained, every
from relearn_jax.audit.audit_config import Audit, UnlearnMethod, recorded, unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.interview import finite_by_name
from relearn_jax.audit.pipeline import Clock, open_experiment, prepare
from relearn_jax.audit.shelf import open_folder
from relearn_jax.audit.stages import MEMORIZE, first_stages
from relearn_jax.errors import InputError
from relearn_jax.models.model import Params
from relearn_jax.objectives.recipe import Recipe
from relearn_jax.objectives.settings import check_values
from relearn_jax.parallel.mesh import DEFAULT, check_mesh, make_mesh
from relearn_jax.parallel.processes import agree, write_atomically
from relearn_jax.progress import progress
from relearn_jax.training.ended import AllEnded, Ended, Ledger, read_ended
from relearn_jax.training.train_settings import rate_share
from relearn_jax.workdir import check_inputs_alike, claim_workdir, only_process

Candidate = dict[str, float]


@dataclasses.dataclass
class Sweep:
  """A sweep.

  Attributes:
    grids: name of a method, or "method+defence" -> setting (or "learning_rate") -> values; all combinations are tried.
    methods: which of them to sweep; all by default.
    audit: case, memorising and unlearning; seeds should be others than those of the audits that the choice is for.
  """

  grids: dict[str, dict[str, tuple[float, ...]]]
  audit: Audit
  methods: tuple[str, ...] = ()


def candidates(grid: Mapping[str, Sequence[float]]) -> list[Candidate]:
  """All combinations of a grid's values."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """The candidate that the rule takes; see the module. Of equals the first."""
  return max(tried, key=lambda one: (not one["ended"], one["unlearned"],
                                     one["retain"] if one["retain"] is not None else -math.inf))


def sweep(config: Sweep, where: str, workdir: pathlib.Path, cache: pathlib.Path, mesh: str = DEFAULT) -> dict[str, Any]:
  """Runs or continues a sweep; returns, and writes to `sweep.json`, what was tried and what was chosen.

  Args:
    config: what to try.
    where: the file it came from, for messages.
    workdir: with another configuration in it, it is refused. `sweep/NAME.json` is the result of one method.
    cache: see `pipeline.audit`.
    mesh: over which runs are spread.
  """
  methods = check_sweep(config, where)
  # Checks that the case has what the methods read; nothing is attacked.
  own = dataclasses.replace(config.audit, unlearn=dataclasses.replace(config.audit.unlearn, methods=tuple(methods)))
  exp = prepare(own, where, workdir, False)
  check_inputs_alike(exp.digests)
  claim_workdir(workdir, {"grids": {name: config.grids[name] for name in methods}, "audit": recorded(own)},
                axes=("grids", "audit.unlearn.methods", "audit.unlearn.settings"))
  with only_process(workdir):
    results = workdir / "sweep"
    there = agree(lambda: [name for name in methods if (results / f"{name}.json").exists()])
    if set(there) < set(methods):
      _memorize(exp, cache, mesh)
    with progress(len(methods), "methods", "method") as bar:
      for name, method in methods.items():
        path = results / f"{name}.json"
        if name not in there:
          found = _sweep_method(exp, method, config.grids[name])
          write_atomically(path, json.dumps(found, indent=1) + "\n")
        bar.update(1)
    all_results = agree(lambda: {name: json.loads((results / f"{name}.json").read_text()) for name in methods})
    write_atomically(workdir / "sweep.json", json.dumps(all_results, indent=1) + "\n")
  return all_results


def _memorize(exp: Experiment, cache: pathlib.Path, mesh: str) -> None:
  """The models that all candidates start from."""
  clock = Clock(exp.checkpoints / "seconds.json")
  open_experiment(exp, cache, make_mesh(check_mesh(mesh, exp.decoder), config=exp.decoder), clock, len(exp.chains))
  for stage in first_stages(exp.config):
    if stage.kind == MEMORIZE:
      acquire.memorize(exp, stage, exp.chains)


def check_sweep(config: Sweep, where: str) -> dict[str, UnlearnMethod]:
  """The methods that are swept.

  Raises:
    InputError: there is no grid for a method, or something in a grid cannot work.
  """
  methods = {}
  for name in config.methods or tuple(config.grids):
    if name not in config.grids:
      raise InputError(f"has {name!r}, for which there is no grid", file=where, field="methods",
                       mend=f"expected some of {', '.join(config.grids)}")
    try:
      methods[name] = unlearn_method(config.audit.unlearn, name)
    except InputError as error:
      raise InputError(error.problem, file=where, field="methods", mend=error.mend) from None
    _check_grid(methods[name].recipe, config.grids[name], where, f"grids.{name}")
  return methods


def _check_grid(recipe: Recipe, grid: Mapping[str, Sequence[float]], where: str, field: str) -> None:
  for key, values in grid.items():
    if key != "learning_rate" and key not in recipe.settings:
      raise InputError("is no setting of it", file=where, field=f"{field}.{key}",
                       mend=f"expected learning_rate, {', '.join(recipe.settings)}")
    for value in values:
      if key in recipe.settings:
        check_values({key: recipe.settings[key]}, {key: value}, field)
      elif not 0 < value < math.inf:
        raise InputError(f"has {value!r}", file=where, field=f"{field}.{key}", mend="expected positive numbers")


def candidate_groups(method: UnlearnMethod, grid: Mapping[str, Sequence[float]]
                     ) -> list[tuple[UnlearnMethod, list[Candidate]]]:
  """All candidates of a method, in groups that one compiled step serves, with what the members have in common."""
  recipe = method.recipe
  groups: dict[tuple[tuple[str, float], ...], list[Candidate]] = {}
  for candidate in candidates(grid):
    fixed = tuple((k, v) for k, v in candidate.items() if k in recipe.settings and recipe.settings[k].static)
    groups.setdefault(fixed, []).append(candidate)
  return [(dataclasses.replace(method, recipe=dataclasses.replace(recipe, hyper={
      **recipe.hyper, **{k: int(v) if recipe.settings[k].whole else v for k, v in fixed}})), members)
      for fixed, members in groups.items()]


def _sweep_method(exp: Experiment, method: UnlearnMethod, grid: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """All candidates of a method, one group after the other."""
  lost = acquire.gone(exp)
  before = [read_ended(folder.path)[run] for chain in exp.chains if chain.arm == "U" and chain in lost
            for folder, run in (exp.done[exp.memorized_keys[chain]],)]
  if len(before) == sum(chain.arm == "U" for chain in exp.chains):
    raise AllEnded(before, "memorize.learning_rate", exp.config.memorize.learning_rate)
  tried: list[dict[str, Any]] = []
  for number, (own, members) in enumerate(candidate_groups(method, grid)):
    tried += _sweep_group(exp, own, f"sweep-{method.name}-{number}", members)
  if all(len(one["ended"]) == one["runs"] for one in tried):
    how = Ended(**tried[0]["ended"][0])
    raise InputError(f"has no candidate of which a run is left: with {_settings(tried[0])} {how}",
                     field=f"grids.{method.name}", mend="give lower learning rates")
  return {"chosen": choose(tried)["settings"], "tried": tried, "ended": [dataclasses.asdict(one) for one in before]}


def _sweep_group(exp: Experiment, method: UnlearnMethod, name: str, members: Sequence[Candidate]
                 ) -> list[dict[str, Any]]:
  config, recipe, lost = exp.config.unlearn, method.recipe, acquire.gone(exp)
  u_chains = [chain for chain in exp.chains if chain.arm == "U" and chain not in lost]
  mine = [chain for _ in members for chain in u_chains]
  runs = [f"{chain.name}-{i // len(u_chains)}" for i, chain in enumerate(mine)]
  value = lambda key, default: np.array([m.get(key, default) for m in members for _ in u_chains], np.float32)
  hyper = {"learning_rate": value("learning_rate", method.learning_rate),
           "weight_decay": value("weight_decay", method.weight_decay),
           **{key: value(key, default) for key, default in recipe.traced.items()}}
  folder = open_folder(exp.checkpoints, name, dict.fromkeys(runs, ""))
  field = f"unlearn.settings.{recipe.method}.learning_rate"
  ledger = Ledger(folder.path, folder.name, runs, field, hyper["learning_rate"])
  watch = _Watch(exp, runs, mine, ledger)
  how = Trained(recipe.build, {rows: exp.rows(mine, rows) for rows in sorted(recipe.objective.rows)}, hyper,
                every(config.max_steps, config.keep_every), config.batch_size, config.num_microbatches,
                [chain.seed for chain in mine], config.remat, lambda step: rate_share(config, config.max_steps, step))
  second = open_folder(exp.checkpoints, f"{name}-reinforce", dict.fromkeys(runs, ""))
  try:
    if recipe.published.reinforces:
      unlearning.train_reinforced(exp, second, method, mine, runs)
      ledger.ignore(read_ended(second.path))
    acquire.train(exp, folder, runs, how, lambda: unlearning.start_memorized(exp, mine), watch.on_keep, ledger,
                  reinforced=(lambda: unlearning.start_reinforced(exp, method, [(second, run) for run in runs]))
                  if recipe.published.reinforces else None, resumes=False)
  except AllEnded:
    pass  # the table says so
  exp.shelf.forget(folder.path, second.path)
  return watch.table(members, len(u_chains), {**read_ended(second.path), **ledger.ended})


class _Watch:
  """When each run of a stage was unlearned, and what it had kept by then."""

  def __init__(self, exp: Experiment, runs: Sequence[str], chains: Sequence[Any], ledger: Ledger):
    self.exp, self.runs, self.ledger = exp, runs, ledger
    self.retain = {"retain": exp.rows(chains, "retain", scored=True)}
    self.first: dict[int, tuple[int, float]] = {}  # place of a run -> its first unlearned step, and what it kept
    self.curves: list[list[float | None]] = []

  def on_keep(self, step: int, params: Params) -> bool:
    """Asks all runs; ends the stage where all are unlearned or have ended."""
    answers = self.exp.interviewer()(params, self.retain, self.runs)
    self.ledger.look(step, "answers", finite_by_name(answers))
    scores = self.exp.mean_scores(answers)
    self.curves.append([float(x) if finite else None for x, finite in zip(scores, answers.finite, strict=True)])
    assert answers.retain is not None
    for place, run in enumerate(self.runs):
      if (place not in self.first and not self.ledger.has_ended(run, step)
          and scores[place] <= self.exp.config.unlearn.max_score):
        kept = answers.retain[place]
        self.first[place] = step, float(kept[~np.isnan(kept)].mean())  # NaN says that there is no such row
    self.ledger.finish(self.runs[place] for place in self.first)
    return all(place in self.first or self.ledger.has_ended(run, step) for place, run in enumerate(self.runs))

  def table(self, members: Sequence[Candidate], each: int, ended: Mapping[str, Ended]) -> list[dict[str, Any]]:
    """A row a candidate, of `each` runs."""
    found = []
    for number, candidate in enumerate(members):
      places = range(number * each, (number + 1) * each)
      reached = [self.first[place] for place in places if place in self.first]
      found.append({
          "settings": candidate, "unlearned": len(reached), "runs": each,
          "steps": [self.first[place][0] if place in self.first else None for place in places],
          "retain": float(np.mean([kept for _, kept in reached])) if reached else None,
          "last_score": [self.curves[-1][place] if self.curves else None for place in places],
          "ended": [dataclasses.asdict(ended[self.runs[place]]) for place in places if self.runs[place] in ended]})
    return found


def sweep_table(results: Mapping[str, Any]) -> str:
  """A line a candidate, the chosen one marked, and a sentence a run that ended."""
  lines = ["| method | settings | unlearned runs | steps | retained text, nats a token | |", "|" + " --- |" * 6]
  for name, found in results.items():
    for one in found["tried"]:
      steps = ", ".join("–" if step is None else str(step) for step in one["steps"])
      kept = "–" if one["retain"] is None else f"{one['retain']:.3f}"
      mark = "chosen" if one["settings"] == found["chosen"] else ""
      lost = f", {len(one['ended'])} not finite" if one["ended"] else ""
      fell = f"{one['unlearned']} of {one['runs']}{lost}"
      lines.append(f"| {name} | {_settings(one)} | {fell} | {steps} | {kept} | {mark} |")
  ended = [f"{name}, {_settings(one)}: {Ended(**how)}." for name, found in results.items() for one in found["tried"]
           for how in one["ended"]]
  before = [f"{Ended(**how)}; no candidate starts from it." for found in results.values() for how in found["ended"]]
  ended += dict.fromkeys(before)
  return "\n".join([*lines, *([""] if ended else []), *ended])


def _settings(one: Mapping[str, Any]) -> str:
  return ", ".join(f"{key} {value:g}" for key, value in one["settings"].items())
