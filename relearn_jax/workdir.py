"""A folder that belongs to one configuration and its files: claimed, locked, refused to others; a lock to wait for."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import filelock

from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import agree, by_first, check_alike, check_shared, write_atomically

INPUTS = "inputs.json"  # digests of the files that a workdir was begun with


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration (a dataclass, or what was recorded of one) as it stands in config.json."""
  return json.loads(json.dumps(config if isinstance(config, Mapping) else dataclasses.asdict(config)))


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(values, dict):
    for key, value in values.items():
      yield from _flatten(value, f"{prefix}{key}.")
  else:
    yield prefix[:-1], values


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
  """The fields in which two configurations differ, as `field: ours, theirs` lines.

  >>> differences({"relearn": {"steps": 3}, "seed": 0}, {"relearn": {"steps": 5}, "seed": 0})
  ['relearn.steps: 3 here, 5 there']
  """
  left, right = dict(_flatten(ours)), dict(_flatten(theirs))
  absent = "(absent)"
  return [f"{key}: {left.get(key, absent)!r} here, {right.get(key, absent)!r} there"
          for key in sorted(left.keys() | right.keys()) if left.get(key, absent) != right.get(key, absent)]


def file_digests(files: Mapping[str, pathlib.Path | str]) -> dict[str, str]:
  """Name -> SHA-256 of a file's contents, in hexadecimal; what is a digest already stays."""
  found = {}
  for name, path in files.items():
    if isinstance(path, str):
      found[name] = path
      continue
    with path.open("rb") as file:
      found[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return found


def without(values: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
  """A nested configuration without the fields that name files and folders."""
  return {key: without(value, paths) if isinstance(value, dict) else value for key, value in values.items()
          if isinstance(value, dict) or key not in paths}


def _grows(line: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], axes: Collection[str]) -> bool:
  """Whether a difference is an axis that has become longer, or a group of fields that was not in use before."""
  field = line.split(": ")[0]
  if field not in theirs:
    return any(field.startswith(f"{axis}.") for axis in axes)
  long = ours.get(field), theirs[field]
  return field in axes and all(isinstance(x, list) for x in long) and set(theirs[field]) <= set(ours[field])


def is_claimed(workdir: pathlib.Path, config: Any, inputs: Mapping[str, str] | None = None, paths: Collection[str] = (),
               axes: Collection[str] = (), may_be_new: Collection[str] = ()) -> bool:
  """Whether `workdir` is this configuration's own already; nothing is written.

  Args:
    workdir: the folder, which need not exist.
    config: a dataclass, or JSON-safe values.
    inputs: digests of all files that decide the result, by the field that names each; None: there are no such files.
    paths: fields of the configuration that name files and folders. They are not compared: what the files contain
      decides, and not by which path they were reached, from which folder.
    axes: dotted fields that may have become longer, and groups of fields that may have come into use; such a
      configuration is no other one, but is not claimed yet.
    may_be_new: names of inputs that may have come along since; likewise.

  Raises:
    InputError: it belongs to another configuration (the fields are named), or was begun with other contents of a
      file (its field is named).
  """
  return agree(lambda: _is_claimed(workdir, config, inputs, paths, axes, may_be_new))


def _is_claimed(workdir: pathlib.Path, config: Any, inputs: Mapping[str, str] | None, paths: Collection[str],
                axes: Collection[str], may_be_new: Collection[str]) -> bool:
  path = workdir / "config.json"
  if not path.exists():
    return False
  here, before = (without(values, paths) for values in (to_dict(config), _read(path)))
  lines = differences(here, before)
  ours, theirs = dict(_flatten(here)), dict(_flatten(before))
  if changed := [line for line in lines if not _grows(line, ours, theirs, axes)]:
    raise InputError("belongs to another configuration:\n  " + "\n  ".join(changed), file=path,
                     mend="give another --workdir, or the configuration that it was started with")
  new: set[str] = set()
  if inputs is not None:
    there = _read(workdir / INPUTS)
    new = (inputs.keys() - there.keys()) & set(may_be_new)
    if other := sorted(name for name in (there.keys() | inputs.keys()) - new if there.get(name) != inputs.get(name)):
      raise InputError(f"was written for other contents of {', '.join(other)}", file=workdir / INPUTS,
                       mend="give another --workdir, or the files that it was started with")
  return not lines and not new


def claim_workdir(workdir: pathlib.Path, config: Any, inputs: Mapping[str, str] | None = None,
                  paths: Collection[str] = (), axes: Collection[str] = (), may_be_new: Collection[str] = ()) -> bool:
  """Makes `workdir` this configuration's own; returns whether it already was.

  Args:
    workdir, config, inputs, paths, axes, may_be_new: see `is_claimed`.

  Raises:
    InputError: it cannot be written, or belongs to another configuration or other files; see `is_claimed`.
  """
  def claim() -> bool:
    if _is_claimed(workdir, config, inputs, paths, axes, may_be_new):
      return True
    probe = workdir / ".probe"
    probe.touch()
    probe.unlink()
    if inputs is not None:
      _write(workdir / INPUTS, inputs)
    _write(workdir / "config.json", to_dict(config))  # last: where it is, the files are pinned
    return False
  try:
    by_first(lambda: workdir.mkdir(parents=True, exist_ok=True))
    check_shared(workdir, "--workdir")
    return agree(claim)
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=workdir, field="--workdir",
                     mend="give a folder that you may write to") from None


def check_inputs_alike(inputs: Callable[[], Mapping[str, str] | None]) -> None:
  """Refuses processes of one command that read other contents of files.

  Args:
    inputs: gives digests (see `is_claimed`); it is asked where there are several processes.

  Raises:
    InputError: naming process and field.
  """
  other = lambda ours, theirs: sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
  check_alike(lambda: dict(inputs() or {}), other, "what is read is not the same on all hosts",
              mend="give every host the same files, or one folder")


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    values: dict[str, Any] = json.loads(path.read_text())
  except FileNotFoundError:
    raise InputError("does not exist, and nothing else tells which files were read here", file=path,
                     mend="give another --workdir") from None
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, field="--workdir",
                     mend="give a folder that you may read") from None
  except json.JSONDecodeError as error:
    raise InputError(f"is no JSON ({error.msg})", file=path, mend="give another --workdir") from None
  return values


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  write_atomically(path, json.dumps(values, indent=2) + "\n")


def nothing_left(workdir: pathlib.Path, done: bool) -> str:
  """The line that says that a command had nothing to do in its workdir; nothing where it had."""
  return "" if done else f"Nothing is left to do in {workdir}.\n"


@contextmanager
def only_process(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir's lock, which the system releases when the process dies, however it dies.

  Of several processes of one command the first holds it for all.
  """
  lock = filelock.FileLock(workdir / ".lock")

  def acquire() -> None:
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      raise InputError("is in use by another process that is still running", file=workdir, field="--workdir",
                       mend="wait for it, or give another folder") from None
  by_first(acquire)
  try:
    yield
  finally:
    lock.release()


@contextmanager
def one_at_a_time(path: pathlib.Path, field: str) -> Iterator[None]:
  """Holds the lock of the file `path`, after whoever else has it; the system releases it when the process dies.

  Raises:
    InputError: the folder that `field` names cannot be written.
  """
  lock = filelock.FileLock(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=path.parent, field=field,
                     mend="give a folder that you may write to") from None
  try:
    yield
  finally:
    lock.release()
