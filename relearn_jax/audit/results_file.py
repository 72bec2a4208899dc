"""answers.parquet, what models said, and results.parquet, the scores of that: a row a question, with facts beside.

Rows of both are keyed alike. Scores are a function of the answers and of the questions among the facts, so that a
metric can be added when no model is at hand any more.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from relearn_jax.errors import InputError
from relearn_jax.metrics.choices import LETTER, OPTION, Options, choice_scores
from relearn_jax.metrics.scores import PERPLEXITY, Asked, Stored, get_metric, perplexity
from relearn_jax.parallel.processes import write_atomically

_WORD = pa.dictionary(pa.int32(), pa.string())
KEY = [("case", _WORD), ("variant", _WORD), ("method", _WORD), ("arm", _WORD), ("point", _WORD), ("depth", pa.int32()),
       ("unlearn_step", pa.int32()), ("relearn_set", _WORD), ("adapter", _WORD), ("learning_rate", pa.float64()),
       ("seed", pa.int32()), ("relearn_step", pa.int32())]
ANSWERS = pa.schema([*KEY, ("kind", _WORD), ("item", _WORD), ("text", pa.string()), ("logprob", pa.float64()),
                     ("matched", pa.string()), ("tokens", pa.int32())])
RESULTS = pa.schema([*KEY, ("question", _WORD), ("metric", _WORD), ("value", pa.float64())])
QUESTION = "question"  # the kind of an answer; the other kinds are rows whose mean log-probability was scored
GENERIC = "generic"  # the kind whose perplexity is a score
# Metrics of how likely an answer is: missing where a provider does not tell.
LIKELIHOOD = ("answer_probability", "exact_memorization", "extraction_strength")
ANSWERS_FILE, RESULTS_FILE = "answers.parquet", "results.parquet"
_FACTS = b"relearn_jax.facts"


def answer_rows(kind: str, items: Sequence[str], logprob: np.ndarray | None, tokens: Sequence[int],
                texts: Sequence[str] | None = None, matched: Sequence[str | None] | None = None,
                there: np.ndarray | None = None, **labels: Any) -> pa.Table:
  """Answers of one model.

  Args:
    kind: "question", or which rows were scored, of `interview.ROWS`.
    items: ids of the questions or rows.
    logprob: of the answer, or of a token of the row, `[len(items)]`; None: a provider did not tell.
    tokens: how many tokens were scored of each.
    texts: completions; None for rows.
    matched: see `metrics.scores.Stored`; None for rows, and of an answer of which a provider did not tell.
    there: whether the model has such a row; the others are left out. None: it has all.
    **labels: the columns of the key, equal for all rows.

  Raises:
    ValueError: a value is not finite. A model that gives such values has ended, and has no rows.
  """
  real = np.ones(len(items), bool) if there is None else there
  if logprob is not None and not np.isfinite(logprob[real]).all():
    raise ValueError(f"a log-probability of {kind} rows is not finite ({labels})")
  places = np.flatnonzero(real).tolist()
  own = {"item": [items[i] for i in places],
         "logprob": None if logprob is None else logprob[real].astype(np.float64),
         "tokens": [int(tokens[i]) for i in places],
         **{name: None if values is None else [values[i] for i in places]
            for name, values in (("text", texts), ("matched", matched))}}
  arrays = []
  for field in ANSWERS:
    plain = pa.string() if field.type == _WORD else field.type
    if field.name in own and own[field.name] is not None:
      array = pa.array(own[field.name], plain)
    else:
      value = kind if field.name == "kind" else None if field.name in own else labels[field.name]
      array = pa.repeat(pa.scalar(value, plain), len(places))
    arrays.append(array.dictionary_encode().cast(_WORD) if field.type == _WORD else array)
  return pa.Table.from_arrays(arrays, schema=ANSWERS)


def score_answers(answers: pd.DataFrame, questions: Sequence[Asked], metrics: Sequence[str],
                  choices: Sequence[Options] = ()) -> pa.Table:
  """Rows of results: a score a question and metric, its log-probability, and that of the rows that were scored.

  A model of which generic text was scored has its perplexity besides, in one row; one of which options were scored has
  a row for each of their questions, by letter and in full.

  Args:
    answers: as `ANSWERS` has them.
    questions: that were asked.
    metrics: keys of `metrics.scores.METRICS`.
    choices: questions with options whose likelihoods stand among the answers.
  """
  by_id = {question.id: question for question in questions}
  plain = answers.astype({name: object for name in answers.columns
                          if isinstance(answers[name].dtype, pd.CategoricalDtype)})
  asked, rows = plain[plain["kind"] == QUESTION], plain[plain["kind"] != QUESTION]
  keys = [name for name, _ in KEY]
  told = asked[asked["logprob"].notna()]
  parts = [told[[*keys, "item"]].assign(metric="logprob", value=told["logprob"]),
           rows[[*keys, "item"]].assign(metric=rows["kind"] + "_logprob", value=rows["logprob"])]
  for metric in metrics:
    known = asked[asked["matched"].notna()] if metric in LIKELIHOOD else asked
    score, columns = get_metric(metric).score, (known[name] for name in ("item", "text", "logprob", "matched"))
    values = [score(by_id[item], Stored(*stored)) for item, *stored in zip(*columns, strict=True)]
    parts.append(known[[*keys, "item"]].assign(metric=metric, value=values))
  generic = rows[rows["kind"] == GENERIC]
  for key, one in generic.groupby(keys, dropna=False, sort=False):
    value = perplexity(one["logprob"].tolist(), one["tokens"].tolist())
    parts.append(pd.DataFrame([[*key, GENERIC, PERPLEXITY, value]], columns=[*keys, "item", "metric", "value"]))
  for kind in (LETTER, OPTION) if choices else ():
    for key, one in rows[rows["kind"] == kind].groupby(keys, dropna=False, sort=False):
      values = choice_scores(one["logprob"].to_numpy(), choices)
      parts.append(pd.DataFrame([[*key, choice.id, f"choice_{kind}", value] for choice, value in
                                 zip(choices, values, strict=True)], columns=[*keys, "item", "metric", "value"]))
  return rows_table(pd.concat([part for part in parts if len(part)]).rename(columns={"item": "question"}))


def rows_table(frame: pd.DataFrame) -> pa.Table:
  """Rows of results from a frame with their columns as plain objects."""
  loose = pa.schema([(field.name, pa.string() if field.type == _WORD else field.type) for field in RESULTS])
  return pa.Table.from_pandas(frame[RESULTS.names], schema=loose, preserve_index=False).cast(RESULTS)


def write_rows(path: pathlib.Path, tables: Sequence[pa.Table], facts: Mapping[str, Any]) -> None:
  """Writes rows, and `facts` (JSON) beside them in the file's metadata; atomic."""
  table = pa.concat_tables(tables).unify_dictionaries().replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
  write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_rows(path: pathlib.Path, schema: pa.Schema = RESULTS) -> tuple[pd.DataFrame, dict[str, Any]]:
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
  if missing := [field.name for field in schema if field.name not in table.column_names]:
    raise InputError("is missing", file=path, field=missing[0], mend=f"remove the file, then {mend}")
  if _FACTS not in metadata:
    raise InputError("has no facts in its metadata", file=path, mend=f"remove it, then {mend}")
  return table.to_pandas(), json.loads(metadata[_FACTS])
