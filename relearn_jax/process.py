"""What the operating system does to a command: full disks, refused paths, closed pipes, plain terminals."""

import contextlib
import errno
import io
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from relearn_jax.errors import InputError

CLOSED_PIPE = 141  # 128 and the number of SIGPIPE

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
           errno.ENAMETOOLONG, errno.ELOOP)
FAILED = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETXTBSY)

# Libraries in other languages state the number in their message: TensorStore, Rust's, Arrow's.
_NUMBER = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
_PATH = re.compile(r'"(/[^"]+)"')


def disk_trouble(error: BaseException, places: Mapping[str, str]) -> InputError | None:
  """The message for a person about an error that came from the disk; None for any other, a programming error.

  Args:
    error: whatever a command raised; what it was raised from, and the members of a group, are looked at, too.
    places: flag -> folder or file that the command writes; the one that holds the path is named, or the first.
  """
  found = _find(error)
  if found is None:
    return None
  number, path = found
  holds = lambda place: path is not None and _absolute(path).is_relative_to(_absolute(place))
  field = next((flag for flag, place in places.items() if holds(place)), None)
  if path is None and places:  # a write does not say to which file
    field, path = next(iter(places.items()))
  why = os.strerror(number)
  if number in FULL:
    return InputError(f"cannot be written ({why})", file=path, field=field,
                      mend="make room on its disk and run the same command again, or give a place on another one")
  return InputError(f"cannot be read or written ({why})", file=path, field=field,
                    mend="give a place that you may read and write" if number in REFUSED else "try again, or elsewhere")


def _absolute(path: str) -> pathlib.Path:
  return pathlib.Path(os.path.abspath(path))


def _find(error: BaseException | None) -> tuple[int, str | None] | None:
  """Number and path of an error of the disk."""
  if error is None:
    return None
  if isinstance(error, BaseExceptionGroup):
    return next(filter(None, map(_find, error.exceptions)), None)
  number, path = None, None
  if isinstance(error, OSError) and error.errno is not None:
    number, path = error.errno, error.filename2 or error.filename
  elif match := _NUMBER.search(str(error)):
    number = int(next(filter(None, match.groups())))
    path = named[1] if (named := _PATH.search(str(error))) else None
  if number in (*FULL, *REFUSED, *FAILED):
    return number, os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None
  return _find(error.__cause__)


def accept_any_terminal() -> None:
  """From here on, characters that the terminal's encoding lacks are printed as escapes."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
  """Writes out what was printed.

  Raises:
    OSError: a pipe is closed, or a disk is full.
  """
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      stream.flush()


def drop_output() -> None:
  """What cannot be printed any more is dropped, at the interpreter's end, too, where it would be complained about."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def leave(status: int) -> NoReturn:
  """Ends the process now.

  Threads of the devices' runtime may still be at work on what nobody waits for any more; where the interpreter is
  taken down around them, the process dies of a segmentation fault at times. So nothing is taken down.
  """
  drop_output()
  os._exit(status)
