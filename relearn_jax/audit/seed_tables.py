"""From rows to tables [seeds, questions]: which models there are, and what each was worth."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

NONE = -1  # stands for None in groups
DRAWN = ", batch "  # in the rows' column `adapter` of attacks that a search has drawn
NULLABLE = ("method", "depth", "relearn_set", "adapter", "learning_rate")


class Key(NamedTuple):
  """What a table is of; None where there is no such thing: the attack's, before it; a method, of the original."""

  variant: str
  arm: str
  method: str | None
  point: str
  depth: int | None
  relearn_set: str | None
  adapter: str | None
  learning_rate: float | None
  relearn_step: int
  metric: str


class StepKey(NamedTuple):
  """What a table of a trajectory is of."""

  variant: str
  method: str | None
  unlearn_step: int
  metric: str


@dataclasses.dataclass(frozen=True)
class Table:
  """All seeds' values of one point of a curve.

  Attributes:
    seeds: in the order of the rows of `values`.
    questions: in the order of its columns.
    values: `[seeds, questions]`.
    unlearn_steps: of each seed's model.
    incomplete: questions that are left out, since some seed has no value for them.
  """

  seeds: tuple[int, ...]
  questions: tuple[str, ...]
  values: np.ndarray
  unlearn_steps: tuple[int, ...]
  incomplete: int = 0

  def only(self, seeds: Iterable[int]) -> np.ndarray:
    """The values of some of the seeds, in the order given."""
    return self.values[[self.seeds.index(seed) for seed in seeds]]


def make_tables(rows: pd.DataFrame) -> dict[Key, Table]:
  """Groups rows into tables; a question that some seed of a group lacks is left out of it, and counted."""
  return {Key(*key): table for key, table in _group(rows, Key._fields).items()}


def trajectory_tables(rows: pd.DataFrame) -> dict[StepKey, Table]:
  """The same of rows along unlearning."""
  return {StepKey(*key): table for key, table in _group(rows, StepKey._fields).items()}


def _group(rows: pd.DataFrame, keys: Sequence[str]) -> dict[tuple, Table]:
  plain = rows.astype({name: object for name in rows.columns if isinstance(rows[name].dtype, pd.CategoricalDtype)})
  plain["depth"] = plain["depth"].fillna(NONE).astype(int)
  plain["learning_rate"] = plain["learning_rate"].where(plain["relearn_step"] > 0, float(NONE))  # the attack's
  for name in ("method", "relearn_set", "adapter"):
    plain[name] = plain[name].where(plain[name].notna(), "")
  tables = {}
  for key, group in plain.groupby(list(keys), sort=True):
    every = group.pivot(index="seed", columns="question", values="value")
    wide = every.dropna(axis=1)
    if wide.empty:
      continue
    label = tuple(None if part in ("", NONE) and name in NULLABLE else int(part) if isinstance(part, np.integer) else
                  part for name, part in zip(keys, key, strict=True))
    steps = group.groupby("seed")["unlearn_step"].first()
    tables[label] = Table(tuple(int(s) for s in wide.index), tuple(wide.columns), wide.to_numpy(np.float64),
                          tuple(int(steps[s]) for s in wide.index), every.shape[1] - wide.shape[1])
  return tables
