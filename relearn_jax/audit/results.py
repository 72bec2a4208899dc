"""From stored scores to rows and facts: a pure function of an audit's files."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from relearn_jax.audit.arms import cells_of_seed
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.evaluate import Scores, load_scores
from relearn_jax.audit.rows import block
from relearn_jax.audit.run import Audit
from relearn_jax.cases.leakage import Leakage, check_case
from relearn_jax.models.model import fingerprint
from relearn_jax.workdir import to_dict

Points = Mapping[tuple[int, int], Sequence[int]]
EXAMPLES = 3  # questions shown in the report, the first ones: nothing is picked
PACKAGES = ("relearn_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")  # named in the report

# The paper's table for Llama-2-7b (Hu et al., ICLR 2025, section 5), shown beside ours.
REFERENCE = {
    "text": "Hu, Fu, Wu, Smith (ICLR 2025), Llama-2-7b, no intervals published",
    "unlearned": {"7": 0.0, "5": 0.0, "3": 0.0, "1": 0.0}, "relearned": {"7": 1.0, "5": 0.97, "3": 0.23, "1": 0.0}}


def score_tables(scores: Scores, index: int, questions: list[str], **labels: Any) -> list[pa.Table]:
  """The rows of one model: a value a question, or a scored row, and metric."""
  columns = {"asr": (questions, scores.asr), "logprob": (questions, scores.logprob)}
  for name, means in (("retain", scores.retain), ("forget", scores.forget)):
    if means is not None:
      columns[f"{name}_logprob"] = [f"{name}{i:02d}" for i in range(means.shape[1])], means
  return [block(values[index].astype(np.float64), ids, metric=metric, **labels)
          for metric, (ids, values) in columns.items()]


def leakage_fact(found: Leakage, variant: str, seed: int | None) -> dict[str, Any]:
  """The outcome of a leakage check as the report shows it; `seed` is None where all seeds share the text."""
  return {"relearn_set": found.relearn_set, "variant": variant, "seed": seed, "num_lines": found.num_lines,
          "hits": [dataclasses.asdict(hit) for hit in found.hits], "passed": found.passed}


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
  """
  config = audit.config
  questions = [q.id for q in audit.cases[audit.runs[0]].questions]
  always = {"case": "names", "method": config.recipe.name, "adapter": "full"}
  still = {**always, "relearn_set": None, "relearn_step": 0, "depth": None}
  tables: list[pa.Table] = []
  label = lambda run: {"variant": str(run.variant), "seed": run.seed}

  memorized = load_scores(audit.scores / "memorize.npz")
  for i, run in enumerate(audit.runs):
    tables += score_tables(memorized, i, questions, **still, **label(run), arm="O" if run.arm == "U" else "N",
                      point="original", unlearn_step=0, learning_rate=config.memorize.learning_rate)
  u_runs = [run for run in audit.runs if run.arm == "U"]
  for path in sorted(audit.scores.glob("unlearn-*.npz")):
    step, scores = int(path.stem.split("-")[1]), load_scores(path)
    for i, run in enumerate(u_runs if step else ()):
      tables += score_tables(scores, i, questions, **still, **label(run), arm="U", point="trajectory",
                             unlearn_step=step, learning_rate=config.method_config.learning_rate)
  for seed in config.case.seeds:
    cells = cells_of_seed(config, seed, points, last_step)
    for step in (0, *config.relearn.keep_steps):
      scores = load_scores(audit.scores / f"relearn-seed{seed}-{step:06d}.npz")
      for i, cell in enumerate(cells):
        if cell.missing or (step == 0 and cell.arm == "O"):  # O before relearning is the original, above
          continue
        tables += score_tables(
            scores, i, questions, **always, **label(cell.run), arm=cell.arm, point="relearned" if step else "unlearned",
            depth=cell.depth, unlearn_step=cell.unlearn_step,
            relearn_set=audit.cases[cell.run].relearn_sets[0].name if step else None, relearn_step=step,
            learning_rate=config.relearn.learning_rate if step else config.method_config.learning_rate)
  return tables


def leakage_facts(audit: Audit) -> list[dict[str, Any]]:
  """The leakage check of every relearn set of every U run (the others are attacked with the same text)."""
  return [leakage_fact(found, str(run.variant), run.seed) for run in audit.runs
          for found in check_case(audit.cases[run])]


def example_facts(audit: Audit, points: Points, last_step: int) -> list[dict[str, Any]]:
  """The first questions with what each arm said, for the first seed of every variant."""
  config, seed = audit.config, audit.config.case.seeds[0]
  cells = cells_of_seed(config, seed, points, last_step)
  name = lambda step: audit.scores / f"relearn-seed{seed}-{step:06d}.npz"
  before, after = load_scores(name(0)), load_scores(name(config.relearn.keep_steps[-1]))
  examples = []
  for variant in config.case.variants:
    here = {cell.arm: i for i, cell in enumerate(cells)
            if cell.run.variant == variant and cell.depth in (0, None) and not cell.missing}
    if "U" not in here:
      continue
    sources = {"original": (before, "O"), "unlearned": (before, "U"), "relearned": (after, "U"),
               "control": (after, "N")}
    for q, question in enumerate(audit.cases[audit.runs[0]].questions[:EXAMPLES]):
      examples.append({
          "variant": str(variant), "seed": seed, "question": question.id, "prompt": question.prompt,
          "keywords": list(question.keywords),
          "completions": {key: audit.ask.completion(q, scores.tokens[here[arm], q])
                          for key, (scores, arm) in sources.items()}})
  return examples


def weight_hashes(audit: Audit, points: Points, last_step: int) -> dict[str, str]:
  """Hashes of the base, of the memorised models, and of what each seed's attack started and ended with."""
  num_runs, config = len(audit.runs), audit.config
  hashes = {"base": fingerprint(audit.base_params), "memorized": fingerprint(audit.load_kept("unlearn", 0, num_runs))}
  for seed in config.case.seeds:
    num_cells = len(cells_of_seed(config, seed, points, last_step))
    hashes[f"relearned_seed{seed}"] = fingerprint(
        audit.load_kept(f"relearn-seed{seed}", config.relearn.keep_steps[-1], num_cells))
  return hashes


def make_facts(audit: Audit, points: Points, last_step: int, seconds: Mapping[str, float]) -> dict[str, Any]:
  """What the rows cannot hold and a report needs."""
  first = audit.config.case.seeds[0]
  return {
      "leakage": leakage_facts(audit), "examples": example_facts(audit, points, last_step),
      "relearn_text": {str(run.variant): [row.text for row in audit.cases[run].relearn_sets[0].rows]
                       for run in audit.runs if run.arm == "U" and run.seed == first},
      "provenance": audit.cases[audit.runs[0]].relearn_sets[0].provenance,
      "seconds": dict(seconds), "versions": versions(),
      "fingerprints": weight_hashes(audit, points, last_step), "settings": dataclasses.asdict(audit.config.verdict),
      "config": to_dict(audit.config), "reference": REFERENCE, "notes": notes(audit.config, points)}


def notes(config: AuditConfig, points: Points) -> list[str]:
  """What a reader must know about runs that did not go as planned."""
  rows = []
  for (variant, seed), steps in points.items():
    if not steps:
      rows.append(f"Variant {variant}, seed {seed}: attack success never fell to {config.unlearn.max_asr:.0%} within "
                  f"{config.unlearn.max_steps} unlearning steps; the run is left out.")
    elif len(steps) < config.unlearn.depths:
      rows.append(f"Variant {variant}, seed {seed}: unlearned too late for {config.unlearn.depths} depths "
                  f"(it has {len(steps)}).")
  return rows


