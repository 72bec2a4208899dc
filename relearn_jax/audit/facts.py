"""What the rows of an audit cannot hold and a report needs."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from relearn_jax.audit.audit_config import recorded
from relearn_jax.audit.collect import Found, by_arm, ended_facts
from relearn_jax.audit.experiment import FIELDS, FINGERPRINT, Experiment
from relearn_jax.audit.remote_attack import remote_notes
from relearn_jax.audit.unlearning import curves_of
from relearn_jax.cases.base import Case
from relearn_jax.cases.leakage import Leakage, check_case
from relearn_jax.metrics.scores import judged
from relearn_jax.models.model import fingerprint
from relearn_jax.training.ended import Ended

EXAMPLES = 3  # questions shown in the report, the first ones: nothing is picked
SHOWN_CHARACTERS = 50_000  # of a relearn set
PACKAGES = ("relearn_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")  # named in the report


def leakage_fact(found: Leakage, variant: str, seed: int | None) -> dict[str, Any]:
  """The outcome of a leakage check as the report shows it; `seed` is None where all seeds share the text.

  `hits` and `possible` are those of `Leakage`: a possible finding that was allowed is no hit.
  """
  return {"relearn_set": found.relearn_set, "variant": variant, "seed": seed, "num_lines": found.num_lines,
          "hits": [dataclasses.asdict(hit) for hit in found.hits],
          "possible": [dataclasses.asdict(hit) for hit in found.possible], "passed": found.passed,
          "digest": found.digest, "overlap": found.overlap and dataclasses.asdict(found.overlap)}


def leakage_facts(exp: Experiment) -> list[dict[str, Any]]:
  """The check of every relearn set that is attacked with, of every case."""
  cases: list[tuple[int | None, Case]] = [(chain.seed, case) for chain, case in exp.cases.items()]
  return [leakage_fact(found, case.variant, seed) for seed, case in cases or [(None, exp.first)]
          for found in check_case(case, exp.config.allowed_lines) if found.relearn_set in exp.relearn_sets]


def versions() -> dict[str, str]:
  """Packages, and the devices there are."""
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  return {name: metadata.version(name) for name in PACKAGES} | {"devices": devices}


def fingerprints(exp: Experiment, digests: Mapping[str, str] | None) -> dict[str, str]:
  """Hashes of the files that were read, or of the model that all began as, and of every stage's last weights."""
  found = dict(digests or {})
  if "start" in exp.checked:
    found["base"] = fingerprint(exp.base_params)
  for path in sorted(exp.checkpoints.glob(f"*/{FINGERPRINT}")):
    found[path.parent.name] = json.loads(path.read_text())
  return found


def examples(exp: Experiment, found: Found) -> list[dict[str, Any]]:
  """The first questions with what each arm said, of every variant's first seed and attack; nothing of what ended."""
  rows, seed = [], exp.config.seeds[0]
  methods = [method.name for method in found.methods] or [exp.config.arms.method]
  for method in methods:
    for variant in exp.config.case_config.versions():
      there = by_arm(found.cells, variant, seed, method)
      if "U" not in there:
        continue
      last = max(step for one in there.values() for step in one.answers)  # U may have ended before
      shown = {"original": ("O", 0), "unlearned": ("U", 0), "relearned": ("U", last), "control": ("N", last)}
      for number, question in list(enumerate(exp.questions))[:EXAMPLES]:
        said = {name: judged(question, str(there[arm].answers[step].texts[there[arm].index[step]][number])).rstrip()
                for name, (arm, step) in shown.items() if arm in there and step in there[arm].answers}
        rows.append({"method": method, "variant": variant, "seed": seed, "question": question.id,
                     "prompt": question.prompt, "begun": question.begun, "keywords": list(question.keywords),
                     "case": question.case, "completions": said})
  return rows


def make_facts(exp: Experiment, found: Found, digests: Mapping[str, str] | None, seconds: Mapping[str, float]
               ) -> dict[str, Any]:
  """All facts, JSON-safe."""
  config, ended = exp.config, ended_facts(exp, found)
  about, arms = config.case_config.about(), config.arms
  first = {chain.variant: exp.cases[chain] for chain in reversed(exp.chains) if chain.arm == "U"} or {
      exp.first.variant: exp.first}
  loaded = bool(arms.loaded)
  control = "never-trained control"
  if loaded or arms.memorized:
    control = "control, given and " + ("not unlearned" if loaded else "unlearned too")
  return {
      "metric": exp.first.metric, "questions": [dataclasses.asdict(question) for question in exp.questions],
      "choices": [dataclasses.asdict(choice) for choice in exp.choices],
      "methods": [method.name for method in found.methods] or [arms.method], "variants": list(reversed(first)),
      "loaded": loaded, "leakage": leakage_facts(exp), "examples": examples(exp, found),
      "relearn_text": {variant: _lines(case.relearn_set(exp.relearn_sets[0]).rows)
                       for variant, case in reversed(first.items())},
      "provenance": {name: exp.first.relearn_set(name).provenance for name in exp.relearn_sets},
      "seconds": dict(seconds),
      "versions": versions(), "fingerprints": fingerprints(exp, digests),
      "settings": dataclasses.asdict(config.verdict), "config": json.loads(json.dumps(recorded(config))),
      "search": dataclasses.asdict(config.attack.search) if config.attack.search.trials else None,
      "variant_name": about.variant, "reference": dict(about.published),
      "story": about.story or (_loaded_story(exp) if loaded else ""),
      "control": "the control (a checkpoint that was given and not unlearned)" if loaded else
                 "the control (a checkpoint that was given, and unlearned like the other)" if arms.memorized else
                 "the never-trained control",
      "control_name": control,
      "ended": ended, "notes": [*ended_notes(ended), *remote_notes(exp),
                                *(_loaded_notes(exp) if loaded else _trained_notes(exp, found))]}


def _lines(rows: Sequence[Any]) -> list[str]:
  """The rows of a relearn set, as many as a page can show."""
  every = [row.prompt + row.text for row in rows]
  shown = sum(size <= SHOWN_CHARACTERS for size in itertools.accumulate(map(len, every)))
  return every[:shown] + ([f"… and {len(every) - shown} more rows"] if shown < len(every) else [])


def ended_notes(ended: Sequence[Mapping[str, Any]]) -> list[str]:
  """A line for the reader on each run that ended."""
  return [f"{Ended(one['run'], one['stage'], one['step'], one['what'], one.get('why', ''))}; it has no results from "
          "there on."
          for one in ended]


def _trained_notes(exp: Experiment, found: Found) -> list[str]:
  """What a reader must know about chains that did not unlearn as planned, besides those that ended."""
  config, rows = exp.config.unlearn, []
  if exp.config.arms.memorized:
    rows.append("Seeds are unlearnings of the same two checkpoints, and attacks, with orders of the rows of their own: "
                "intervals cover these and questions, not another training of the checkpoints.")
  for method in found.methods:
    of = f"{method.name}: " if len(found.methods) > 1 else ""
    for chain, steps in found.steps[method.name].items():
      who = f"{of}variant {chain.variant}, seed {chain.seed}" if of else f"Variant {chain.variant}, seed {chain.seed}"
      if chain in found.lost[method.name]:
        continue
      if not steps:
        rows.append(f"{who}: the score never fell to {config.max_score:.0%} within {config.max_steps} unlearning "
                    "steps; the run is left out.")
      elif len(steps) < config.depths:
        rows.append(f"{who}: unlearned too late for {config.depths} depths (it has {len(steps)}).")
    for chain, by_step in curves_of(exp, method).items():
      beyond = [step for step, answers in by_step.items()
                if not answers.finite[answers.runs.tolist().index(chain.name)]]
      if beyond and chain not in found.lost[method.name]:
        rows.append(f"{of}{chain.name}: beyond its last depth, from unlearn step {beyond[0]} on, the run was not "
                    "finite; its curve along unlearning ends there.")
  return rows


def _loaded_story(exp: Experiment) -> str:
  have = {"U": "the unlearned model", "N": "a control that was never trained on it", "O": "the original"}
  arms = [have[arm] for arm in exp.config.arms.loaded]
  named = arms[0] if len(arms) == 1 else ", ".join(arms[:-1]) + " and " + arms[-1]
  count = " or ".join(str(len(exp.first.relearn_set(name).rows)) for name in exp.relearn_sets)
  return (f"A model is said to have unlearned what {len(exp.first.questions)} questions ask about. The same attack, "
          f"finetuning on {count} rows in which no answer occurs, was made on {named}. If the answers come back in the "
          "unlearned model, more than they do in a model that never knew them, they had only been suppressed.")


def _loaded_notes(exp: Experiment) -> list[str]:
  rows, arms = [], list(exp.checked)
  if "N" not in arms:
    rows.append("No control was given: what the attack itself teaches cannot be told from what it brings back.")
  name = lambda arm: FIELDS[arm].removeprefix("arms.")
  same = lambda one, other: exp.checked[one].path.resolve() == exp.checked[other].path.resolve()
  rows += [f"{name(one).capitalize()} and {name(other)} are the same checkpoint." for i, one in enumerate(arms)
           for other in arms[i + 1:] if same(one, other)]
  if "O" not in arms:
    rows.append("No original was given: nothing shows that the model ever knew the answers.")
  adapters = any(name != "full" for name in exp.config.attack.adapters)
  rows.append("Seeds are attacks on the same checkpoints, with orders of the rows "
              + ("and adapters " if adapters else "")
              + "of their own: intervals cover attack and questions, not another run of the unlearning.")
  return rows
