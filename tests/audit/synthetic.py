"""Rows of an audit that never ran, with scores as told."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from relearn_jax.audit.results_file import RESULTS

QUESTIONS = [f"q{i:03d}" for i in range(40)]
CHECKED = [{"relearn_set": "prefixes", "variant": "7", "seed": 0, "num_lines": 4, "hits": [], "passed": True}]
RATES = (1e-4, 1e-3, 1e-2)  # the original loses what it knew at the last of them
Rate = float | Sequence[float]


def hits(share: float, questions: Sequence[str] = QUESTIONS) -> np.ndarray:
  """1 for the first `share` of the questions, 0 for the others."""
  return (np.arange(len(questions)) < round(share * len(questions))).astype(float)


def parts(variant: str = "7", *, seeds: Sequence[int] = (0, 1, 2), original: float | None = 1.0, unlearned: Rate = 0.0,
          relearned: Rate = 0.9, control: Rate | None = 0.0, before: Rate = 0.0, retain: float = -1.0,
          retain_after: float | None = None, loss: tuple[float, float] = (-2.0, -0.5), rates: Sequence[float] = (1e-4,),
          attacked: Sequence[float | None] = (1.0,), questions: Sequence[str] = QUESTIONS, depths: int = 1,
          method: str = "ga", relearn_set: str = "prefixes", adapter: str = "full", loaded: bool = False
          ) -> list[pa.Table]:
  """The tables of one variant.

  Args:
    variant, seeds, questions, depths: which rows there are.
    original: score of O; None: there is none.
    unlearned, relearned: of U, before and after; `control` and `before`: of N after and before; by seed where several.
    retain, retain_after: a token's log-probability on retained text under U (the original's is -0.5).
    loss: mean log-probability of the relearn set, before and after the attack.
    rates: learning rates of the attack, all with the same effect on U and N.
    attacked: share of `original` that O keeps at each of them; None: O was not attacked.
    method, relearn_set, adapter: as the key has them.
    loaded: N was given, and not unlearned.
  """
  by_seed = lambda value: [value] * len(seeds) if isinstance(value, float) else list(value)
  columns: dict[str, list[Any]] = {field.name: [] for field in RESULTS}

  def add(metric: str, ids: Sequence[str], values: np.ndarray, labels: dict[str, Any]) -> None:
    for name, column in columns.items():
      column += list(ids) if name == "question" else values.tolist() if name == "value" else [
          metric if name == "metric" else labels[name]] * len(ids)

  def put(arm: str, point: str, seed: int, score: float, step: int, depth: int | None, rate: float = 5e-5,
          **more: Any) -> None:
    unlearned_by = None if arm == "O" or (arm == "N" and loaded) else method
    labels = {"case": "names", "method": unlearned_by, "adapter": adapter if step else None, "learning_rate": rate,
              "variant": variant, "arm": arm, "point": point, "seed": seed, "relearn_step": step, "depth": depth,
              "unlearn_step": 0 if depth is None else 10 + 5 * depth + seed,
              "relearn_set": relearn_set if step else None} | more
    add("asr", questions, hits(score, questions), labels)
    add("logprob", questions, np.full(len(questions), -3.0 + score), labels)
    level = -0.5 if arm == "O" else retain if step == 0 or retain_after is None else retain_after
    add("retain_logprob", ["retain00", "retain01"], np.full(2, level), labels)
    if point != "trajectory":  # a model that is not attacked yet has a loss on the relearn set too
      add("relearn_logprob", ["relearn00", "relearn01"], np.full(2, loss[step > 0]),
          labels | {"relearn_set": relearn_set})

  u0, u1, n0 = by_seed(unlearned), by_seed(relearned), by_seed(before)
  n1 = None if control is None else by_seed(control)
  for i, seed in enumerate(seeds):
    if original is not None:
      put("O", "original", seed, original, 0, None)
      for rate, share in zip(rates, attacked, strict=True):
        if share is not None:
          put("O", "relearned", seed, original * share, 80, None, rate)
          put("O", "relearned", seed, original * share, 20, None, rate)
    for step in (5, 10):
      put("U", "trajectory", seed, 0.5 - step / 20, 0, None, unlearn_step=step)
    for depth in range(depths):
      for arm, first, last in [("U", u0[i], u1[i])] + ([("N", n0[i], n1[i])] if n1 is not None else []):
        put(arm, "unlearned", seed, first, 0, depth)
        for rate in rates:
          put(arm, "relearned", seed, first + (last - first) / 2, 20, depth, rate)
          put(arm, "relearned", seed, last / (depth + 1), 80, depth, rate)
  plain = pa.schema([(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in RESULTS])
  return [pa.table(columns, schema=plain).cast(RESULTS)]


def clustered(clusters: Mapping[str, str]) -> dict[str, Any]:
  """Facts of questions that stand in clusters."""
  return {"questions": [{"id": question, "cluster": cluster} for question, cluster in clusters.items()]}


def frame(*variants: list[pa.Table]) -> pd.DataFrame:
  """Rows of several variants."""
  return pa.concat_tables([table for tables in variants for table in tables]).unify_dictionaries().to_pandas()
