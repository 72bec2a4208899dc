"""From stored scores to rows and facts: a pure function of an audit's files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from relearn_jax.audit.arms import Cell, Run, attacked_cells, cells_of_seed
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.evaluate import Scores, load_scores
from relearn_jax.audit.rows import block
from relearn_jax.audit.run import Audit
from relearn_jax.cases.leakage import Leakage, check_case
from relearn_jax.models.model import fingerprint
from relearn_jax.training.ended import Ended
from relearn_jax.workdir import to_dict

Points = Mapping[tuple[int, int], Sequence[int]]
EXAMPLES = 3  # questions shown in the report, the first ones: nothing is picked
PACKAGES = ("relearn_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")  # named in the report

# The paper's table for Llama-2-7b (Hu et al., ICLR 2025, section 5), shown beside ours.
REFERENCE = {
    "text": "Hu, Fu, Wu, Smith (ICLR 2025), Llama-2-7b, no intervals published",
    "unlearned": {"7": 0.0, "5": 0.0, "3": 0.0, "1": 0.0}, "relearned": {"7": 1.0, "5": 0.97, "3": 0.23, "1": 0.0}}


def score_tables(scores: Scores, index: int, questions: list[str], **labels: Any) -> list[pa.Table]:
  """The rows of one model that has not ended: a value a question, or a scored row, and metric."""
  columns = {"asr": (questions, scores.asr, None), "logprob": (questions, scores.logprob, None)}
  for name, means in (("retain", scores.retain), ("forget", scores.forget), ("relearn", scores.relearn)):
    if means is not None:  # NaN says that there is no such row; see `Scores`
      columns[f"{name}_logprob"] = [f"{name}{i:02d}" for i in range(means.shape[1])], means, ~np.isnan(means[index])
  return [block(values[index].astype(np.float64), ids, there, metric=metric, **labels)
          for metric, (ids, values, there) in columns.items()]


def leakage_fact(found: Leakage, variant: str, seed: int | None) -> dict[str, Any]:
  """The outcome of a leakage check as the report shows it; `seed` is None where all seeds share the text.

  `hits` and `possible` are those of `Leakage`: a possible finding that was allowed is no hit.
  """
  return {"relearn_set": found.relearn_set, "variant": variant, "seed": seed, "num_lines": found.num_lines,
          "hits": [dataclasses.asdict(hit) for hit in found.hits],
          "possible": [dataclasses.asdict(hit) for hit in found.possible], "passed": found.passed,
          "digest": found.digest}


def versions() -> dict[str, str]:
  """Packages, and the devices there are."""
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {name: metadata.version(name) for name in PACKAGES} | {"devices": devices}


def result_tables(audit: Audit, points: Points, last_step: int) -> list[pa.Table]:
  """Every row of the audit, from `checkpoints/scores/`.

  Args:
    audit: the audit.
    points: unlearn steps of each (variant, seed), by depth.
    last_step: the last step of the unlearning trajectory.

  Returns:
    None of a run from the step on at which it ended.
  """
  config, gone = audit.config, audit.gone()
  questions = [q.id for q in audit.cases[audit.runs[0]].questions]
  always = {"case": "names", "method": config.recipe.name, "adapter": "full"}
  still = {**always, "relearn_set": None, "relearn_step": 0, "depth": None}
  tables: list[pa.Table] = []
  label = lambda run: {"variant": str(run.variant), "seed": run.seed}

  memorized = load_scores(audit.scores / "memorize.npz")
  for i, run in enumerate(audit.runs):
    if gone.get(run, math.inf) > 0:
      tables += score_tables(memorized, i, questions, **still, **label(run), arm="O" if run.arm == "U" else "N",
                        point="original", unlearn_step=0, learning_rate=config.memorize.learning_rate)
  u_runs = [run for run in audit.runs if run.arm == "U"]
  for path in sorted(audit.scores.glob("unlearn-*.npz")):
    step, scores = int(path.stem.split("-")[1]), load_scores(path)
    for i, run in enumerate(u_runs if step else ()):
      # A run that is beyond its last depth is no longer watched, but shown as long as its numbers are finite.
      if step >= gone.get(run, math.inf) or not scores.finite[i]:
        continue
      tables += score_tables(scores, i, questions, **still, **label(run), arm="U", point="trajectory",
                             unlearn_step=step, learning_rate=config.method_config.learning_rate)
  for seed in config.case.seeds:
    cells, ended = cells_of_seed(config, seed, points, last_step, gone), audit.ended(f"relearn-seed{seed}")
    attacked = attacked_cells(config, cells)
    for step in (0, *config.relearn.keep_steps):
      scores = load_scores(audit.scores / f"relearn-seed{seed}-{step:06d}.npz")
      for i, cell in enumerate(attacked if step else attacked[:len(cells)]):
        # O before relearning is the original, above.
        if not _has_answers(cell, step, ended) or (step == 0 and cell.arm == "O"):
          continue
        tables += score_tables(
            scores, i, questions, **always, **label(cell.run), arm=cell.arm, point="relearned" if step else "unlearned",
            depth=cell.depth, unlearn_step=cell.unlearn_step,
            relearn_set=audit.cases[cell.run].relearn_sets[0].name if step else None, relearn_step=step,
            learning_rate=(config.relearn.learning_rates[i // len(cells)] if step
                           else config.method_config.learning_rate))
  return tables


def _has_answers(cell: Cell, step: int, ended: Mapping[str, Ended]) -> bool:
  """Whether there is a model of this cell at a relearn step that can be asked."""
  return not cell.missing and not (cell.name in ended and ended[cell.name].step <= step)


def ended_facts(audit: Audit, points: Points, last_step: int) -> list[dict[str, Any]]:
  """Every run that ended: the run, its arm, variant and seed as they stand in the rows, stage, step and what."""
  named = {run.name: run for run in audit.runs}
  found = [ended_fact(one, named[one.run].arm, str(named[one.run].variant), named[one.run].seed)
           for stage in ("memorize", "reinforce", "unlearn") for one in audit.ended(stage).values()]
  for seed in audit.config.case.seeds:
    cells = {cell.name: cell for cell in attacked_cells(
        audit.config, cells_of_seed(audit.config, seed, points, last_step, audit.gone()))}
    found += [ended_fact(one, cells[one.run].arm, str(cells[one.run].run.variant), seed)
              for one in audit.ended(f"relearn-seed{seed}").values()]
  return found


def ended_fact(one: Ended, arm: str, variant: str, seed: int) -> dict[str, Any]:
  """A run that ended, as it stands in the facts."""
  return {"run": one.run, "arm": arm, "variant": variant, "seed": seed, "stage": one.stage, "step": one.step,
          "what": one.what}


def ended_notes(ended: Sequence[Mapping[str, Any]]) -> list[str]:
  """A line for the reader on each run that ended."""
  return [f"{Ended(one['run'], one['stage'], one['step'], one['what'])}; it has no results from there on."
          for one in ended]


def leakage_facts(audit: Audit) -> list[dict[str, Any]]:
  """The leakage check of every relearn set of every U run (the others are attacked with the same text)."""
  return [leakage_fact(found, str(run.variant), run.seed) for run in audit.runs
          for found in check_case(audit.cases[run])]


def example_facts(audit: Audit, points: Points, last_step: int) -> list[dict[str, Any]]:
  """The first questions with what each arm said, of every variant's first seed and rate; nothing of runs that ended."""
  config, seed = audit.config, audit.config.case.seeds[0]
  cells, ended = cells_of_seed(config, seed, points, last_step, audit.gone()), audit.ended(f"relearn-seed{seed}")
  name = lambda step: audit.scores / f"relearn-seed{seed}-{step:06d}.npz"
  last = config.relearn.keep_steps[-1]
  said = {step: load_scores(name(step)) for step in (0, last)}
  examples = []
  for variant in config.case.variants:
    here = {cell.arm: i for i, cell in enumerate(cells)
            if cell.run.variant == variant and cell.depth in (0, None) and not cell.missing}
    if "U" not in here:
      continue
    sources = {"original": (0, "O"), "unlearned": (0, "U"), "relearned": (last, "U"), "control": (last, "N")}
    sources = {key: (step, arm) for key, (step, arm) in sources.items()
               if arm in here and _has_answers(attacked_cells(config, cells)[here[arm]], step, ended)}
    examples += [audit.ask.example(q, str(variant), seed, {
        key: said[step].tokens[here[arm], q] for key, (step, arm) in sources.items()})
                 for q in range(min(EXAMPLES, len(audit.ask.questions)))]
  return examples


def weight_hashes(audit: Audit, points: Points, last_step: int) -> dict[str, str]:
  """Hashes of the base, of the memorised models, and of what each seed's attack started and ended with."""
  num_runs, config = len(audit.runs), audit.config
  hashes = {"base": fingerprint(audit.base_params), "memorized": fingerprint(audit.load_kept("unlearn", 0, num_runs))}
  for seed in config.case.seeds:
    num_cells = len(attacked_cells(config, cells_of_seed(config, seed, points, last_step)))
    hashes[f"relearned_seed{seed}"] = fingerprint(
        audit.load_kept(f"relearn-seed{seed}", config.relearn.keep_steps[-1], num_cells))
  return hashes


def make_facts(audit: Audit, points: Points, last_step: int, seconds: Mapping[str, float]) -> dict[str, Any]:
  """What the rows cannot hold and a report needs."""
  first, ended = audit.config.case.seeds[0], ended_facts(audit, points, last_step)
  return {
      "leakage": leakage_facts(audit), "examples": example_facts(audit, points, last_step),
      "relearn_text": {str(run.variant): [row.text for row in audit.cases[run].relearn_sets[0].rows]
                       for run in audit.runs if run.arm == "U" and run.seed == first},
      "provenance": audit.cases[audit.runs[0]].relearn_sets[0].provenance,
      "seconds": dict(seconds), "versions": versions(),
      "fingerprints": weight_hashes(audit, points, last_step), "settings": dataclasses.asdict(audit.config.verdict),
      "config": to_dict(audit.config), "reference": REFERENCE,
      "ended": ended, "notes": [*ended_notes(ended), *notes(audit.config, points, audit.gone()), *_beyond_notes(audit)]}


def notes(config: AuditConfig, points: Points, gone: Mapping[Run, int]) -> list[str]:
  """What a reader must know about runs that did not unlearn as planned, besides those that ended."""
  rows = []
  for (variant, seed), steps in points.items():
    if Run(variant, seed, "U") in gone:
      continue
    if not steps:
      rows.append(f"Variant {variant}, seed {seed}: attack success never fell to {config.unlearn.max_asr:.0%} within "
                  f"{config.unlearn.max_steps} unlearning steps; the run is left out.")
    elif len(steps) < config.unlearn.depths:
      rows.append(f"Variant {variant}, seed {seed}: unlearned too late for {config.unlearn.depths} depths "
                  f"(it has {len(steps)}).")
  return rows


def _beyond_notes(audit: Audit) -> list[str]:
  """A line on each run that was kept at its last depth and was not finite later, where nothing but a curve is lost."""
  found: dict[Run, int] = {}
  gone = audit.gone()
  for path in sorted(audit.scores.glob("unlearn-*.npz")):
    finite = load_scores(path).finite
    for i, run in enumerate(run for run in audit.runs if run.arm == "U"):
      if run not in gone and not finite[i]:
        found.setdefault(run, int(path.stem.split("-")[1]))
  return [f"{run.name}: beyond its last depth, from unlearn step {step} on, the run was not finite; its curve along "
          "unlearning ends there." for run, step in found.items()]
