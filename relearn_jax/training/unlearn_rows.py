"""The data sets that an unlearning method reads, made from a job's files."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from relearn_jax.cases.files import read_texts
from relearn_jax.cases.sources import check_columns_setting, parse_source, read_source, source_input
from relearn_jax.data.chat import open_chat
from relearn_jax.data.jsonl import Row
from relearn_jax.data.packing import pack_rows
from relearn_jax.data.prepared import METADATA, PreparedRows
from relearn_jax.data.refusals import REFUSALS
from relearn_jax.data.relabel import UNCOUNTED
from relearn_jax.data.rows import Encoded
from relearn_jax.data.stores import Store
from relearn_jax.data.texts import encode_rows, stack_rows
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.start import cache_dir
from relearn_jax.training.job import SOURCES, UnlearnJob
from relearn_jax.training.prepare import check_prepared

MOST_HELD = 2**26  # tokens, with padding, of a prepared data set that is held whole: half a GiB with their mask


def read_rows(job: UnlearnJob, checked: Checked, tokenizer: Any) -> dict[str, TokenRows | PreparedRows]:
  """The data sets that the job's method reads, `[1, rows, length]` on the host.

  Prepared ones stay where they are, unless the method wants statistics of their rows. Row i of "idk", "alternate" and
  "relabelled" belongs to row i of "forget", whose order of batches they share.

  Raises:
    InputError: naming file, line and field.
  """
  chat = open_chat(job.chat, tokenizer, checked.path, "chat_template") if job.chat_template else None
  forget, texts = parse_source(job.forget).path, functools.partial(job_texts, job)
  prepared = open_prepared(job)
  made = {"idk": lambda: (refusal_rows(job, texts(job.forget), forget), forget),
          "alternate": lambda: (_alternates(job, texts(job.forget)), parse_source(job.alternates).path)}
  found: dict[str, TokenRows | PreparedRows] = {}
  packs = job.recipe.objective.packs
  for name in sorted(job.recipe.objective.rows):
    if name in prepared:
      some, is_held = prepared[name], holds_all(job, name, prepared[name])
      with naming(job, name):
        check_prepared(some, checked, chat)
      found[name] = stack_rows(some.read(range(len(some))), 1) if is_held else some
      continue
    anchors = read_anchors(job.anchors) if name == "relabelled" else None
    source = job.forget if anchors is not None or name in made else getattr(job, name)
    rows, file = made[name]() if name in made else (texts(source), parse_source(source).path)
    encoded = encode_rows(tokenizer, rows, file, checked.config.max_positions, chat=chat, anchors=anchors)
    if anchors is not None:
      _check_relabelled(encoded, parse_source(job.anchors).path)
    found[name] = (pack_rows if job.pack and name in packs else stack_rows)(encoded, 1)
  return found


def open_prepared(job: UnlearnJob) -> dict[str, PreparedRows]:
  """Data set -> its rows, of those whose source is prepared.

  Raises:
    InputError: naming the data set: there are none, or their text is wanted.
  """
  reads, sources = job.recipe.objective.rows, {name: parse_source(getattr(job, name)) for name in ("forget", "retain")}
  prepared = {name: source for name, source in sources.items() if source.kind == "prepared"}
  if "forget" in prepared and (wants := sorted(reads & {"idk", "alternate", "relabelled"})):
    raise InputError(f"holds tokens, and method {job.method!r} makes data set {wants[0]!r} of the text",
                     file=job.forget, field="forget", mend="give the source that it was prepared from")
  found = {}
  for name, source in prepared.items():
    if name in reads:
      with naming(job, name):
        found[name] = PreparedRows(Store(source.place, cache_dir() / "prepared"))
  return found


@contextlib.contextmanager
def naming(job: UnlearnJob, name: str) -> Iterator[None]:
  """What is found wrong with the files of a prepared data set is told with the job's field that names them."""
  try:
    yield
  except InputError as error:
    raise InputError(f"cannot be used: {error}", file=getattr(job, name), field=name) from None


def holds_all(job: UnlearnJob, name: str, rows: PreparedRows) -> bool:
  """Whether all rows of a prepared data set are held, since statistics of a frozen model are kept for each of them.

  Raises:
    InputError: they are too many for that, or are to be packed.
  """
  objective = job.recipe.objective
  if job.pack and name in objective.packs:
    raise InputError("is prepared, and rows that are prepared stay apart", file=getattr(job, name), field=name,
                     mend="set pack to False, or give the source that it was prepared from")
  if all(need.rows != name for need in objective.needs):
    return False
  counts = rows.about.counts
  if (size := counts.rows * counts.longest) > MOST_HELD:
    raise InputError(f"has {size} tokens with padding, and method {job.method!r} keeps statistics of the model before "
                     f"unlearning for all of them, which is done up to {MOST_HELD}", file=rows.store.path(METADATA),
                     field=name, mend="prepare fewer rows, or take a method that keeps none, such as gd")
  return True


def job_texts(job: UnlearnJob, source: str) -> list[Row]:
  """The rows of one of the job's sources of texts, under our names."""
  return read_texts(source, check_columns_setting(job.columns))


def input_files(job: UnlearnJob, checked: Checked) -> dict[str, pathlib.Path | str]:
  """Field -> file, of all files that decide what a job makes; those of the model by their names in its folder.

  Of a source that is no file, it is a digest of the rows; of one that is prepared, that of its metadata.json.

  What the method does not read is left out, and so are `references`, which are compared with what they are of.
  """
  reads = job.recipe.objective.rows
  fields = ["forget", *(field for rows, field in SOURCES.items() if rows in reads)]
  if "idk" in reads and job.refusals:
    fields.append("refusals")
  prepared = {field: rows.digest for field, rows in open_prepared(job).items()}
  return {field: prepared.get(field) or source_input(getattr(job, field)) for field in fields} | {
      f"model/{name}": file for name, file in sorted(checked.deciding_files().items())}


def refusal_rows(job: UnlearnJob, forget: Sequence[Row], file: pathlib.Path) -> list[Row]:
  """The prompts of the forget rows, each with an answer drawn from the refusals."""
  answers: Sequence[str] = REFUSALS
  if job.refusals:
    answers = [row["answer"] for row in read_source(job.refusals, fields={"answer": str})]
    if not all(answer.strip() for answer in answers):
      raise InputError("is empty in a row", file=job.refusals, field="answer",
                       mend="give the refusal, or remove the row")
  rng, rows = np.random.default_rng([job.seed, 3]), []
  for row in forget:
    if "text" in row:
      raise InputError("stands where a prompt is needed that can be refused", file=file, line=row.line, field="text",
                       mend=f'give {{"prompt", "answer"}} rows to method {job.method!r}')
    answer = answers[int(rng.integers(len(answers)))]
    # Where answers of the file begin with the space after the prompt, so does the refusal.
    space = " " if row["answer"][:1].isspace() and not answer[:1].isspace() else ""
    rows.append(Row({"prompt": row["prompt"], "answer": space + answer}, row.line))
  return rows


def _alternates(job: UnlearnJob, forget: Sequence[Row]) -> list[Row]:
  """The rows of `alternates`, checked to go with the forget rows one by one."""
  path, rows = parse_source(job.alternates).path, job_texts(job, job.alternates)
  if len(rows) != len(forget):
    raise InputError(f"has {len(rows)} rows, and the forget set {len(forget)}", file=path, field="alternates",
                     mend="give an alternate for each forget row, in their order")
  for row, other in zip(rows, forget, strict=True):
    if row.get("prompt") != other.get("prompt"):
      raise InputError(f"is not that of line {other.line} of the forget set", file=path, line=row.line, field="prompt",
                       mend="give the same prompts in the same order")
  return rows


def read_anchors(source: str | pathlib.Path) -> dict[str, str]:
  """Term -> generic term, from rows `{"term", "generic"}`.

  Raises:
    InputError: naming line and field: something is empty, or a term stands there twice.
  """
  found: dict[str, str] = {}
  path = parse_source(source).path
  for row in read_source(source, fields={"term": str, "generic": str}):
    for field in ("term", "generic"):
      if row[field] != row[field].strip() or not row[field]:
        raise InputError(f"is {row[field]!r}", file=path, line=row.line, field=field,
                         mend="give a word or a name, without a space around it")
    if row["term"] in found:
      raise InputError(f"{row['term']!r} stands there twice", file=path, line=row.line, field="term",
                       mend="give one generic term")
    found[row["term"]] = row["generic"]
  return found


def _check_relabelled(rows: Sequence[Encoded], path: pathlib.Path) -> None:
  """`InputError` where no label differs: none of the terms occurs, and the text itself would be learned."""
  changed = sum(label not in (token, UNCOUNTED) for row in rows for token, label in
                zip(row.ids[row.start:], (row.labels or row.ids)[row.start:], strict=True))
  if not changed:
    raise InputError("changes no label of the forget set", file=path, field="anchors",
                     mend="give terms that occur there as whole words, as they are spelled there")
