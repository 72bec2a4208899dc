"""Results: one row a question, in a Parquet file that carries everything a report needs."""

import json
import pathlib
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from relearn_jax.errors import InputError

_WORD = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema([
    ("case", _WORD), ("variant", _WORD), ("method", _WORD), ("arm", _WORD), ("point", _WORD), ("depth", pa.int32()),
    ("unlearn_step", pa.int32()), ("relearn_set", _WORD), ("adapter", _WORD), ("learning_rate", pa.float64()),
    ("seed", pa.int32()), ("relearn_step", pa.int32()), ("question", _WORD), ("metric", _WORD),
    ("value", pa.float64())])
_FACTS = b"relearn_jax.facts"


def block(values: np.ndarray, questions: list[str], there: np.ndarray | None = None, **labels: Any) -> pa.Table:
  """Rows of one model and metric.

  Args:
    values: a value a question.
    questions: their ids.
    there: whether there is such a question for this model; the others get no row. None: all of them.
    **labels: the other columns, equal for all rows.

  Raises:
    ValueError: a value is not finite. A model that gives such values has ended, and has no rows.
  """
  real = np.ones(len(values), bool) if there is None else there
  if not np.isfinite(values[real]).all():
    raise ValueError(f"a value of metric {labels['metric']!r} is not finite ({labels})")
  columns = {"question": [q for q, ok in zip(questions, real, strict=True) if ok], "value": values[real]}
  arrays = []
  for field in SCHEMA:
    if field.name in columns:
      array = pa.array(columns[field.name], pa.string() if field.type == _WORD else field.type)
    else:
      scalar = pa.scalar(labels[field.name], pa.string() if field.type == _WORD else field.type)
      array = pa.repeat(scalar, int(real.sum()))
    arrays.append(array.dictionary_encode().cast(_WORD) if field.type == _WORD else array)
  return pa.Table.from_arrays(arrays, schema=SCHEMA)


def write_rows(path: pathlib.Path, tables: list[pa.Table], facts: dict[str, Any]) -> None:
  """Writes rows, and `facts` (JSON) beside them in the file's metadata; atomic."""
  table = pa.concat_tables(tables).unify_dictionaries().replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
  temporary = path.with_suffix(".tmp")
  pq.write_table(table, temporary)
  temporary.replace(path)


def read_rows(path: pathlib.Path) -> tuple[pd.DataFrame, dict[str, Any]]:
  """Rows as a data frame, and the facts.

  Raises:
    InputError: the file is missing, damaged, or not one of ours.
  """
  mend = "run `relearn audit` with this workdir first (it continues where it stopped)"
  try:
    table = pq.read_table(path)
  except FileNotFoundError:
    raise InputError("does not exist", file=path, mend=mend) from None
  except (pa.ArrowInvalid, OSError) as error:
    raise InputError(f"cannot be read ({error})", file=path, mend=f"remove it, then {mend}") from None
  metadata = table.schema.metadata or {}
  if missing := [field.name for field in SCHEMA if field.name not in table.column_names]:
    raise InputError("is missing", file=path, field=missing[0], mend=f"remove the file, then {mend}")
  if _FACTS not in metadata:
    raise InputError("has no facts in its metadata", file=path, mend=f"remove it, then {mend}")
  return table.to_pandas(), json.loads(metadata[_FACTS])
