"""From rows to tables [seeds, questions]: which models there are, and what each was worth."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pandas as pd

KEYS = ["variant", "arm", "point", "depth", "relearn_step", "learning_rate", "metric"]
NONE = -1  # stands for None in groups


@dataclasses.dataclass(frozen=True)
class Table:
  """All seeds' values of one point of a curve.

  Attributes:
    seeds: in the order of the rows of `values`.
    questions: in the order of its columns.
    values: `[seeds, questions]`.
    unlearn_steps: of each seed's model.
    relearn_set: what it was relearned on, if at all.
    incomplete: questions that are left out, since some seed has no value for them.
  """

  seeds: tuple[int, ...]
  questions: tuple[str, ...]
  values: np.ndarray
  unlearn_steps: tuple[int, ...]
  relearn_set: str | None
  incomplete: int = 0

  def only(self, seeds: Iterable[int]) -> np.ndarray:
    """The values of some of the seeds, in the order given."""
    return self.values[[self.seeds.index(seed) for seed in seeds]]


Key = tuple[str, str, str, int | None, int, float | None, str]  # the KEYS


def make_tables(rows: pd.DataFrame, keys: Iterable[str] = KEYS) -> dict[tuple, Table]:
  """Groups rows by `keys` into tables; a question that some seed of a group lacks is left out of it, and counted.

  In a key the depth is None where there is none, and the learning rate, which is the attack's, before the attack.
  """
  plain = rows.astype({name: object for name in rows.columns if isinstance(rows[name].dtype, pd.CategoricalDtype)})
  plain["depth"] = plain["depth"].fillna(NONE).astype(int)
  plain["learning_rate"] = plain["learning_rate"].where(plain["relearn_step"] > 0, float(NONE))
  tables = {}
  for key, group in plain.groupby(list(keys), sort=True):
    every = group.pivot(index="seed", columns="question", values="value")
    wide = every.dropna(axis=1)
    if wide.empty:
      continue
    label = tuple((None if name in ("depth", "learning_rate") and part == NONE else
                   int(part) if isinstance(part, np.integer) else part) for name, part in zip(keys, key, strict=True))
    steps = group.groupby("seed")["unlearn_step"].first()
    sets = [s for s in group["relearn_set"].unique() if isinstance(s, str)]
    tables[label] = Table(tuple(int(s) for s in wide.index), tuple(wide.columns), wide.to_numpy(np.float64),
                          tuple(int(steps[s]) for s in wide.index), sets[0] if sets else None,
                          every.shape[1] - wide.shape[1])
  return tables
