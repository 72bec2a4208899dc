"""A folder that belongs to one configuration: claimed, locked, refused to any other; and a lock to wait for."""

import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relearn_jax.errors import InputError


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration (a dataclass) as it stands in config.json."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


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


def claim_workdir(workdir: pathlib.Path, config: Any) -> bool:
  """Makes `workdir` this configuration's own; returns whether it already was.

  Raises:
    InputError: it cannot be written, or belongs to another configuration (the fields are named).
  """
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      there = json.loads(path.read_text())
      if changed := differences(to_dict(config), there):
        raise InputError("belongs to another configuration:\n  " + "\n  ".join(changed), file=path,
                         mend="give another --workdir, or the configuration that it was started with")
      return True
    probe = workdir / ".probe"
    probe.touch()
    probe.unlink()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=workdir, field="--workdir",
                     mend="give a folder that you may write to") from None
  except json.JSONDecodeError as error:
    raise InputError(f"is no JSON ({error.msg})", file=path, mend="give another --workdir") from None
  return False


def nothing_left(workdir: pathlib.Path, done: bool) -> str:
  """The line that says that a command had nothing to do in its workdir; nothing where it had."""
  return "" if done else f"Nothing is left to do in {workdir}.\n"


@contextmanager
def only_process(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir's lock, which the system releases when the process dies, however it dies."""
  with (workdir / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError("is in use by another process that is still running", file=workdir, field="--workdir",
                       mend="wait for it, or give another folder") from None
    yield


@contextmanager
def one_at_a_time(path: pathlib.Path, field: str) -> Iterator[None]:
  """Holds the lock of the file `path`, after whoever else has it; the system releases it when the process dies.

  Raises:
    InputError: the folder that `field` names cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
  except OSError as error:
    raise InputError(f"cannot be written ({error.strerror})", file=path.parent, field=field,
                     mend="give a folder that you may write to") from None
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
