"""A whole names audit beside the same experiment by hand in torch: seconds, what came out, and how much work it was."""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from relearn_jax.audit import unlearning
from relearn_jax.audit.audit_config import Audit, unlearn_method
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain
from relearn_jax.audit.interview import ROWS, load_answers
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.audit.results_file import ANSWERS_FILE
from relearn_jax.audit.stages import PRETRAIN
from relearn_jax.bench.compare_torch import OURS, beside
from relearn_jax.bench.grid_speed import WHERE, audit_once, count_cells
from relearn_jax.bench.timing import seconds
from relearn_jax.bench.torch_audit import Amount, ByHand, Level

BATCHED, ONE_PROMPT = "torch by hand, batched", "torch by hand, one prompt a call"
MOST_AUDITS = 3  # repeats


def compare_audit(plan: Audit, name: str, mesh: str, repeats: int, ways: Sequence[str] = (BATCHED,)) -> dict[str, Any]:
  """An audit in a new workdir, its programs compiled and the model that all begin as at hand, against torch, in turns.

  Ours writes everything that an audit writes. Torch attacks the same points; see `ByHand`.

  Args:
    plan: gradient ascent, attacked on all parameters with all rows a step, in fp32.
    name: of the row.
    mesh: of ours.
    repeats: of each side, at most `MOST_AUDITS`.
    ways: `BATCHED`, `ONE_PROMPT`.
  """
  sides: dict[str, ByHand] = {}
  took: dict[str, list[float]] = {side: [] for side in (OURS, *ways)}
  with tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary:
    root, workdir = pathlib.Path(temporary), pathlib.Path(temporary) / "audit"
    base = cached_base(plan.arms.pretrain, plan.case_config, root)
    audit_once(rehearsal(plan), root, "rehearsal", mesh)  # compiles; torch has nothing to warm up but allocations
    for _ in range(min(repeats, MOST_AUDITS)):
      shutil.rmtree(workdir, ignore_errors=True)
      whole = seconds(lambda: audit_once(plan, root, workdir.name, mesh))
      exp = Experiment(plan, WHERE, workdir)
      stages = json.loads((exp.checkpoints / "seconds.json").read_text())
      took[OURS].append(whole - stages.pop(PRETRAIN))  # where it only looks for the model that all begin as
      points, last = attacked_points(exp)
      for way in ways:
        sides[way] = ByHand(exp, base, points, last, way == ONE_PROMPT)
        took[way].append(seconds(sides[way].run))
    ours, amount = answer_levels(workdir / ANSWERS_FILE), amount_of(exp)
  theirs = sides[ways[0]]
  apart = differences(ours, theirs.levels)
  originals = [value for (model, step), value in apart.items() if model.startswith("O-") and step == 0]
  return {"name": name, "models": len(exp.chains), "cells": count_cells(plan), "questions": len(exp.asked),
          **beside(took), "amount": {OURS: amount, **{way: side.amount for way, side in sides.items()}},
          "stages": stages, "by_hand_seconds": {way: side.seconds for way, side in sides.items()},
          "compared": len(apart), "of_one_side_alone": len(ours.keys() ^ theirs.levels.keys()),
          "difference_of_mean_answer_logprobs": {
              "originals, largest": max(originals), "all, median": float(np.median(list(apart.values()))),
              "all, largest": max(apart.values())},
          "unlearn_steps": {chain.name: steps for chain, steps in points.items()},
          "equal_unlearn_steps": sum(theirs.points[chain] == steps for chain, steps in points.items())}


def rehearsal(config: Audit) -> Audit:
  """An audit of the same models, points and cells with as few steps as there can be: it compiles the same programs."""
  return dataclasses.replace(
      config, memorize=dataclasses.replace(config.memorize, steps=1),
      unlearn=dataclasses.replace(config.unlearn, max_steps=config.unlearn.depths, keep_every=1, max_score=0.99),
      attack=dataclasses.replace(config.attack, keep_steps=config.attack.keep_steps[:1]))


def attacked_points(exp: Experiment) -> tuple[dict[Chain, list[int]], int]:
  """Unlearn steps of each U chain of a finished audit, by depth, and the step to which all chains went."""
  method = unlearn_method(exp.config.unlearn, exp.config.unlearn.methods[0])
  curves = unlearning.curves_of(exp, method)
  return unlearning.unlearned_points(exp, method), max(step for curve in curves.values() for step in curve)


def amount_of(exp: Experiment) -> Amount:
  """How much a finished audit has done, by its log and by the answers that it has stored."""
  last: dict[str, int] = {}
  for line in exp.log.path.read_text().splitlines():
    row = json.loads(line)
    last[row["stage"]] = max(last.get(row["stage"], 0), row["step"])
  found = Amount()
  for folder in {folder.path: folder for folder, _ in exp.done.values()}.values():
    found = found._replace(steps=found.steps + last[folder.name] * len(folder.keys))
    for step in folder.asked():
      answers = load_answers(folder.answers(step))
      counted = [getattr(answers, f"{rows}_tokens") for rows in ROWS]
      found = found._replace(
          asked=found.asked + len(answers.runs), questions=found.questions + answers.texts.size,
          rows=found.rows + sum(int((tokens > 0).sum()) for tokens in counted if tokens is not None),
          points=found.points + (len(answers.runs) if step == 0 else 0))
  return found


def answer_levels(path: pathlib.Path) -> Level:
  """As `ByHand.levels`, from an audit's stored answers."""
  frame = pq.read_table(path).to_pandas()
  frame = frame[frame["kind"] == "question"]
  found: Level = {}
  columns = ["arm", "variant", "seed", "point", "depth", "unlearn_step", "relearn_step", "learning_rate"]
  for key, rows in frame.groupby(columns, observed=True, dropna=False):
    arm, variant, seed, point, depth, unlearn_step, relearn_step, rate = key
    name, level = f"{arm}-{variant}-{seed}", float(rows["logprob"].mean())
    if point == "trajectory":
      found[name, int(unlearn_step)] = level
      continue
    name += "" if arm == "O" else f"-depth{int(depth)}"
    found[name if point != "relearned" else f"{name}-lr{rate:g}", int(relearn_step)] = level
  return found


def differences(ours: Level, theirs: Level) -> Level:
  """How far apart two sides are, of the models that both have; a run of ours that ended has no levels.

  Rounding drives them apart: two runs of torch from models that differ by 1e-7 are as far from each other.
  """
  return {key: abs(ours[key] - theirs[key]) for key in ours if key in theirs}
