"""The one audit: stages in their order, each timed, each skipped where its results are on disk."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from jax.sharding import Mesh

from relearn_jax.audit import acquire, unlearning
from relearn_jax.audit.attack import attack
from relearn_jax.audit.audit_config import Audit, recorded, unlearn_method
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.claims import Claims, recorded_stage, refuse_shared, write_plan
from relearn_jax.audit.collect import Found, answer_tables, find
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.facts import make_facts
from relearn_jax.audit.grid import Cell, Chain
from relearn_jax.audit.leaks import refuse_leaks
from relearn_jax.audit.remote_attack import check_cost
from relearn_jax.audit.results_file import ANSWERS_FILE, RESULTS_FILE, score_answers, write_rows
from relearn_jax.audit.stages import MEMORIZE, PRETRAIN, AtOnce, Planned, plan_stages
from relearn_jax.config_files import PATHS
from relearn_jax.parallel.mesh import DEFAULT, check_mesh, make_mesh
from relearn_jax.parallel.processes import agree, by_first, remove, write_atomically
from relearn_jax.training.checkpoints import remove_resumes
from relearn_jax.training.ended import AllEnded, Ended
from relearn_jax.workdir import check_inputs_alike, claim_workdir, is_claimed, only_process

OUTPUTS = (RESULTS_FILE, ANSWERS_FILE, "summary.json", "report.html", "report.md")
# Fields that may become longer, and groups that may come into use, in a workdir that has results of a smaller grid.
AXES = ("seeds", "case.variants", "unlearn.methods", "unlearn.settings", "attack.relearn_sets", "attack.controls",
        "attack.learning_rates", "attack.adapters", "attack.lora", "attack.api",
        "attack.api.learning_rates", "attack.search")


class Clock:
  """Seconds spent in each stage, kept across restarts in `checkpoints/seconds.json`."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.seconds: dict[str, float] = agree(lambda: json.loads(path.read_text()) if path.exists() else {})

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - begin, 2)
      write_atomically(self.path, json.dumps(self.seconds))


def total_seconds(checkpoints: pathlib.Path) -> dict[str, float]:
  """Seconds of each stage, by all commands that have worked on it."""
  found: dict[str, float] = {}
  for path in sorted(checkpoints.glob("seconds*.json")):
    for stage, seconds in json.loads(path.read_text()).items():
      found[stage] = round(found.get(stage, 0.0) + seconds, 2)
  return found


def prepare(config: Audit, where: str, workdir: pathlib.Path, allow_leakage: bool) -> Experiment:
  """Everything that can be wrong with an audit, before any device work.

  Raises:
    InputError: a setting, a file, a checkpoint or a row is wrong, or a relearn set holds what is asked about (unless
      allowed).
  """
  check_audit(config, where)
  exp = Experiment(config, where, workdir)
  for name, case in [(f" ({chain.name})", case) for chain, case in exp.cases.items()] or [("", exp.first)]:
    refuse_leaks(case, where, allow_leakage, config.allowed_lines, name)
  return exp


def audit(config: Audit, where: str, workdir: pathlib.Path, cache: pathlib.Path, *, allow_leakage: bool = False,
          mesh: str = DEFAULT, at_once: Callable[[Experiment, Mesh], AtOnce] | None = None,
          max_cost: float | None = None, claim: bool = False) -> bool:
  """Runs or continues an audit, up to its rows; returns False where nothing was left to do, not even a report.

  Args:
    config: the configuration, overrides applied.
    where: the file it came from, for messages.
    workdir: everything is written here; with another configuration in it, or made from other contents of files, it is
      refused. A configuration with longer axes goes on with what is there.
    cache: pretrained models are taken from here, or trained and put here.
    allow_leakage: go on although a relearn set leaks.
    mesh: over which runs, and the devices of a run, are spread; results do not depend on it, up to rounding.
    at_once: where `attack.runs_at_once` is 0, decides how many runs of an attack are trained side by side.
    max_cost: of all that a provider trains; an audit that would cost more is refused before it begins.
    claim: other commands work through the same grid; see `claims`.
  """
  exp = prepare(config, where, workdir, allow_leakage)
  check_cost(exp, plan_stages(config, exp.relearn_sets), max_cost)
  sizes, digests = check_mesh(mesh, exp.decoder), exp.digests()
  check_inputs_alike(lambda: digests)
  named = [one.name for one in exp.first.relearn_sets]  # another relearn set makes the grid larger, another model not
  own = workdir, recorded(config), digests, PATHS, AXES, named
  with contextlib.ExitStack() as ours:
    claims = None
    if claim:
      is_claimed(*own)  # refused before anything is written
      claims = ours.enter_context(Claims(workdir))
      with claims.hold("config"):
        with only_process(workdir):  # refused where a command has the workdir to itself
          if not (known := is_claimed(*own)):
            claims.refuse_larger()
            claim_workdir(*own)
            by_first(lambda: _remove_outputs(workdir))
    else:
      known = claim_workdir(*own)
      ours.enter_context(only_process(workdir))
      refuse_shared(workdir)
      if not known:
        by_first(lambda: _remove_outputs(workdir))
    if known and agree(lambda: all((workdir / name).exists() for name in OUTPUTS)):
      return False
    if not agree((workdir / RESULTS_FILE).exists):
      clock = Clock(claims.seconds_file() if claims else workdir / "checkpoints" / "seconds.json")
      stages = run_stages(exp, cache, make_mesh(sizes, config=exp.decoder), clock, at_once, claims)
      with claims.hold("results") if claims else contextlib.nullcontext():
        if not agree((workdir / RESULTS_FILE).exists):  # no other command was the last
          if claims:
            by_first(claims.merge_logs)
          with exp.beside:
            found = conclude(exp, stages)
            by_first(lambda: write_results(exp, found, digests, total_seconds(workdir / "checkpoints")))
  return True


def _remove_outputs(workdir: pathlib.Path) -> None:
  for name in OUTPUTS:
    (workdir / name).unlink(missing_ok=True)


def write_results(exp: Experiment, found: Found, digests: Any, seconds: Any) -> None:
  """Writes answers.parquet and results.parquet (last)."""
  answers = answer_tables(exp, found)
  facts = make_facts(exp, found, digests, seconds)
  write_rows(exp.workdir / ANSWERS_FILE, answers, facts)
  frame: pd.DataFrame = pa.concat_tables(answers).unify_dictionaries().to_pandas()
  metrics = list(dict.fromkeys((exp.first.metric, *exp.config.ask.metrics)))
  scores = score_answers(frame, exp.questions, metrics, exp.choices)
  exp.beside.wait()  # with this file an audit is done
  write_rows(exp.workdir / RESULTS_FILE, [scores], facts)


def open_experiment(exp: Experiment, cache: pathlib.Path, mesh: Mesh, clock: Clock, most: int) -> None:
  """Takes the model that all begin as; from here on devices are used. At most `most` runs are asked together."""
  by_first(lambda: exp.checkpoints.mkdir(parents=True, exist_ok=True))

  def pretrain(folder: pathlib.Path) -> None:
    with clock(PRETRAIN):
      acquire.pretrain(exp, cache, folder)
  exp.open(mesh, cache, most, pretrain)


def run_stages(exp: Experiment, cache: pathlib.Path, mesh: Mesh, clock: Clock,
               at_once: Callable[[Experiment, Mesh], AtOnce] | None = None, claims: Claims | None = None
               ) -> list[Planned]:
  """Runs every stage that is left, and returns all of them.

  Raises:
    AllEnded: no run is left of memorising.
  """
  if claims:  # others write their log at the same time
    exp.log = claims.log(PRETRAIN)
  limit = at_once(exp, mesh) if at_once else lambda stage: len(stage.cells)
  with claims.hold("plan") if claims else contextlib.nullcontext():
    stages = plan_stages(exp.config, exp.relearn_sets, claims.at_once(limit) if claims else limit)
    write_plan(exp, stages)
  # Models that are trained, or copied to the workdir, before the first stage.
  writes = exp.config.arms.memorized or (not exp.checked and not agree((exp.checkpoints / "base").exists))
  with claims.hold("base") if claims and writes else contextlib.nullcontext():
    open_experiment(exp, cache, mesh, clock, max(len(stage.runs) for stage in stages))
  found = _Stages(exp, stages, clock)
  if claims:
    claims.work_through(exp, stages, found.cells, found.do)
  else:
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
      found.do(stage, following)
  return stages


class _Stages:
  """The stages of an audit, each of which can be done once those are that it needs.

  Attributes:
    steps: method -> unlearn steps of its U chains, once it is through.
    lost: method, and None for memorising -> chains that ended.
  """

  def __init__(self, exp: Experiment, stages: Sequence[Planned], clock: Clock):
    self.exp, self.stages, self.clock = exp, stages, clock
    self.steps: dict[str, dict[Chain, list[int]]] = {}
    self.lost: dict[str | None, dict[Chain, int]] = {}

  def do(self, stage: Planned, following: Planned | None = None) -> None:
    """Does what is left of a stage; meanwhile what the following one begins with may be read."""
    if stage.kind == PRETRAIN:
      return
    exp = self.exp
    with recorded_stage(exp, stage, self.clock.seconds), self.clock(stage.name), exp.beside:
      if stage.kind == MEMORIZE:
        with contextlib.suppress(AllEnded):  # of this part; `_refuse_all` looks whether any is left
          acquire.memorize(exp, stage, unlearning.wanted(exp, self.stages))
        _refuse_all(exp, [exp.memorized_keys[chain] for chain in exp.chains], "memorize.learning_rate",
                    exp.config.memorize.learning_rate)
      elif stage.kind == "attack":
        attack(exp, stage, self.cells(stage), following)
      else:
        exp.shelf.forget(*(path for path in exp.shelf.folders() if path.name.startswith("unlearn-")))  # attacked by now
        _unlearn(exp, stage)

  def cells(self, stage: Planned) -> list[Cell]:
    """Those of an attack whose points there are, with their unlearn steps; its method is through."""
    exp, method = self.exp, next((cell.point.method for cell in stage.cells if cell.point.arm != "O"), None)
    if None not in self.lost:
      self.lost[None] = acquire.gone(exp)
    if exp.chains and method and method not in self.steps:  # none where the original alone is attacked
      found = unlearn_method(exp.config.unlearn, method)
      self.steps[found.name], self.lost[found.name] = unlearning.unlearned_points(exp, found), acquire.gone(exp, found)
    there = [(unlearning.resolved(exp, cell.point, self.steps, self.lost), cell.attack) for cell in stage.cells]
    return [Cell(point, how) for point, how in there if point]


def conclude(exp: Experiment, stages: Sequence[Planned]) -> Found:
  """Removes what nothing goes on from, beside what comes next, and returns what became of all stages.

  Raises:
    AllEnded: no run is left of any method, or of any attack.
  """
  _refuse_all_methods(exp)
  exp.beside.do(lambda: _tidy(exp))
  result = find(exp, stages)
  _refuse_all(exp, [exp.attacked_key(cell) for cell in result.cells], "attack.learning_rates",
              exp.config.attack.learning_rates)
  return result


def _unlearn(exp: Experiment, stage: Planned) -> None:
  """Unlearning by one method, of which all runs may end: the other methods go on."""
  try:
    (unlearning.reinforce if stage.kind == "reinforce" else unlearning.unlearn)(exp, stage)
  except AllEnded:
    pass  # `_refuse_all_methods` looks whether any is left


def _refuse_all(exp: Experiment, keys: Sequence[str], field: str, rates: Any) -> None:
  """`AllEnded` where every run of some content keys has ended."""
  ended = [one for one in map(exp.ended, keys) if one is not None]
  if keys and len(ended) == len(keys):
    raise AllEnded(ended, field, rates)


def _refuse_all_methods(exp: Experiment) -> None:
  """`AllEnded` where no chain is left of any method."""
  methods = [unlearn_method(exp.config.unlearn, name) for name in exp.config.unlearn.methods] if exp.chains else []
  every: list[Ended] = []
  chains = [chain for chain in exp.chains if chain not in acquire.gone(exp)]
  for method in methods:
    keys = lambda chain, method=method: [exp.unlearned_key(chain, method, kind) for kind in ("reinforce", "unlearn")]
    of = [next(filter(None, map(exp.ended, keys(chain))), None) for chain in chains]
    if not of or any(one is None for one in of):
      return
    every += [one for one in of if one]
  if every:
    raise AllEnded(every, f"unlearn.settings.{methods[0].recipe.method}.learning_rate",
                   [method.learning_rate for method in methods])


def _tidy(exp: Experiment) -> None:
  """Removes what nothing goes on from; unless all weights are wanted, those of models that are not attacked too."""
  remove_resumes(exp.checkpoints)
  if exp.config.keep_weights or not exp.chains:
    return
  if exp.config.arms.memorized:
    remove(exp.given)
  for chain in exp.chains if not exp.config.arms.memorized else ():
    folder, step, _ = acquire.memorized_place(exp, chain)
    exp.shelf.narrow(folder, step, [one.name for one in exp.chains if one.arm == "U"], exp.model, folder.name,
                     exp.one_run())
  unlearning.remove_reinforced(exp)
