"""summary.json: every point of every curve with its interval, and the verdicts; a function of the rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from relearn_jax.audit.statistics import bootstrap_weights, intervals
from relearn_jax.audit.tables import KEYS, Table, make_tables
from relearn_jax.audit.verdict import VerdictSettings, judge

SCHEMA_VERSION = 1
PROPORTIONS = ("asr",)
FACTS = ("leakage", "seconds", "versions", "fingerprints", "notes")


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


def _cells(tables: Mapping[tuple, Table], method: str, settings: VerdictSettings, clusters: Mapping[str, str]
           ) -> list[dict[str, Any]]:
  """A cell for each table; tables of the same shape share bootstrap weights."""
  groups: dict[tuple, list[tuple]] = {}
  for key, table in tables.items():
    groups.setdefault((key[5] in PROPORTIONS, len(table.seeds), table.questions), []).append(key)
  cells = []
  for (proportion, num_seeds, questions), keys in groups.items():
    ids = np.array([clusters.get(question, question) for question in questions])
    weights = bootstrap_weights(num_seeds, ids, settings.draws, settings.seed)
    values = np.stack([tables[key].values for key in keys])
    found = intervals(values, weights, settings.alpha, proportion, len(set(ids)))
    for key, interval in zip(keys, found, strict=True):
      table, (variant, arm, point, depth, relearn_step, metric, *rest) = tables[key], key
      steps = set(table.unlearn_steps)
      cells.append({
          "variant": variant, "arm": arm, "method": method, "point": point, "depth": depth,
          "unlearn_step": rest[0] if rest else steps.pop() if len(steps) == 1 else None,
          "relearn_set": table.relearn_set, "relearn_step": relearn_step, "metric": metric,
          **dataclasses.asdict(interval), "n": table.values.size, "seeds": list(table.seeds)})
  order = lambda cell: (_variant_order(cell["variant"]), cell["metric"], cell["arm"], cell["point"],
                        -1 if cell["depth"] is None else cell["depth"], cell["relearn_step"], cell["unlearn_step"] or 0)
  return sorted(cells, key=order)


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
  clusters = facts.get("clusters", {})
  method = str(rows["method"].iloc[0])
  kept = rows["point"] == "trajectory"
  tables = make_tables(rows[~kept])
  trajectory = make_tables(rows[kept], [*KEYS, "unlearn_step"])
  seeds = sorted(int(s) for s in rows["seed"].unique())
  variants = sorted((str(v) for v in rows["variant"].unique()), key=_variant_order)
  leakage = facts.get("leakage", [])
  verdicts = {v: dataclasses.asdict(judge(tables, v, seeds, leakage, settings, clusters)) for v in variants}
  selection = {
      v: {str(seed): [table.unlearn_steps[table.seeds.index(seed)] for (variant, arm, point, _, _, metric), table
                      in sorted(tables.items(), key=lambda item: item[0][3] or 0)
                      if (variant, arm, point, metric) == (v, "U", "unlearned", "asr") and seed in table.seeds]
          for seed in seeds} for v in variants}
  return clean({
      "schema_version": SCHEMA_VERSION, "case": str(rows["case"].iloc[0]), "method": method, "verdicts": verdicts,
      "cells": _cells(tables, method, settings, clusters),
      "trajectory": _cells(trajectory, method, settings, clusters), "selection": selection,
      **{name: facts.get(name, [] if name in ("leakage", "notes") else {}) for name in FACTS}})
