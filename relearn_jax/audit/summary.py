"""summary.json: every point of every curve with its interval, and the verdicts; a function of the rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from relearn_jax.audit.evidence import cluster_numbers
from relearn_jax.audit.search import find_strongest
from relearn_jax.audit.seed_tables import Key, StepKey, Table, make_tables, trajectory_tables
from relearn_jax.audit.statistics import Interval, mean_limits, t_limits
from relearn_jax.audit.thresholds import Design, VerdictSettings
from relearn_jax.audit.verdict import judge
from relearn_jax.metrics.ratings import find_metric
from relearn_jax.metrics.scores import Metric

SCHEMA_VERSION = 3
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


def _cell(variant: str, arm: str, method: str | None, point: str, metric: str, table: Table, interval: Interval,
          unlearn_step: int | None, attack: Key | None) -> dict[str, Any]:
  """A table as a cell of summary.json, with the mean of every seed."""
  return {
      "variant": variant, "arm": arm, "method": method, "point": point, "depth": attack.depth if attack else None,
      "unlearn_step": unlearn_step, "relearn_set": attack.relearn_set if attack else None,
      "adapter": attack.adapter if attack else None, "learning_rate": attack.learning_rate if attack else None,
      "relearn_step": attack.relearn_step if attack else 0, "metric": metric, **dataclasses.asdict(interval),
      "n": table.values.size, "seeds": list(table.seeds), "seed_means": table.values.mean(1).tolist()}


def _cells(tables: Mapping[Key, Table], settings: VerdictSettings, designs: Mapping[str, Design]
           ) -> list[dict[str, Any]]:
  """A cell for each point of each curve."""
  cells = []
  for key, table in tables.items():
    steps = set(table.unlearn_steps)
    interval = cell_interval(table, find_metric(key.metric), settings, designs[key.variant],
                             varies=key.relearn_step > 0)
    cells.append(_cell(key.variant, key.arm, key.method, key.point, key.metric, table, interval,
                       steps.pop() if len(steps) == 1 else None, key))
  return sorted(cells, key=_order)


def _trajectory(tables: Mapping[StepKey, Table], settings: VerdictSettings, designs: Mapping[str, Design]
                ) -> list[dict[str, Any]]:
  """A cell for each point along unlearning."""
  cells = []
  for key, table in tables.items():
    interval = cell_interval(table, find_metric(key.metric), settings, designs[key.variant], varies=False)
    cells.append(_cell(key.variant, "U", key.method, "trajectory", key.metric, table, interval, key.unlearn_step, None))
  return sorted(cells, key=_order)


def _order(cell: Mapping[str, Any]) -> tuple:
  return (_variant_order(cell["variant"]), cell["metric"], cell["arm"], cell["method"] or "", cell["point"],
          -1 if cell["depth"] is None else cell["depth"], cell["relearn_set"] or "", cell["adapter"] or "",
          cell["learning_rate"] or 0.0, cell["relearn_step"], cell["unlearn_step"] or 0)


def cell_interval(table: Table, metric: Metric | None, settings: VerdictSettings, design: Design, *, varies: bool
                  ) -> Interval:
  """The interval of a cell; none where it has fewer clusters than settings allow, or a single seed.

  Args:
    table: its values.
    metric: in whose range they lie; None: they have none.
    settings: thresholds.
    design: how the audit was made.
    varies: seeds differ even where the models were given: the cell lies behind the attack.
  """
  ids, mean = cluster_numbers(table.questions, design.clusters), float(table.values.mean())
  vary = varies or not design.loaded
  if ids.max() + 1 < settings.min_clusters or (vary and len(table.seeds) < 2):
    return Interval(mean, None, None)
  if metric:
    low, high = mean_limits(table.values, ids, settings.alpha, ends=(metric.low, metric.high), seeds_vary=vary,
                            draws=settings.draws, seed=settings.seed)
  else:
    low, high = t_limits(table.values, ids, settings.alpha, seeds_vary=vary)
  return Interval(mean, float(low), float(high))


def _design(facts: Mapping[str, Any], variant: str, seeds: Sequence[int], method: str | None = None) -> Design:
  """How the audit of a variant and method was made, from its facts."""
  ended = [f"{run['run']} in stage {run['stage']} at step {run['step']} ({run['what']} not finite)"
           for run in facts.get("ended", ()) if run["variant"] in (variant, None)
           and run.get("method") in (method, None)]
  given = {key: facts[key] for key in ("control", "metric") if key in facts}
  asked = (*facts.get("questions", ()), *facts.get("choices", ()))
  clusters = {question["id"]: question["cluster"] for question in asked}
  return Design(seeds, clusters, facts.get("loaded", False), ended=ended, **given)


def summarize(rows: pd.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any]:
  """The summary of an audit.

  Args:
    rows: as `results_file.RESULTS` has them.
    facts: what the rows cannot hold; see `facts.make_facts`.

  Returns:
    A JSON-safe dictionary: `verdicts` by method and variant; `cells` has one entry for each point of the curves and the
    heat maps, `trajectory` the unlearning curves; `selection` the unlearn steps that were attacked, by method, variant
    and seed; `search`, where attacks were searched, the strongest by method and variant; `judges` what became of each
    judge, with verdicts by its ratings where it rated all that verdicts look at, and `agreement` of each two.
  """
  settings = VerdictSettings(**facts.get("settings", {}))
  kept = rows["point"] == "trajectory"
  tables, trajectory = make_tables(rows[~kept]), trajectory_tables(rows[kept])
  seeds = sorted(int(s) for s in rows["seed"].unique())
  found = sorted((str(v) for v in rows["variant"].unique()), key=_variant_order)
  variants = facts.get("variants", found)
  methods = facts.get("methods") or [str(m) for m in rows["method"].dropna().unique()]
  leakage, designs = facts.get("leakage", []), {v: _design(facts, v, seeds) for v in variants}
  metric = facts.get("metric", Design(()).metric)
  verdicts = {m: {v: dataclasses.asdict(judge(tables, v, m, leakage, settings, _design(facts, v, seeds, m)))
                  for v in variants} for m in methods}
  search = {m: {v: find_strongest(tables, v, m, facts["search"], settings, _design(facts, v, seeds, m))
                for v in variants} for m in methods} if facts.get("search") else {}
  judges = {name: dict(about) | {"verdicts": {m: {v: dataclasses.asdict(judge(
      tables, v, m, leakage, settings, dataclasses.replace(_design(facts, v, seeds, m), metric=name)))
      for v in variants} for m in methods} if about["answers"] == "cells" else {}}
            for name, about in facts.get("judges", {}).items()}
  return clean({
      "schema_version": SCHEMA_VERSION, "case": str(rows["case"].iloc[0]), "methods": methods, "metric": metric,
      "verdicts": verdicts, "search": search, "judges": judges, "agreement": facts.get("agreement", []),
      "cells": _cells(tables, settings, designs),
      "trajectory": _trajectory(trajectory, settings, designs),
      "selection": {m: {v: _selection(tables, v, m, metric, seeds) for v in variants} for m in methods},
      **{name: facts.get(name, [] if name in ("leakage", "notes", "ended") else {}) for name in FACTS}})


def _selection(tables: Mapping[Key, Table], variant: str, method: str, metric: str, seeds: Sequence[int]
               ) -> dict[str, list[int]]:
  """The unlearn steps at which U was attacked, by seed; shallowest first."""
  at = {key.depth or 0: table for key, table in tables.items()
        if (key.variant, key.arm, key.method, key.point, key.metric) == (variant, "U", method, "unlearned", metric)}
  return {str(seed): [at[depth].unlearn_steps[at[depth].seeds.index(seed)] for depth in sorted(at)
                      if seed in at[depth].seeds] for seed in seeds}
