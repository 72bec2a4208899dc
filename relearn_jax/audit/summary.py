"""summary.json: every point of every curve with its interval, and the verdicts; a function of the rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from relearn_jax.audit.evidence import cluster_numbers
from relearn_jax.audit.statistics import Interval, mean_limits, t_limits
from relearn_jax.audit.tables import KEYS, Table, make_tables
from relearn_jax.audit.thresholds import Design, VerdictSettings
from relearn_jax.audit.verdict import judge

SCHEMA_VERSION = 2
PROPORTIONS = ("asr",)
FACTS = ("leakage", "seconds", "versions", "fingerprints", "notes", "ended")


def clean(value: Any) -> Any:
  """JSON-safe: floats to 6 digits (so that equal runs compare equal), no NaN, plain types."""
  if isinstance(value, Mapping):
    return {str(key): clean(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [clean(item) for item in value]
  if isinstance(value, (float, np.floating)):
    return round(float(value), 6) if np.isfinite(value) else None
  return int(value) if isinstance(value, np.integer) else value


def _variant_order(variant: str) -> tuple[int, int | str]:
  """Numbers first, the largest (most repetitions) first; then words."""
  return (0, -int(variant)) if variant.isdigit() else (1, variant)


def _cells(tables: Mapping[tuple, Table], method: str, settings: VerdictSettings, design: Design
           ) -> list[dict[str, Any]]:
  """A cell for each table, with the mean of every seed."""
  cells = []
  for key, table in tables.items():
    variant, arm, point, depth, relearn_step, rate, metric, *rest = key
    steps = set(table.unlearn_steps)
    interval = cell_interval(table, metric in PROPORTIONS, settings, design, varies=relearn_step > 0)
    cells.append({
        "variant": variant, "arm": arm, "method": method, "point": point, "depth": depth,
        "unlearn_step": rest[0] if rest else steps.pop() if len(steps) == 1 else None,
        "relearn_set": table.relearn_set, "learning_rate": rate, "relearn_step": relearn_step, "metric": metric,
        **dataclasses.asdict(interval), "n": table.values.size, "seeds": list(table.seeds),
        "seed_means": table.values.mean(1).tolist()})
  order = lambda cell: (_variant_order(cell["variant"]), cell["metric"], cell["arm"], cell["point"],
                        -1 if cell["depth"] is None else cell["depth"], cell["learning_rate"] or 0.0,
                        cell["relearn_step"], cell["unlearn_step"] or 0)
  return sorted(cells, key=order)


def cell_interval(table: Table, proportion: bool, settings: VerdictSettings, design: Design, *, varies: bool
                  ) -> Interval:
  """The interval of a cell; none where it has fewer clusters than settings allow, or a single seed.

  Args:
    table: its values.
    proportion: they lie between 0 and 1.
    settings: thresholds.
    design: how the audit was made.
    varies: seeds differ even where the models were given: the cell lies behind the attack.
  """
  ids, mean = cluster_numbers(table.questions, design.clusters), float(table.values.mean())
  vary = varies or not design.loaded
  if ids.max() + 1 < settings.min_clusters or (vary and len(table.seeds) < 2):
    return Interval(mean, None, None)
  if proportion:
    low, high = mean_limits(table.values, ids, settings.alpha, seeds_vary=vary, draws=settings.draws,
                            seed=settings.seed)
  else:
    low, high = t_limits(table.values, ids, settings.alpha, seeds_vary=vary)
  return Interval(mean, float(low), float(high))


def _design(facts: Mapping[str, Any], variant: str, seeds: Sequence[int]) -> Design:
  """How the audit was made, from its facts."""
  ended = [f"{run['run']} in stage {run['stage']} at step {run['step']} ({run['what']} not finite)"
           for run in facts.get("ended", ()) if run["variant"] in (variant, None)]
  given = {"control": facts["control"]} if "control" in facts else {}
  return Design(seeds, facts.get("clusters", {}), facts.get("loaded", False), ended=ended, **given)


def summarize(rows: pd.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any]:
  """The summary of an audit.

  Args:
    rows: as `rows.SCHEMA` has them.
    facts: what the rows cannot hold: leakage, seconds, versions, fingerprints, settings, clusters.

  Returns:
    A JSON-safe dictionary; `cells` has one entry for each point of the curves and the heat map,
    `trajectory` the unlearning curves.
  """
  settings = VerdictSettings(**facts.get("settings", {}))
  method = str(rows["method"].iloc[0])
  kept = rows["point"] == "trajectory"
  tables = make_tables(rows[~kept])
  trajectory = make_tables(rows[kept], [*KEYS, "unlearn_step"])
  seeds = sorted(int(s) for s in rows["seed"].unique())
  variants = sorted((str(v) for v in rows["variant"].unique()), key=_variant_order)
  leakage = facts.get("leakage", [])
  design = {v: _design(facts, v, seeds) for v in variants}
  verdicts = {v: dataclasses.asdict(judge(tables, v, leakage, settings, design[v])) for v in variants}
  selection = {
      v: {str(seed): [table.unlearn_steps[table.seeds.index(seed)] for (variant, arm, point, *_, metric), table
                      in sorted(tables.items(), key=lambda item: item[0][3] or 0)
                      if (variant, arm, point, metric) == (v, "U", "unlearned", "asr") and seed in table.seeds]
          for seed in seeds} for v in variants}
  return clean({
      "schema_version": SCHEMA_VERSION, "case": str(rows["case"].iloc[0]), "method": method, "verdicts": verdicts,
      "cells": _cells(tables, method, settings, design[variants[0]]),
      "trajectory": _cells(trajectory, method, settings, design[variants[0]]), "selection": selection,
      **{name: facts.get(name, [] if name in ("leakage", "notes", "ended") else {}) for name in FACTS}})
