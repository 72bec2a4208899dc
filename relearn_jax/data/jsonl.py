"""JSON lines in and out, with errors that name the line."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from relearn_jax.errors import InputError


def read_jsonl(path: pathlib.Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
  """Reads rows, each a JSON object with at least the given fields; blank lines are skipped.

  Args:
    path: the file, UTF-8.
    fields: name -> type of the fields that every row must have. Values of `id` must differ.

  Returns:
    The rows, each with its line number (from 1) under "line".

  Raises:
    InputError: naming the file, the line and the field.
  """
  mend = "expected one JSON object a line, with " + ", ".join(f'"{name}"' for name in fields)
  try:
    text = path.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise InputError("does not exist", file=path, mend=mend) from None
  except UnicodeDecodeError as error:
    raise InputError(f"is not UTF-8 (byte {error.start})", file=path, mend="save it as UTF-8") from None
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, mend="give a readable file") from None
  rows: list[dict[str, Any]] = []
  seen: dict[Any, int] = {}
  for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f"is no JSON ({error.msg} at column {error.colno})", file=path, line=number, mend=mend) from None
    if not isinstance(row, dict):
      raise InputError(f"is a JSON {type(row).__name__}, not an object", file=path, line=number, mend=mend)
    for name, kind in fields.items():
      if name not in row:
        raise InputError("is missing", file=path, line=number, field=name, mend=mend)
      if not isinstance(row[name], kind) or isinstance(row[name], bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"is a {type(row[name]).__name__}", file=path, line=number, field=name, mend=f"expected {wanted}")
    if "id" in fields:
      if row["id"] in seen:
        raise InputError(f"{row['id']!r} stands in line {seen[row['id']]} too", file=path, line=number, field="id",
                         mend="give each row an id of its own")
      seen[row["id"]] = number
    rows.append({**row, "line": number})
  if not rows:
    raise InputError("has no rows", file=path, mend=mend)
  return rows


def check_writable(path: pathlib.Path) -> None:
  """Refuses an output that could not be written at the end of a long job."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise IsADirectoryError(21, "it is a folder")
    probe = _temporary(path)
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=path, field="--output",
                     mend="give a file that you may write to") from None


def write_jsonl(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows, all of them or none."""
  check_writable(path)
  temporary = _temporary(path)
  with temporary.open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  os.replace(temporary, path)


def _temporary(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f".{path.name}.{os.getpid()}.tmp")
