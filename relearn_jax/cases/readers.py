"""Rows of a file by its suffix, of a repository of the Hugging Face hub, and of TensorFlow Datasets, one by one.

They are read a part at a time, so that a corpus need not fit into memory; an array in a .json file is read whole.

Only text and numbers are read. No code of a data set is run and no pickle is opened: of what the hub's library can
read, the kinds in `HUB_KINDS` are taken, and TensorFlow Datasets has no builders but those that are installed.
"""

import contextlib
import csv
import io
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from relearn_jax.data.jsonl import BOM, Row, iter_jsonl, open_bytes
from relearn_jax.errors import InputError

Fail = Callable[[str, str], InputError]  # of what is wrong, and what to do about it
HUB_KINDS = ("json", "csv", "parquet", "text", "arrow")
TOGETHER = 1000  # rows of a table that are made into Python's values together


def iter_file(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a file, each with its line, or its number where there are no lines.

  Raises:
    InputError: the file is missing, unreadable, empty, of an unknown suffix, or damaged.
  """
  suffix, empty = path.suffix.lower(), True
  if suffix not in SUFFIXES:
    with open_bytes(path):  # one that is not there is told as such
      pass
    raise InputError(f"has the suffix {suffix!r}", file=path, mend=f"expected one of {', '.join(SUFFIXES)}")
  for row in SUFFIXES[suffix](path):
    empty = False
    yield row
  if empty:
    raise InputError("has no rows", file=path, mend="give a file that has some")


def _lines(path: pathlib.Path) -> Iterator[Row]:
  return iter_jsonl(path, {})


def _json(path: pathlib.Path) -> Iterator[Row]:
  """JSON lines under another name, or an array of objects."""
  with open_bytes(path) as file:
    while (first := file.read(1)) and first in b"\xef\xbb\xbf \t\r\n":
      pass
  if first != b"[":
    return _lines(path)
  text, mend = "".join(_texts(path)), "expected an array of objects, or JSON lines"
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"is no JSON ({error})", file=path, mend=mend) from None
  for number, value in enumerate(values, 1):
    if not isinstance(value, dict):
      raise InputError(f"is a JSON {type(value).__name__}, not an object", file=path, line=number, mend=mend)
  return _numbered(values)


def _csv(path: pathlib.Path) -> Iterator[Row]:
  """All cells are text, as they are written; the first line names the columns."""
  # Lines of a CSV file end at "\r" alone, too.
  lines = (line for text in _texts(path) for line in io.StringIO(text, newline=""))
  reader, header, line = csv.reader(lines, strict=True), None, 1
  try:
    for cells in reader:
      if header is None:
        header = cells
        if twice := next((name for name in header if header.count(name) > 1), None):
          raise InputError("names a column twice", file=path, line=1, field=twice, mend="rename one of the two")
      elif cells:
        if len(cells) != len(header):
          raise InputError(f"has {len(cells)} cells, and the first line {len(header)}", file=path, line=line,
                           mend="put quotation marks around cells that hold commas or ends of lines")
        yield Row(dict(zip(header, cells, strict=True)), line)
      line = reader.line_num + 1
  except csv.Error as error:
    raise InputError(f"is no CSV ({error})", file=path, line=line, mend="save it as CSV again") from None


def _parquet(path: pathlib.Path) -> Iterator[Row]:
  import pyarrow as pa
  import pyarrow.parquet as pq
  try:
    with open_bytes(path, "a file of rows") as file:
      parts = pq.ParquetFile(file).iter_batches(TOGETHER)
      try:
        yield from _numbered(row for part in parts for row in part.to_pylist())
      except OSError as error:
        if error.errno:
          raise
        raise pa.ArrowInvalid(error) from None  # Arrow's own of a part that is damaged, and not the disk's
  except (pa.ArrowException, UnicodeDecodeError) as error:
    raise InputError(f"is no Parquet ({_first_line(error)})", file=path, mend="save it again, with text as UTF-8"
                     ) from None


def _txt(path: pathlib.Path) -> Iterator[Row]:
  """Every line that is not blank is a text."""
  lines = (line for text in _texts(path) for line in text.splitlines())
  return (Row({"text": line}, number) for number, line in enumerate(lines, 1) if line.strip())


SUFFIXES: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}


def _texts(path: pathlib.Path) -> Iterator[str]:
  """The text of a file in parts, each up to an end of line."""
  with open_bytes(path, "a file") as file:
    done = 0
    for part in file:
      try:
        yield (part.removeprefix(BOM) if not done else part).decode("utf-8")
      except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {done + error.start + 1})", file=path, mend="save the file as UTF-8"
                         ) from None
      done += len(part)


def _numbered(values: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
  """Rows that have no lines; a table's empty cells are none."""
  return (Row({key: value for key, value in row.items() if value is not None}, number)
          for number, row in enumerate(values, 1))


def _first_line(error: BaseException) -> str:
  return " ".join(str(error).split("\n")[:2]).strip()[:300]


def is_folder(place: str) -> bool:
  """Whether it is a local folder, with the home folder in the place of a `~`."""
  return pathlib.Path(place).expanduser().is_dir()


@contextlib.contextmanager
def open_hub(name: str, place: str, config: str, revision: str, split: str) -> Iterator[tuple[Iterator[Row], str]]:
  """The rows of a split, to be read within the block, and the commit that they come from ("" of a local folder).

  Args:
    name: for messages.
    place: owner/name, or a local folder laid out as a repository: its README.md declares the configurations.
    config: of the repository; "" where it has one.
    revision: commit, branch or tag; "": the newest commit.
    split: such as "train" or "train[:100]".

  Raises:
    InputError: it is not there, gated or out of reach, has no such configuration or split, or no text.
  """
  local = is_folder(place)
  fail = lambda problem, mend: InputError(problem, file=name, mend=mend)
  if local and revision:
    raise fail("is a local folder, which has no revisions", f"leave @{revision} out")
  if not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
    raise fail(f"names {place!r}, which is no local folder and no hub id (owner/name)", "check the spelling")
  options: dict[str, Any] = {"path": str(pathlib.Path(place).expanduser()) if local else place,
                             "name": config or None, "revision": revision or None}
  # What is prepared of a folder would be taken for what is in it, up to a second after it has changed.
  fresh = tempfile.TemporaryDirectory() if local else contextlib.nullcontext()
  with fresh as cache:
    table, commit = _prepare(fail, place, split, {**options, "cache_dir": cache})
    if not len(table):
      raise fail("has no rows", "give a split that has some")
    yield _table_rows(fail, place, table), "" if local else commit


def _prepare(fail: Fail, place: str, split: str, options: Mapping[str, Any]) -> tuple[Any, str]:
  """A split on disk, and its commit."""
  import datasets
  try:
    builder = datasets.load_dataset_builder(**options)
    kind = type(builder).__module__.split(".")[-1]
    if kind not in HUB_KINDS:
      raise fail(f"holds {kind}, which is not read", f"expected one of {', '.join(HUB_KINDS)}")
    if kind == "csv":  # pandas would take "None" and "NA" for empty cells
      builder = datasets.load_dataset_builder(**options, keep_default_na=False)
    builder.download_and_prepare()
    table = builder.as_dataset(split=split).with_format("arrow")  # pictures and sound are left as they are
    return table, str(builder.hash)
  except InputError:
    raise
  except Exception as error:  # its own kinds, Arrow's, the disk's, and those of the HTTP library below it
    raise fail(*_hub_trouble(error, place)) from None


def _table_rows(fail: Fail, place: str, table: Any) -> Iterator[Row]:
  """The rows of a prepared split, some at a time."""
  def values() -> Iterator[dict[str, Any]]:
    for start in range(0, len(table), TOGETHER):
      try:
        yield from table[start:start + TOGETHER].to_pylist()
      except Exception as error:  # Arrow's, the disk's
        raise fail(*_hub_trouble(error, place)) from None
  return _numbered(values())


def _hub_trouble(error: Exception, place: str) -> tuple[str, str]:
  """What is wrong, and what to do about it."""
  from datasets.exceptions import DatasetNotFoundError
  from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
  said = _first_line(error)
  while error.__cause__ is not None and not isinstance(error, (DatasetNotFoundError, ConnectionError)):
    error = error.__cause__  # type: ignore[assignment]
    said = f"{type(error).__name__}: {_first_line(error)}"
  if isinstance(error, GatedRepoError) or "gated" in said:
    return "is gated", "accept its licence on the hub, then set HF_TOKEN"
  if isinstance(error, DatasetNotFoundError):
    return f"is not found ({said})", "check the spelling, or set HF_TOKEN if it is private"
  network = type(error).__module__.startswith("httpx")
  if network or isinstance(error, (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError)):
    return (f"cannot be fetched from the hub ({type(error).__name__})",
            f"go online, or download {place} and give its folder, as hf:FOLDER:CONFIG")
  return f"cannot be read ({said})", "expected hf:REPOSITORY:CONFIG/SPLIT, of files that are UTF-8 and whole"


def iter_tfds(name: str, place: str, version: str, split: str) -> Iterator[Row]:
  """The rows of a split of TensorFlow Datasets, without TensorFlow.

  Args:
    name: for messages.
    place: name or name/config of the catalogue, found in TFDS_DATA_DIR or prepared there; or the folder of a prepared
      data set, the one with dataset_info.json.
    version: of the catalogue's; "": the newest.
    split: such as "train" or "train[:100]".

  Raises:
    InputError: it is not there or cannot be prepared, has no such split, or is not written for random access.
  """
  import tensorflow_datasets as tfds
  mend = "expected tfds:NAME/CONFIG:SPLIT, or the folder of a data set prepared as array_record or parquet"
  try:
    if is_folder(place):
      source = tfds.builder_from_directory(pathlib.Path(place).expanduser()).as_data_source(split)
    else:
      source = tfds.data_source(place + (f":{version}" if version else ""), split=split)
    yield from _numbered(_decoded((source[index] for index in range(len(source))), name))
  except InputError:
    raise
  except ImportError as error:
    raise InputError(f"cannot be prepared without another package ({_first_line(error)})", file=name,
                     mend="install it, or prepare the data set elsewhere (tfds build --file_format=array_record) and "
                     "give its folder") from None
  except Exception as error:  # of its own, of etils, of the reader, of the network
    raise InputError(f"cannot be read ({type(error).__name__}: {_first_line(error)})", file=name, mend=mend) from None


def _decoded(values: Iterable[Mapping[str, Any]], name: str) -> Iterator[dict[str, Any]]:
  for number, row in enumerate(values, 1):
    found = {}
    for field, value in row.items():
      try:
        found[field] = _plain(value)
      except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start + 1})", file=name, line=number, field=field,
                         mend="prepare the data set with text in it") from None
    yield found


def _plain(value: Any) -> Any:
  """Text for bytes, Python's numbers and lists for NumPy's."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, Mapping):
    return {key: _plain(one) for key, one in value.items()}
  if isinstance(value, list):
    return list(map(_plain, value))
  return _plain(value.tolist()) if hasattr(value, "tolist") else value
