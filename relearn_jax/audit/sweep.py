"""Choosing hyper-parameters of unlearning methods by their unlearned models alone; nothing is ever relearned here.

All candidates of a method, times the seeds, are entries of one stacked axis: one compiled step serves them all. The
rule: of the candidates whose runs all fell to `unlearn.max_asr` attack success within `unlearn.max_steps`, the one that
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

import jax
import numpy as np

from relearn_jax.audit.arms import mean_asr
from relearn_jax.audit.command import check, memorized
from relearn_jax.audit.comparison import one_audit
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.evaluate import finite_by_name
from relearn_jax.audit.run import Audit, every, reinforce, run_audit_stage
from relearn_jax.errors import InputError
from relearn_jax.models.model import Params
from relearn_jax.objectives.recipe import Recipe
from relearn_jax.objectives.settings import check_values
from relearn_jax.parallel.mesh import DEFAULT, shard_runs
from relearn_jax.progress import progress
from relearn_jax.training.ended import AllEnded, Ended
from relearn_jax.training.stage import Stage
from relearn_jax.workdir import claim_workdir, only_process

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
  methods: tuple[str, ...] = ()
  audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)


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
    cache: see `command.audit`.
    mesh: over which runs are spread.
  """
  audits = check_sweep(config, where)
  names = tuple(audits)
  claim_workdir(workdir, config)
  with only_process(workdir):
    results = workdir / "sweep"
    results.mkdir(exist_ok=True)
    state = None
    with progress(len(names), "methods", "method") as bar:
      for name in names:
        path = results / f"{name}.json"
        if not path.exists():
          state = state or memorized(one_audit(config.audit, "ga"), workdir, cache, mesh)
          found = _sweep_method(state, audits[name], name, config.grids[name])
          temporary = path.with_suffix(".tmp")
          temporary.write_text(json.dumps(found, indent=1) + "\n")
          temporary.replace(path)
        bar.update(1)
    all_results = {name: json.loads((results / f"{name}.json").read_text()) for name in names}
    (workdir / "sweep.json").write_text(json.dumps(all_results, indent=1) + "\n")
  return all_results


def check_sweep(config: Sweep, where: str) -> dict[str, AuditConfig]:
  """The audit of each method that is swept.

  Raises:
    InputError: there is no grid for a method, or something in an audit or a grid cannot work.
  """
  audits = {}
  for name in config.methods or tuple(config.grids):
    if name not in config.grids:
      raise InputError(f"has {name!r}, for which there is no grid", file=where, field="methods",
                       mend=f"expected some of {', '.join(config.grids)}")
    audits[name] = one_audit(config.audit, name)
    check(audits[name], where, False)
    _check_grid(audits[name].recipe, config.grids[name], where, f"grids.{name}")
  return audits


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


def candidate_groups(config: AuditConfig, grid: Mapping[str, Sequence[float]]
                     ) -> list[tuple[AuditConfig, list[Candidate]]]:
  """All candidates of a method, in groups that one compiled step serves; each with an audit of its own."""
  recipe = config.recipe
  groups: dict[tuple[tuple[str, float], ...], list[Candidate]] = {}
  for candidate in candidates(grid):
    fixed = tuple((k, v) for k, v in candidate.items() if k in recipe.settings and recipe.settings[k].static)
    groups.setdefault(fixed, []).append(candidate)
  found = []
  for fixed, members in groups.items():
    own = dataclasses.replace(config, methods=dataclasses.replace(config.methods, **{
        config.method: dataclasses.replace(config.method_config, **{
            k: int(v) if recipe.settings[k].whole else v for k, v in fixed})})) if fixed else config
    found.append((own, members))
  return found


def _sweep_method(audit: Audit, config: AuditConfig, name: str, grid: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """All candidates of a method, one group after the other."""
  before = [audit.ended("memorize")[run.name] for run in audit.runs if run.arm == "U" and run in audit.gone()]
  if len(before) == sum(run.arm == "U" for run in audit.runs):
    raise AllEnded(before, "memorize.learning_rate", config.memorize.learning_rate)
  tried: list[dict[str, Any]] = []
  for number, (own, members) in enumerate(candidate_groups(config, grid)):
    tried += _sweep_group(audit, own, f"sweep-{name}-{number}", members)
  if all(len(one["ended"]) == one["runs"] for one in tried):
    how = Ended(**tried[0]["ended"][0])
    raise InputError(f"has no candidate of which a run is left: with {_settings(tried[0])} {how}",
                     field=f"grids.{name}", mend="give lower learning rates")
  return {"chosen": choose(tried)["settings"], "tried": tried, "ended": [dataclasses.asdict(one) for one in before]}


def _sweep_group(audit: Audit, config: AuditConfig, stage_name: str, members: Sequence[Candidate]
                 ) -> list[dict[str, Any]]:
  recipe, settings = config.recipe, config.method_config
  gone = audit.gone()
  u_runs = [run for run in audit.runs if run.arm == "U" and run not in gone]
  runs = [run for _ in members for run in u_runs]
  value = lambda key, default: np.array([m.get(key, default) for m in members for _ in u_runs], np.float32)
  hyper = {"learning_rate": value("learning_rate", settings.learning_rate),
           "weight_decay": value("weight_decay", settings.weight_decay),
           **{key: value(key, default) for key, default in recipe.traced.items()}}
  places = [audit.runs.index(run) for run in runs]
  start = lambda: shard_runs(jax.tree.map(lambda leaf: leaf[np.array(places)],
                                          audit.load_kept("unlearn", 0, len(audit.runs))), audit.mesh)
  first: dict[int, tuple[int, float]] = {}  # place of a run -> its first step that is unlearned, and what it kept
  curves: list[list[float | None]] = []
  retain = audit.token_rows(runs, lambda case: case.retain)

  def on_keep(step: int, params: Params) -> bool:
    scores = audit.ask(params, retain, len(runs))
    ledger.look(step, "answers", finite_by_name(names, scores))
    asr = mean_asr(scores.asr)
    curves.append([float(x) if finite else None for x, finite in zip(asr, scores.finite, strict=True)])
    for place, name in enumerate(names):
      if place not in first and not ledger.has_ended(name, step) and asr[place] <= config.unlearn.max_asr:
        kept = scores.retain[place]
        first[place] = step, float(kept[~np.isnan(kept)].mean())  # NaN says that there is no such row; see `Scores`
    ledger.finish(names[place] for place in first)
    return all(place in first or ledger.has_ended(name, step) for place, name in enumerate(names))

  def reinforced() -> Params:
    params = reinforce(audit, start, config, runs, names, f"{stage_name}-reinforce")
    ledger.ignore(audit.ended(f"{stage_name}-reinforce"))
    return params

  names = [f"{run.name}-{i // len(u_runs)}" for i, run in enumerate(runs)]
  ledger = audit.ledger(stage_name, names, f"methods.{config.method}.learning_rate", hyper["learning_rate"])
  stage = Stage(stage_name, names, recipe.build, audit.unlearn_rows(runs, recipe.objective.rows), hyper,
                every(config.unlearn.max_steps, config.unlearn.keep_every))
  try:
    run_audit_stage(audit, stage, start, on_keep, ledger, reinforced, resume=False)
  except AllEnded:
    pass  # the table says so
  how = {one.run: dataclasses.asdict(one) for one in
         (*audit.ended(f"{stage_name}-reinforce").values(), *ledger.ended.values())}
  found = []
  for number, candidate in enumerate(members):
    mine = range(number * len(u_runs), (number + 1) * len(u_runs))
    reached = [first[place] for place in mine if place in first]
    found.append({
        "settings": candidate, "unlearned": len(reached), "runs": len(u_runs),
        "steps": [first[place][0] if place in first else None for place in mine],
        "retain": float(np.mean([kept for _, kept in reached])) if reached else None,
        "last_asr": [curves[-1][place] if curves else None for place in mine],
        "ended": [how[names[place]] for place in mine if names[place] in how]})
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
