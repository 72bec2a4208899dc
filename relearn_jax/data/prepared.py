"""Rows as tokens on disk, as `relearn prepare` writes them and grain reads them.

    rows-00000-of-00008.array_record   a record a row: the place of the first token that counts, then the tokens, as
                                       little-endian int32
    metadata.json                      see `About`
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from relearn_jax.data.rows import Encoded
from relearn_jax.data.stores import AGAIN, AT_ONCE, File, Store
from relearn_jax.errors import InputError

METADATA, SCHEMA = "metadata.json", 1
MOST_OPEN = 256  # shards of a folder that are open together; systems give a process 1,024 files
NUMBERS = np.dtype("<i4")
NAME, DIGEST = re.compile(r"[\w-]+\.array_record"), re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Shard(File):
  """A file of rows.

  Attributes:
    rows: how many.
  """

  rows: int


@dataclasses.dataclass(frozen=True)
class Counts:
  """What is counted while rows are written.

  Attributes:
    rows: how many.
    tokens: of all rows.
    longest: tokens of the longest row.
    most_counted: tokens that count, of the row with the most.
    largest_id: of all tokens.
    shards: the files, in the order of their rows.
  """

  rows: int
  tokens: int
  longest: int
  most_counted: int
  largest_id: int
  shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class About:
  """What metadata.json says. Its own digest stands for all of it, and so for the rows.

  Attributes:
    counts: of the rows.
    tokenizer: file of the tokenizer -> its SHA-256.
    prompts: rows that have a prompt, which a chat template would have rendered.
    chat: digest of the chat template and what it was told; "": none was used.
    source: what the rows were made from: its name, columns, revision, digest.
  """

  counts: Counts
  tokenizer: Mapping[str, str]
  prompts: int
  chat: str
  source: Mapping[str, Any]


def write_shards(folder: pathlib.Path, rows: Iterable[Encoded], rows_per_shard: int) -> Counts:
  """Writes rows into shards, one after the other, as they come.

  Args:
    folder: that is empty.
    rows: at least one, without labels.
    rows_per_shard: of all but the last.

  Raises:
    OSError: they cannot be written.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  writer, sizes, tokens, longest, most, largest = None, [0], 0, 0, 0, 0
  unnamed = lambda index: folder / f"rows-{index:05d}"  # the number of shards is not known yet
  for ids, start, labels in rows:
    assert labels is None, "labels are not kept"
    if writer and sizes[-1] == rows_per_shard:
      _write(writer.close)
      writer = None
      sizes.append(0)
    # A group of its own for each record, so that any one is read without others.
    writer = writer or ArrayRecordWriter(str(unnamed(len(sizes) - 1)), "group_size:1")
    _write(writer.write, np.array([start, *ids], NUMBERS).tobytes())
    sizes[-1] += 1
    tokens, longest, most = tokens + len(ids), max(longest, len(ids)), max(most, len(ids) - start)
    largest = max(largest, *ids)
  assert writer is not None, "no rows"
  _write(writer.close)
  shards = []
  for index, size in enumerate(sizes):
    path = unnamed(index).rename(folder / f"rows-{index:05d}-of-{len(sizes):05d}.array_record")
    with path.open("rb") as file:
      shards.append(Shard(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), size))
  return Counts(sum(sizes), tokens, longest, most, largest, tuple(shards))


def _write(do: Callable[..., object], *arguments: Any) -> None:
  """Calls array_record, which tells of the disk in words alone: "write() failed: No space left on device; writing ...".
  """
  try:
    do(*arguments)
  except RuntimeError as error:
    number = _number(error) or errno.EIO
    raise OSError(number, os.strerror(number)) from error


def _number(error: RuntimeError) -> int | None:
  """Of the system's error that array_record tells of, where it is one."""
  return next((number for number in errno.errorcode if f": {os.strerror(number)};" in str(error)), None)


def write_metadata(folder: pathlib.Path, about: About) -> None:
  """The last file of a folder of rows."""
  values = {"schema_version": SCHEMA, **dataclasses.asdict(about)}
  (folder / METADATA).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


class PreparedRows:
  """The rows of a folder, each of which is read where it is asked for.

  Attributes:
    about: what metadata.json says.
    digest: SHA-256 of metadata.json, in hexadecimal.
    store: where they lie.
  """

  def __init__(self, store: Store):
    """
    Raises:
      InputError: there is no metadata.json, or it is damaged or of another version.
    """
    content = store.read(METADATA, "give a folder that `relearn prepare` has written, whole")
    self.store, self.digest = store, hashlib.sha256(content).hexdigest()
    self.about = _parse(content, store.path(METADATA))
    self._ends = np.cumsum([shard.rows for shard in self.about.counts.shards])
    self._source: Any = None
    self._open, self._lock = set[int](), threading.Lock()

  def __len__(self) -> int:
    return self.about.counts.rows

  def check_shards(self) -> None:
    """Looks whether all shards are there; nothing is read.

    Raises:
      InputError: naming one that is missing, or was cut.
    """
    self.store.check(self.about.counts.shards)

  def check_contents(self) -> None:
    """Reads all shards of a disk, whose sizes tell little: they are multiples of 64 KiB.

    Raises:
      InputError: naming one that is not what was written.
    """
    self.store.check_contents(self.about.counts.shards)

  def read(self, places: Sequence[int] | np.ndarray) -> list[Encoded]:
    """The rows at some places. Of a store, the shards that hold them are fetched first, unless they are there already.

    Raises:
      InputError: a shard cannot be fetched, or is damaged; it is named.
    """
    if not len(places):
      return []
    shards = self.about.counts.shards
    places = np.asarray(places)
    of = np.searchsorted(self._ends, places, "right")
    wanted = np.unique(of).tolist()
    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(wanted))) as pool:
      list(pool.map(lambda index: self.store.fetch(shards[index]), wanted))
    try:
      records = self._records(places, of)
    except RuntimeError:  # array_record's, which does not tell the file
      for index in wanted:
        try:
          self._records(places[of == index], of[of == index])
        except RuntimeError as error:
          file = self.store.local(shards[index])
          if number := _number(error):
            raise InputError(f"cannot be read ({os.strerror(number)})", file=file,
                             mend="give a place that this host may read") from None
          raise InputError(f"is damaged ({str(error).split(';')[0][:200]})", file=file,
                           mend="remove it: it is fetched again" if self.store.is_remote else AGAIN) from None
      raise
    numbers = [np.frombuffer(record, NUMBERS).tolist() for record in records]
    return [Encoded(ids, start) for start, *ids in numbers]

  def _records(self, places: np.ndarray, of: np.ndarray) -> Sequence[bytes]:
    """The records at places that lie in shards `of`."""
    import grain
    if self._source is None:  # opens none of the files, since it is told of their rows
      self._source = grain.sources.ArrayRecordDataSource(
          [_Whole(str(self.store.local(shard)), shard.rows) for shard in self.about.counts.shards])
    found, wanted = [b""] * len(places), np.unique(of)
    for some in np.split(wanted, range(MOST_OPEN, len(wanted), MOST_OPEN)):
      at = np.flatnonzero(np.isin(of, some))
      with self._lock:  # no thread's files are closed while it reads them
        if len(self._open | set(some.tolist())) > MOST_OPEN:
          with self._source:  # whose end closes all files; they are opened again as they are wanted
            self._open.clear()
        self._open |= set(some.tolist())
        records = self._source.__getitems__(places[at].tolist())
      for index, record in zip(at.tolist(), records, strict=True):
        found[index] = record
    return found


class _Whole:
  """All rows of a file, as array_record wants to be told of them."""

  skip = 0

  def __init__(self, filename: str, rows: int):
    self.filename, self.take, self.examples_in_shard = filename, rows, rows


def _parse(content: bytes, file: str) -> About:
  """What metadata.json says.

  Raises:
    InputError: naming the field.
  """
  def fail(problem: str, field: str | None = None, mend: str = AGAIN) -> InputError:
    return InputError(problem, file=file, field=field, mend=mend)
  try:
    values = json.loads(content)
  except ValueError as error:
    raise fail(f"is no JSON ({error})") from None
  if not isinstance(values, dict) or "schema_version" not in values:
    raise fail("says no `schema_version`", mend="give a folder that `relearn prepare` has written")
  if values["schema_version"] != SCHEMA:
    raise fail(f"is {values['schema_version']!r}, and {SCHEMA} is read here", "schema_version",
               "prepare the rows again, or use the version of relearn_jax that wrote them")
  try:
    counts = values["counts"]
    shards = tuple(Shard(str(shard["name"]), int(shard["bytes"]), str(shard["sha256"]), int(shard["rows"]))
                   for shard in counts["shards"])
    numbers = {key: int(counts[key]) for key in ("rows", "tokens", "longest", "most_counted", "largest_id")}
    about = About(Counts(**numbers, shards=shards), dict(values["tokenizer"]), int(values["prompts"]),
                  str(values["chat"]), dict(values["source"]))
  except (KeyError, TypeError, ValueError) as error:
    raise fail(f"is damaged ({type(error).__name__}: {error})") from None
  if not shards or sum(shard.rows for shard in shards) != about.counts.rows:
    raise fail(f"is {about.counts.rows}, and its shards have {sum(shard.rows for shard in shards)}", "counts.rows")
  for shard in shards:  # parts of paths
    if not NAME.fullmatch(shard.name) or not DIGEST.fullmatch(shard.sha256):
      raise fail(f"has {shard.name!r} of SHA-256 {shard.sha256!r}", "counts.shards")
  return about
