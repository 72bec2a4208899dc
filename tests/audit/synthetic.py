"""Rows of an audit that never ran, with attack success as told."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from relearn_jax.audit.rows import block

QUESTIONS = [f"q{i:03d}" for i in range(40)]
CHECKED = [{"relearn_set": "prefixes", "variant": "7", "seed": 0, "num_lines": 4, "hits": [], "passed": True}]


def hits(share: float, questions: Sequence[str] = QUESTIONS) -> np.ndarray:
  """1 for the first `share` of the questions, 0 for the others."""
  return (np.arange(len(questions)) < round(share * len(questions))).astype(float)


def parts(variant: str = "7", *, seeds: Sequence[int] = (0, 1, 2), original: float | None = 1.0, unlearned: float = 0.0,
          relearned: Sequence[float] | float = 0.9, control: float | None = 0.0, retain: float = -1.0,
          questions: Sequence[str] = QUESTIONS, depths: int = 1) -> list[pa.Table]:
  """The tables of one variant; `relearned` is by seed, `control` after relearning; no control where it is None."""
  rates = [relearned] * len(seeds) if isinstance(relearned, float) else relearned
  tables = []

  def put(arm: str, point: str, seed: int, rate: float, step: int, depth: int | None, **more: Any) -> None:
    labels = {"case": "names", "method": "ga", "adapter": "full", "learning_rate": 1e-4, "variant": variant,
              "arm": arm, "point": point, "seed": seed, "relearn_step": step, "depth": depth,
              "unlearn_step": 0 if depth is None else 10 + 5 * depth + seed,
              "relearn_set": "prefixes" if step else None} | more
    tables.append(block(hits(rate, questions), list(questions), metric="asr", **labels))
    tables.append(block(np.full(len(questions), -3.0 + rate), list(questions), metric="logprob", **labels))
    level = -0.5 if arm == "O" else retain
    tables.append(block(np.full(2, level), ["retain00", "retain01"], metric="retain_logprob", **labels))

  for seed, rate in zip(seeds, rates, strict=True):
    if original is not None:
      put("O", "original", seed, original, 0, None)
      put("O", "relearned", seed, original, 80, None)
    for step in (5, 10):
      put("U", "trajectory", seed, 0.5 - step / 20, 0, None, unlearn_step=step)
    for depth in range(depths):
      arms = [("U", unlearned, rate)] + ([("N", 0.0, control)] if control is not None else [])
      for arm, before, after in arms:
        put(arm, "unlearned", seed, before, 0, depth)
        put(arm, "relearned", seed, before + (after - before) / 2, 20, depth)
        put(arm, "relearned", seed, after / (depth + 1), 80, depth)
  return tables


def frame(*variants: list[pa.Table]) -> pd.DataFrame:
  """Rows of several variants."""
  return pa.concat_tables([table for tables in variants for table in tables]).unify_dictionaries().to_pandas()
