"""From the stored answers of an audit of checkpoints to rows and facts: a pure function of its files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from relearn_jax.audit.release_run import FIELDS, Release, groups
from relearn_jax.audit.results import EXAMPLES, ended_fact, ended_notes, leakage_fact, score_tables, versions
from relearn_jax.cases.leakage import check_case
from relearn_jax.workdir import to_dict

SHOWN_LINES = 20  # of the relearn text, in the report


def result_tables(audit: Release) -> list[pa.Table]:
  """Every row of the audit, none of a run from the step on at which it ended.

  Seeds of one model share its answers before the attack.
  """
  config, ended = audit.config, audit.ended()
  first = config.attack.learning_rates[0]  # before the attack all rates are the same models
  questions = [question.id for question in audit.case.questions]
  tables: list[pa.Table] = []
  for number, runs in enumerate(groups(config)):
    for step in (0, *config.attack.keep_steps):
      going = [(index, run) for index, run in enumerate(runs) if run not in ended or step < ended[run].step]
      if not going:
        break  # where no run of a group is left, it is asked no more
      scores = audit.load_scores(number, step)
      for index, run in going if step else [(index, run) for index, run in going if run.rate == first]:
        before = "original" if run.arm == "O" else "unlearned"
        tables += score_tables(
            scores, index, questions, case=config.name, method=config.method, adapter=config.attack.adapter.kind,
            variant=audit.case.variant, seed=run.seed, arm=run.arm, point="relearned" if step else before,
            depth=None if run.arm == "O" else 0, unlearn_step=0,
            relearn_set=audit.case.relearn_sets[0].name if step else None, relearn_step=step,
            learning_rate=run.rate if step else 0.0)
  return tables


def example_facts(audit: Release) -> list[dict[str, Any]]:
  """The first questions with what each model said before and after the attack, for the first seed and rate."""
  config, seed, ended = audit.config, audit.config.seeds[0], audit.ended()
  places = {run: (number, index) for number, runs in enumerate(groups(config)) for index, run in enumerate(runs)}
  last = config.attack.keep_steps[-1]
  sources = {"original": ("O", 0), "unlearned": ("U", 0), "relearned": ("U", last), "control": ("N", last)}
  said: dict[str, np.ndarray] = {}
  for name, (arm, step) in sources.items():
    run = next((run for run in places if (run.arm, run.seed) == (arm, seed)), None)
    if run is not None and not (run in ended and ended[run].step <= step):
      number, index = places[run]
      said[name] = audit.load_scores(number, step).tokens[index]
  return [audit.ask.example(q, audit.case.variant, seed, {name: tokens[q] for name, tokens in said.items()})
          for q in range(min(EXAMPLES, len(audit.case.questions)))]


def make_facts(audit: Release, digests: Mapping[str, str], seconds: Mapping[str, float]) -> dict[str, Any]:
  """What the rows cannot hold and a report needs."""
  case, config = audit.case, audit.config
  relearn = case.relearn_sets[0]
  ended = [ended_fact(one, run.arm, case.variant, run.seed) for run, one in audit.ended().items()]
  more = len(relearn.rows) - SHOWN_LINES
  lines = [row.text for row in relearn.rows[:SHOWN_LINES]] + ([f"… and {more} more rows"] if more > 0 else [])
  return {
      "leakage": [leakage_fact(found, case.variant, None) for found in check_case(case, config.allowed_lines)],
      "examples": example_facts(audit), "relearn_text": {case.variant: lines}, "provenance": relearn.provenance,
      "clusters": {question.id: question.cluster for question in case.questions},
      "seconds": dict(seconds),
      "versions": versions(),
      "fingerprints": dict(digests), "settings": dataclasses.asdict(config.verdict), "config": to_dict(config),
      "loaded": True, "control": "the control (a checkpoint that was given and not unlearned)",
      "control_name": "control, given and not unlearned", "variant_name": "relearn set", "story": _story(audit),
      "ended": ended,
      "notes": [*ended_notes(ended), *_notes(audit)]}


def _story(audit: Release) -> str:
  have = {"U": "the unlearned model", "N": "a control that was never trained on it", "O": "the original"}
  arms = [have[arm] for arm in audit.config.arms]
  named = arms[0] if len(arms) == 1 else ", ".join(arms[:-1]) + " and " + arms[-1]
  count = len(audit.case.relearn_sets[0].rows)
  return (f"A model is said to have unlearned what {len(audit.case.questions)} questions ask about. The same attack, "
          f"finetuning on {count} rows in which no answer occurs, was made on {named}. If the answers come back in the "
          "unlearned model, more than they do in a model that never knew them, they had only been suppressed.")


def _notes(audit: Release) -> list[str]:
  rows = []
  if "N" not in audit.config.arms:
    rows.append("No control was given: what the attack itself teaches cannot be told from what it brings back.")
  same = lambda one, other: audit.checked[one].path.resolve() == audit.checked[other].path.resolve()
  arms = list(audit.checked)
  rows += [f"{FIELDS[one].capitalize()} and {FIELDS[other]} are the same checkpoint." for i, one in enumerate(arms)
           for other in arms[i + 1:] if same(one, other)]
  if "O" not in audit.config.arms:
    rows.append("No original was given: nothing shows that the model ever knew the answers.")
  rows.append("Seeds are attacks on the same checkpoints, with orders of the rows "
              + ("and adapters " if audit.config.attack.adapter.kind == "lora" else "")
              + "of their own: intervals cover attack and questions, not another run of the unlearning.")
  return rows
