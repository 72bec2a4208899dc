"""JSON lines in and out: every bad row is named by file, line and field before anything is computed."""

import codecs
import contextlib
import difflib
import json
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import is_first, temporary_of, write_atomically

Kind = type | tuple[type, ...]
BOM = codecs.BOM_UTF8


class Row(dict[str, Any]):
  """A JSON object that knows its line.

  Attributes:
    line: its line in the file, counted from 1.
  """

  def __init__(self, values: Mapping[str, Any], line: int):
    super().__init__(values)
    self.line = line


def read_jsonl(path: pathlib.Path, fields: Mapping[str, Kind]) -> list[Row]:
  """Rows of a JSON lines file, in order; blank lines are passed over, other fields are kept unchecked.

  Args:
    path: the file, UTF-8 (with or without a byte order mark).
    fields: field -> its type or types, for the fields that every row must have. An `id` may be a string or
      an integer whatever is said here, and no two rows may have the same.

  Raises:
    InputError: with file, line, field and mend: the file is missing, unreadable or without rows; a line
      is no UTF-8, no JSON or no object; a field is missing, given twice, of another type, or holds
      half a surrogate pair, which no tokenizer and no UTF-8 file takes.
  """
  return check_rows(iter_jsonl(path, fields), fields, path)


def iter_jsonl(path: pathlib.Path, fields: Mapping[str, Kind]) -> Iterator[Row]:
  """As `read_jsonl`, line by line; that a row has these fields is not checked."""
  empty = True
  with open_bytes(path) as file:
    # Lines end at "\n" alone: JSON strings may hold U+2028 and other ends of line that str.splitlines knows.
    for number, line in enumerate(file, 1):
      line = (line.removeprefix(BOM) if number == 1 else line).removesuffix(b"\n")
      if line.strip():
        empty = False
        yield Row(_parse(line, path, number, fields), number)
  if empty:
    raise InputError("has no rows", file=path, mend=f"expected lines such as {_example(fields)}")


@contextlib.contextmanager
def open_bytes(path: pathlib.Path, what: str = "a file of JSON lines") -> Iterator[BinaryIO]:
  """A file to be read within the block; `what` is wanted, for messages.

  Raises:
    InputError: there is none, or it cannot be read.
  """
  try:
    with path.open("rb") as file:
      file.peek(1)  # a folder can be opened, and not be read
      yield file
  except FileNotFoundError:
    raise InputError("does not exist", file=path, mend=f"give {what}{_near(path)}") from None
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, mend=f"give {what} that you may read") from None


def check_rows(rows: Iterable[Row], fields: Mapping[str, Kind], path: pathlib.Path) -> list[Row]:
  """The rows, each of which has these fields; see `read_jsonl`."""
  found: list[Row] = []
  seen: dict[tuple[type, Any], int] = {}
  for row in rows:
    for field, kind in fields.items():
      check_row(row, field, kind, path)
    if "id" in fields:
      key = (type(row["id"]), row["id"])
      if key in seen:
        raise InputError(f"{row['id']!r} stands in line {seen[key]} too", file=path, line=row.line, field="id",
                         mend="give every row an id of its own")
      seen[key] = row.line
    found.append(row)
  return found


def _near(path: pathlib.Path) -> str:
  siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
  near = difflib.get_close_matches(path.name, siblings, 1)
  return f" (there is {path.parent / near[0]})" if near else ""


def _example(fields: Mapping[str, Kind]) -> str:
  return "{" + ", ".join(f'"{field}": ...' for field in fields) + "}"


def _parse(line: bytes, path: pathlib.Path, number: int, fields: Mapping[str, Kind]) -> dict[str, Any]:
  mend = f"expected a line such as {_example(fields)}"

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, value in pairs:
      if field in values:  # json would keep the last one in silence
        raise InputError("is given twice", file=path, line=number, field=field, mend="remove one of the two")
      values[field] = value
    return values

  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"is not UTF-8 (byte {error.start + 1} of the line)", file=path, line=number,
                     mend="save the file as UTF-8") from None
  try:
    values = json.loads(text, object_pairs_hook=once)
  except InputError:
    raise
  except json.JSONDecodeError as error:
    raise InputError(f"is no JSON ({error.msg}, column {error.colno})", file=path, line=number, mend=mend) from None
  except (ValueError, RecursionError) as error:  # a number of too many digits; too deep a nesting
    raise InputError(f"is no JSON ({error})", file=path, line=number, mend=mend) from None
  if not isinstance(values, dict):
    raise InputError(f"is a JSON {type(values).__name__}, not an object", file=path, line=number, mend=mend)
  return values


def check_row(row: Row, field: str, kind: Kind, path: pathlib.Path) -> None:
  """`InputError` unless a row has a field of this type; see `read_jsonl`."""
  kinds = (str, int) if field == "id" else kind if isinstance(kind, tuple) else (kind,)
  expected = " or ".join(k.__name__ for k in kinds)
  if field not in row:
    near = difflib.get_close_matches(field, row, 1)
    hint = f" (there is `{near[0]}`)" if near else ""
    raise InputError(f"is missing{hint}", file=path, line=row.line, field=field, mend=f"give it, as {expected}")
  value = row[field]
  # Python takes True for an integer; JSON's 1 is a number as good as 1.0.
  fits = bool in kinds if isinstance(value, bool) else isinstance(value, (*kinds, int) if float in kinds else kinds)
  if not fits:
    raise InputError(f"is {json.dumps(value, default=repr)[:60]}", file=path, line=row.line, field=field,
                     mend=f"expected {expected}")
  if isinstance(value, str):
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise InputError(f"holds half a surrogate pair ({value[error.start]!a})", file=path, line=row.line, field=field,
                       mend="write the character itself, or both halves") from None


def _unwritable(path: pathlib.Path, reason: OSError | str) -> InputError:
  why = reason if isinstance(reason, str) else reason.strerror or str(reason)
  if isinstance(reason, FileExistsError):  # of mkdir
    why = "a file stands where its folder should be"
  return InputError(f"cannot be written ({why})", file=path, field="--output",
                    mend="give a file in a folder that you may write to")


def check_writable(path: pathlib.Path) -> None:
  """Makes the folder of an output file and tries it, so that no work is lost at its end.

  Raises:
    InputError: the path is no file, or its folder cannot be made or written to; field `--output`.
  """
  if not is_first():
    return
  probe = temporary_of(pathlib.Path(os.path.realpath(path)))
  try:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
      raise _unwritable(path, "it is a folder" if path.is_dir() else "it is no regular file")
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
  except OSError as error:
    raise _unwritable(path, error) from None
  finally:
    with contextlib.suppress(OSError):  # its folder is not there, or not ours: nothing was written either
      probe.unlink(missing_ok=True)


def write_jsonl(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as UTF-8 JSON lines; the file appears complete or not at all, its folder is made.

  Raises:
    InputError: it cannot be written; field `--output`.
  """
  def write(temporary: pathlib.Path) -> None:
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
  try:
    # Beside the file itself, not beside a link to it: a rename works within one disk only.
    write_atomically(pathlib.Path(os.path.realpath(path)), write)
  except OSError as error:
    raise _unwritable(path, error) from None
