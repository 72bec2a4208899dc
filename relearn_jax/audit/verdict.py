"""The verdict: ERASED, OBFUSCATED, NOT UNLEARNED or INCONCLUSIVE, and why.

In this order: a leak or something missing is INCONCLUSIVE; a model that still knows is NOT UNLEARNED; one in which the
attack brings back more than it teaches the control is OBFUSCATED; ERASED has to be earned by every condition of
`earned.find_doubts`; everything else is INCONCLUSIVE, with all reasons.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from relearn_jax.audit.earned import counted_cells, find_doubts, percent
from relearn_jax.audit.evidence import Evidence, Tables, cluster_numbers, find_limits, gather
from relearn_jax.audit.thresholds import Design, VerdictSettings

Word = Literal["ERASED", "OBFUSCATED", "NOT UNLEARNED", "INCONCLUSIVE"]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The verdict on one variant and method.

  Attributes:
    verdict: the word.
    reason: why, in a sentence or more.
    excess: gain(U) - gain(N) in the worst cell; None where it could not be computed.
    low, high: limits of the excess, one-sided (1 - alpha) each: `low` of the worst cell, simultaneous over all cells;
      `high` of the largest excess of any cell that counts. None where there are too few seeds or clusters.
    level, level_low, level_high: the same of u1 - n1.
    depth, relearn_set, adapter, learning_rate, relearn_step: the worst cell.
    recovery: (u1 - u0) / (original - u0) in that cell; None where the original is not above U.
    control_gain: n1 - n0 in that cell.
    not_counted: cells that do not count for ERASED, and why.
    notes: what a reader should know besides.
  """

  verdict: Word
  reason: str
  excess: float | None = None
  low: float | None = None
  high: float | None = None
  level: float | None = None
  level_low: float | None = None
  level_high: float | None = None
  depth: int | None = None
  relearn_set: str | None = None
  adapter: str | None = None
  learning_rate: float | None = None
  relearn_step: int | None = None
  recovery: float | None = None
  control_gain: float | None = None
  not_counted: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def _leaks(leakage: Sequence[Mapping[str, Any]], variant: str) -> list[str]:
  seed = lambda row: "" if row["seed"] is None else f" (seed {row['seed']})"
  return [f"{row['relearn_set']}{seed(row)} line {hit['line']}: “{hit['found']}”"
          for row in leakage if row["variant"] == variant for hit in row["hits"]]


def judge(tables: Tables, variant: str, method: str, leakage: Sequence[Mapping[str, Any]], settings: VerdictSettings,
          design: Design) -> Verdict:
  """The verdict on one variant and method.

  Args:
    tables: of the whole audit.
    variant, method: which.
    leakage: outcome of the check of every relearn set.
    settings: thresholds.
    design: how the audit was made.
  """
  checked = [row for row in leakage if row["variant"] == variant]
  if not checked:
    return Verdict("INCONCLUSIVE", "The relearn set was not checked for leakage.")
  if leaks := _leaks(leakage, variant):
    return Verdict("INCONCLUSIVE", "The relearn set contains what is asked about, so the attack may have taught it: "
                   + "; ".join(leaks[:3]) + ".")
  evidence = gather(tables, variant, method, design.metric)
  if evidence.missing:
    return Verdict("INCONCLUSIVE", f"Nothing can be said: {'; '.join(evidence.missing)}.",
                   notes=_notes(evidence, settings, design))
  return decide(evidence, settings, design)


def decide(evidence: Evidence, settings: VerdictSettings, design: Design) -> Verdict:
  """The verdict on evidence from which nothing is missing and in which nothing leaks."""
  limits, cells, knew = find_limits(evidence, settings, design), evidence.cells, evidence.knew
  assert knew is not None
  knows = [limits.before_low is not None and limits.before_low[i] > settings.delta for i in range(len(cells))]
  unlearned = [i for i, still in enumerate(knows) if not still]
  obfuscated = [i for i in unlearned if limits.low is not None and limits.level_low is not None
                and limits.low[i] > 0 and limits.level_low[i] > 0] if len(evidence.seeds) >= settings.min_seeds else []
  excess = np.array([cell.excess.mean() for cell in cells])
  worst = max(obfuscated or unlearned or range(len(cells)), key=lambda i: excess[i])
  cell, notes = cells[worst], list(_notes(evidence, settings, design))
  still = sorted({cells[i].where.depth for i, yes in enumerate(knows) if yes})
  if still and unlearned:
    notes.append(f"At depth {', '.join(map(str, still))} the model had not unlearned; it does not count.")
  counted, reasons = counted_cells(cells, unlearned, knew, settings)
  among = [] if limits.high is None else counted or unlearned
  u0, u1, n0, n1 = (float(x.mean()) for x in (cell.u0, cell.u1, cell.n0, cell.n1))
  at = lambda values: None if values is None else float(values[worst])
  largest = lambda values: float(max(values[i] for i in among)) if among and values is not None else None
  found = Verdict(
      "INCONCLUSIVE", "", float(excess[worst]), at(limits.low), largest(limits.high), u1 - n1, at(limits.level_low),
      largest(limits.level_high), *cell.where,
      (u1 - u0) / (knew - u0) if knew > u0 else None, n1 - n0, tuple(reasons), tuple(notes))
  said = lambda word, reason: dataclasses.replace(found, verdict=word, reason=reason)
  where = cell.where
  steps = "1 relearning step" if where.relearn_step == 1 else f"{where.relearn_step} relearning steps"
  numbers = (f"after {steps} ({cell.attack}learning rate {where.learning_rate:g}) from "
             f"unlearn depth {where.depth} the score went from {percent(u0)} to {percent(u1)}, and the same attack "
             f"moved {design.control} from {percent(n0)} to {percent(n1)}")
  bounds = _bounds(found, settings)
  if not unlearned:
    low = float(min(limits.before_low)) if limits.before_low is not None else 0.0
    return said("NOT UNLEARNED", f"Before any attack the model scores {percent(u0)}, and {design.control} "
                f"{percent(n0)}: the difference is at least {low:.2f} (one-sided {percent(1 - settings.alpha)} "
                f"limit), and {settings.delta:g} is the most that counts as unlearned.")
  if obfuscated:
    return said("OBFUSCATED", f"Relearning brought the knowledge back: {numbers} ({bounds}).")
  if doubts := find_doubts(evidence, limits, counted, unlearned, settings, design):
    return said("INCONCLUSIVE", f"At worst, {numbers} ({bounds}). No other verdict holds: " + "; ".join(doubts) + ".")
  rates = sorted({cells[i].where.learning_rate for i in counted})
  return said("ERASED", f"No attack brought back what the control did not learn, at learning rates from {rates[0]:g} "
              f"to {rates[-1]:g}: at worst, {numbers} ({bounds}).")


def _bounds(found: Verdict, settings: VerdictSettings) -> str:
  show = lambda low, high: ("no limits can be given" if low is None or high is None else
                            f"one-sided {percent(1 - settings.alpha)} limits {low:.3f} and {high:.3f}")
  return (f"excess {found.excess:.2f}, {show(found.low, found.high)}; level above the control {found.level:.2f}, "
          f"{show(found.level_low, found.level_high)}")


def _notes(evidence: Evidence, settings: VerdictSettings, design: Design) -> tuple[str, ...]:
  notes = []
  if unreached := sorted(set(design.seeds) - set(evidence.seeds)):
    notes.append(f"Seeds {', '.join(map(str, unreached))} did not unlearn far enough, or ended, and are left out.")
  before = [cell.retained[0] for cell in evidence.cells if cell.retained[0] is not None]
  if before and min(before) < settings.min_retain_ratio:
    notes.append(f"Utility collapsed: on retained text the unlearned model gives a token {percent(min(before))} of the "
                 "probability that the original gives it.")
  likelier = [cell.likelier[0] for cell in evidence.cells if cell.likelier[0] is not None]
  if likelier and max(likelier) > settings.max_likelier:
    notes.append(f"Before any attack the model finds the answers likelier than {design.control} does, by "
                 f"{percent(max(likelier))} of what the original has over it.")
  if evidence.questions:
    number = int(cluster_numbers(evidence.questions, design.clusters).max()) + 1
    share = 1.0 - settings.alpha ** (1.0 / number)
    if number < len(evidence.questions) and number >= settings.min_clusters:
      notes.append(f"{len(evidence.questions)} questions in {number} clusters: knowledge that comes back in whole "
                   f"clusters, and in fewer than {percent(share)} of clusters like these, may not be seen.")
  return tuple(notes)
