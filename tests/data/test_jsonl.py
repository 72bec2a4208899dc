"""JSON lines: what is wrong is named by file, line and field, and what is written is whole."""

import json
import os
import pathlib
from typing import Any

import pytest

from relearn_jax.data import jsonl
from relearn_jax.data.jsonl import check_writable, read_jsonl, write_jsonl
from relearn_jax.errors import InputError

from ..generation.small import refuses

FIELDS = {"id": str, "prompt": str}
GOOD = b'{"id": "a", "prompt": "x"}\n'
LIKE = 'expected a line such as {"id": ..., "prompt": ...}'


def test_rows_come_with_their_lines_and_other_fields(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "rows.jsonl"
  text = '{"id": 1, "prompt": "caf\u00e9 \u2028 \U0001f600"}\r\n\n  \n{"id": "1", "prompt": "", "more": [1]}'
  for mark in (b"", b"\xef\xbb\xbf"):
    file.write_bytes(mark + text.encode())
    rows = read_jsonl(file, FIELDS)
    assert rows == [{"id": 1, "prompt": "caf\u00e9 \u2028 \U0001f600"}, {"id": "1", "prompt": "", "more": [1]}]
    assert [row.line for row in rows] == [1, 4]


def test_types_are_those_asked_for(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "rows.jsonl"
  file.write_text('{"number": 1, "many": ["x"], "yes": true}')
  assert read_jsonl(file, {"number": float, "many": list, "yes": bool})[0]["many"] == ["x"]


@pytest.mark.parametrize("line,field,problem,mend", [
    (b"{", None, "is no JSON (", LIKE),
    (b'{"id": 1, "prompt": "x"} {}', None, "is no JSON (Extra data, column 26)", LIKE),
    (b"1" * 5000, None, "is no JSON (", LIKE),
    (b"[" * 100000, None, "is no JSON (", LIKE),
    (b'["id", "prompt"]', None, "is a JSON list, not an object", LIKE),
    (b'"text"', None, "is a JSON str, not an object", LIKE),
    (b'{"id": 1, "prompt": "caf\xe9"}', None, "is not UTF-8 (byte 25 of the line)", "save the file as UTF-8"),
    (b'{"id": 1}', "prompt", "is missing", "give it, as str"),
    (b'{"id": 1, "prompts": "x"}', "prompt", "is missing (there is `prompts`)", "give it, as str"),
    (b'{"prompt": "x"}', "id", "is missing", "give it, as str or int"),
    (b'{"id": 1, "prompt": ["x"]}', "prompt", 'is ["x"]', "expected str"),
    (b'{"id": 1, "prompt": null}', "prompt", "is null", "expected str"),
    (b'{"id": true, "prompt": "x"}', "id", "is true", "expected str or int"),
    (b'{"id": 1.0, "prompt": "x"}', "id", "is 1.0", "expected str or int"),
    (b'{"id": "a", "prompt": "x"}', "id", "'a' stands in line 1 too", "give every row an id of its own"),
    (b'{"id": 1, "prompt": "x", "prompt": "y"}', "prompt", "is given twice", "remove one of the two"),
    (b'{"id": 1, "prompt": "x\\ud83d"}', "prompt", "holds half a surrogate pair ('\\ud83d')",
     "write the character itself, or both halves")])
def test_a_bad_line_is_named(tmp_path: pathlib.Path, line: bytes, field: str | None, problem: str, mend: str) -> None:
  file = tmp_path / "rows.jsonl"
  file.write_bytes(GOOD + b"\n" + line + b"\n")
  with refuses(problem, file=file, line=3, field=field, mend=mend):
    read_jsonl(file, FIELDS)


@pytest.mark.parametrize("kind,value,expected", [
    (int, 1.5, "int"), (int, True, "int"), (float, "1", "float"), (float, False, "float"),
    (bool, 1, "bool"), (list, {}, "list"), (dict, [], "dict")])
def test_a_wrong_type_is_named(tmp_path: pathlib.Path, kind: type, value: Any, expected: str) -> None:
  file = tmp_path / "rows.jsonl"
  file.write_text(json.dumps({"x": value}))
  with refuses(f"is {json.dumps(value)}", file=file, line=1, field="x", mend=f"expected {expected}"):
    read_jsonl(file, {"x": kind})


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_named(tmp_path: pathlib.Path, content: bytes) -> None:
  file = tmp_path / "rows.jsonl"
  file.write_bytes(content)
  with refuses("has no rows", file=file, mend='expected lines such as {"id": ..., "prompt": ...}'):
    read_jsonl(file, FIELDS)


def test_a_file_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "rows.jsonl").write_bytes(GOOD)
  missing = tmp_path / "row.jsonl"
  with refuses("does not exist", file=missing, mend=f"(there is {tmp_path / 'rows.jsonl'})"):
    read_jsonl(missing, FIELDS)
  with refuses("cannot be read (Is a directory)", file=tmp_path, mend="give a file of JSON lines"):
    read_jsonl(tmp_path, FIELDS)


def test_what_is_written_is_read_back_and_leaves_nothing_else(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "new" / "folder" / "rows.jsonl"
  rows: list[dict[str, Any]] = [{"id": 1, "prompt": "caf\u00e9 \u2028\n"}, {"id": "b", "prompt": "", "x": [0.1]}]
  check_writable(file)
  assert not list(file.parent.iterdir())
  write_jsonl(file, rows)
  assert read_jsonl(file, FIELDS) == rows and [p.name for p in file.parent.iterdir()] == ["rows.jsonl"]
  assert "caf\u00e9".encode() in file.read_bytes()
  mask = os.umask(0)
  os.umask(mask)
  assert file.stat().st_mode & 0o777 == 0o666 & ~mask  # as any file that this user makes


def test_an_interrupted_write_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "rows.jsonl"
  write_jsonl(file, [{"id": 1}])
  with pytest.raises(ValueError, match="JSON compliant"):
    write_jsonl(file, [{"id": 2}, {"id": float("nan")}])
  assert file.read_text() == '{"id": 1}\n' and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_link_stays_a_link(tmp_path: pathlib.Path) -> None:
  (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
  write_jsonl(tmp_path / "link.jsonl", [{"id": 1}])
  assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "rows.jsonl").read_text() == '{"id": 1}\n'


def test_a_place_that_cannot_be_written_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  file = tmp_path / "file"
  file.write_text("x")
  for place, why in ((tmp_path, "it is a folder"), (file / "out.jsonl", "a file stands where its folder should be"),
                     (pathlib.Path("/dev/null"), "it is no regular file")):
    with refuses(f"cannot be written ({why})", file=place, field="--output", mend="give a file in a folder"):
      check_writable(place)
  with pytest.raises(InputError, match="cannot be written"):
    write_jsonl(file / "out.jsonl", [{"id": 1}])

  def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(jsonl.os, "replace", full)
  with refuses("cannot be written (No space left on device)", file=tmp_path / "out", field="--output", mend="give"):
    write_jsonl(tmp_path / "out", [{"id": 1}])
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_folder_of_others_is_named(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "closed"
  folder.mkdir(mode=0o500)
  with refuses("cannot be written (Permission denied)", file=folder / "out", field="--output", mend="give a file"):
    check_writable(folder / "out")
