"""Text from anywhere: what a source is called, and the rows that it stands for.

A source is a string:

    PATH, or file:PATH                            a file: .jsonl, .json, .csv, .parquet or .txt
    hf:REPOSITORY[@REVISION][:CONFIG][/SPLIT]     hf:locuslab/TOFU:forget05, hf:me/books@v2:novels/test[:100]
    tfds:NAME[/CONFIG][:VERSION][:SPLIT]          tfds:ag_news_subset:test[:1000], tfds:FOLDER:train
    prepared:FOLDER                               what `relearn prepare` has written: tokens; see `data.prepared`

The split is "train" where none is given (after a repository without a configuration it is `hf:REPOSITORY:/SPLIT`). A
folder may stand for a repository, or for a prepared data set.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from relearn_jax.cases.readers import is_folder, iter_file, iter_tfds, open_hub
from relearn_jax.data.jsonl import Kind, Row, check_rows, read_jsonl
from relearn_jax.errors import InputError

HUB = re.compile(r"hf:(?P<place>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>[^/]*)(/(?P<split>.+))?)?")
TFDS = re.compile(r"tfds:(?P<place>[^:]+)(:(?P<revision>\d[\w.*]*))?(:(?P<split>[^\d:].*))?")
SCHEME = re.compile(r"(\w\w+):(?!\\)")
COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where text comes from.

  Attributes:
    text: as it was given.
    kind: "file", "hf", "tfds" or "prepared".
    place: file, folder, repository or name.
    config: of a repository.
    revision: of a repository, or version of a data set.
    split: which of its rows.
  """

  text: str
  kind: str
  place: str
  config: str = ""
  revision: str = ""
  split: str = "train"

  @property
  def path(self) -> pathlib.Path:
    """The file; of what is none, its name, for messages."""
    return pathlib.Path(self.place if self.kind == "file" else self.text)

  @property
  def name(self) -> str:
    """What its rows are called: after the file, or the configuration or data set and any split but "train"."""
    if self.kind == "file":
      return self.path.stem
    # Of a folder of TensorFlow Datasets the last part is a version.
    parts = [part for part in self.place.split("/") if part and not re.fullmatch(r"[\d.]+", part)]
    words = [self.config or (parts or [self.place])[-1], *[self.split] * (self.split != "train")]
    return "-".join(word for text in words for word in re.findall(r"[\w.]+", text))


@dataclasses.dataclass(frozen=True)
class Read:
  """What was read.

  Attributes:
    rows: with the columns of the source.
    revision: the commit of a repository; "" where there is none.
    digest: SHA-256 of the rows, in hexadecimal; of a file, of its bytes.
  """

  rows: Sequence[Row]
  revision: str
  digest: str


def parse_source(text: str | pathlib.Path) -> Source:
  """What a source's string means.

  Raises:
    InputError: it begins like a source, and is none.

  >>> parse_source("hf:locuslab/TOFU@v1:forget05/train[:20]").split
  'train[:20]'
  """
  text = str(text)
  kind = found[1] if (found := SCHEME.match(text)) else "file"
  if kind == "file":
    return Source(text, kind, os.path.expanduser(text.removeprefix("file:")))
  if kind == "prepared":
    return Source(text, kind, os.path.expanduser(text.removeprefix("prepared:")))
  if kind not in ("hf", "tfds"):
    if pathlib.Path(text).exists():
      return Source(text, "file", text)
    raise InputError(f"is of kind {kind!r}", file=text, mend="expected a path, or file:, hf: or tfds: and what follows")
  match = (HUB if kind == "hf" else TFDS).fullmatch(text)
  if not match:
    form = "hf:REPOSITORY[@REVISION][:CONFIG][/SPLIT]" if kind == "hf" else "tfds:NAME[/CONFIG][:VERSION][:SPLIT]"
    raise InputError("is no source", file=text, mend=f"expected {form}")
  return Source(text, kind, **{key: value for key, value in match.groupdict().items() if value})


def read(text: str | pathlib.Path) -> Read:
  """The rows of a source, with its own columns.

  Raises:
    InputError: see `readers`.
  """
  source = parse_source(text)
  return _read(source) if source.kind == "file" or is_folder(source.place) else _read_once(source)


def _read(source: Source) -> Read:
  with open_source(source) as reading:
    rows = list(reading)
  return Read(rows, reading.revision, reading.digest())


class Reading:
  """The rows of a source, one after the other, with its own columns.

  Attributes:
    revision: see `Read`.
  """

  def __init__(self, source: Source, rows: Iterator[Row], revision: str = ""):
    self.revision, self._source, self._rows, self._digest = revision, source, rows, hashlib.sha256()

  def __iter__(self) -> Iterator[Row]:
    for row in self._rows:
      if self._source.kind != "file":
        line = json.dumps(row, sort_keys=True, default=str) + "\n"
        self._digest.update(line.encode("utf-8", "surrogatepass"))
      yield row

  def digest(self) -> str:
    """See `Read`; of what is no file, once all rows have been read."""
    if self._source.kind != "file":
      return self._digest.hexdigest()
    with self._source.path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[Reading]:
  """The rows of a source, to be read within the block; see `read`."""
  if source.kind == "hf":
    with open_hub(source.text, source.place, source.config, source.revision, source.split) as (rows, revision):
      yield Reading(source, rows, revision)
  elif source.kind == "tfds":
    yield Reading(source, iter_tfds(source.text, source.place, source.revision, source.split))
  elif source.kind == "file":
    yield Reading(source, iter_file(source.path))
  else:
    raise InputError("holds tokens, and text is wanted", file=source.text,
                     mend="give the source that it was prepared from")


# What is fetched may change while a command runs, and is asked for by every case of an audit.
_read_once = functools.lru_cache(maxsize=32)(_read)


def source_input(text: str | pathlib.Path) -> pathlib.Path | str:
  """What decides a source's rows, for `workdir.file_digests`: the file, or the digest of the rows and their commit."""
  source = parse_source(text)
  if source.kind == "file":
    return source.path
  found = read(text)
  return found.digest + (f" at revision {found.revision}" if found.revision else "")


def read_source(text: str | pathlib.Path, columns: Mapping[str, str] | None = None,
                fields: Mapping[str, Kind] | None = None) -> list[Row]:
  """The rows of a source, under our names.

  Args:
    text: the source.
    columns: our field -> the column that it is read from, or a text with columns in braces, such as "Question:
      {question}". A source that lacks the column may have the field itself.
    fields: that every row must have, with their types; see `data.jsonl.read_jsonl`.

  Raises:
    InputError: the source cannot be read; or a column that is wanted (of `fields`, or where none are given of
      `columns`) is not there.
  """
  columns, fields, source = columns or {}, fields or {}, parse_source(text)
  path = source.path
  if is_lines(source) and not columns:
    return read_jsonl(path, fields)
  rows = list(rename(read(text).rows, columns))
  check_columns(rows, fields or columns, columns, path)
  return check_rows(rows, fields, path)


def is_lines(source: Source) -> bool:
  """Whether it is a file of JSON lines, every row of which may have fields of its own."""
  return source.kind == "file" and source.path.suffix.lower() in (".jsonl", ".ndjson")


def rename(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
  """The rows with our names in place of their columns', see `read_source`; a row that lacks one is left as it is."""
  for row in rows:
    of = {field: COLUMN.findall(column) or [column] for field, column in columns.items()}
    of = {field: names for field, names in of.items() if all(name in row for name in names)}
    fill = lambda match, row=row: str(row[match[1]])
    own = {field: COLUMN.sub(fill, columns[field]) if COLUMN.search(columns[field]) else row[names[0]]
           for field, names in of.items()}
    taken = {name for names in of.values() for name in names}
    yield Row({key: value for key, value in row.items() if key not in taken} | own, row.line)


def check_columns(rows: Sequence[Row], fields: Iterable[str], columns: Mapping[str, str], path: pathlib.Path) -> None:
  """`InputError` for a field that no row has."""
  there = {name: None for row in rows for name in row}
  for field in fields:
    if field not in there:
      asked = f", nor is the column {columns[field]!r}" if field in columns else ""
      raise InputError(f"is not there{asked}: the columns are {', '.join(there)}", file=path, field=field,
                       mend=f"name its column, such as columns={{{field!r}: {next(iter(there), 'column')!r}}}")


def check_columns_setting(columns: object, where: object = None, field: str = "columns") -> dict[str, str]:
  """The setting, which the command line gives as text where it is no Python dictionary.

  Args:
    columns: what was set.
    where, field: for messages.

  Raises:
    InputError: it is no dictionary of strings.
  """
  if isinstance(columns, Mapping) and all(isinstance(one, str) and one for pair in columns.items() for one in pair):
    return dict(columns)
  raise InputError(f"is {columns!r}", file=where, field=field,
                   mend="expected our fields and their columns, such as {'prompt': 'question'}")
