"""From rows to tables [seeds, questions]: which models there are, and what each was worth."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pandas as pd

KEYS = ["variant", "arm", "point", "depth", "relearn_step", "metric"]


@dataclasses.dataclass(frozen=True)
class Table:
  """All seeds' values of one point of a curve.

  Attributes:
    seeds: in the order of the rows of `values`.
    questions: in the order of its columns.
    values: `[seeds, questions]`.
    unlearn_steps: of each seed's model.
    relearn_set: what it was relearned on, if at all.
  """

  seeds: tuple[int, ...]
  questions: tuple[str, ...]
  values: np.ndarray
  unlearn_steps: tuple[int, ...]
  relearn_set: str | None

  def only(self, seeds: Iterable[int]) -> np.ndarray:
    """The values of some of the seeds, in the order given."""
    return self.values[[self.seeds.index(seed) for seed in seeds]]


Key = tuple[str, str, str, int | None, int, str]  # the KEYS


def make_tables(rows: pd.DataFrame, keys: Iterable[str] = KEYS) -> dict[tuple, Table]:
  """Groups rows by `keys` (depth None where there is none) into tables; a question that some seed of a
  group lacks is left out of it."""
  plain = rows.astype({name: object for name in rows.columns if isinstance(rows[name].dtype, pd.CategoricalDtype)})
  plain["depth"] = plain["depth"].fillna(-1).astype(int)
  tables = {}
  for key, group in plain.groupby(list(keys), sort=True):
    wide = group.pivot(index="seed", columns="question", values="value").dropna(axis=1)
    if wide.empty:
      continue
    label = tuple((None if name == "depth" and part == -1 else int(part) if isinstance(part, np.integer) else part)
                  for name, part in zip(keys, key, strict=True))
    steps = group.groupby("seed")["unlearn_step"].first()
    sets = [s for s in group["relearn_set"].unique() if isinstance(s, str)]
    tables[label] = Table(tuple(int(s) for s in wide.index), tuple(wide.columns), wide.to_numpy(np.float64),
                          tuple(int(steps[s]) for s in wide.index), sets[0] if sets else None)
  return tables
