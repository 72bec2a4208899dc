"""Several processes of one command: who writes, what one decides for all, files, and arrays that are not local.

Each runs the whole program. What they find by looking (at a disk, a clock, their memory) may differ, and processes that
take different ways wait for each other forever; so process 0 looks, and tells the others: `agree`. It alone writes, and
reads back what it has written. Where there is one process, which is the rule, everything here is the plain thing. How
they find each other, and end together, is in `join.py`. JAX is imported where arrays are asked for, and nowhere else:
rooms without arrays write files, too.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import msgpack

from relearn_jax.errors import InputError

T = TypeVar("T")
PATIENCE_MS = 1000  # an interrupt is noticed between two waits, not within one
CLEARED_EVERY = 500  # decisions, after which the processes meet, so that what was told can be forgotten


@dataclasses.dataclass
class Peers:
  """What a process knows of the others.

  Attributes:
    store: key -> bytes, the same for all processes: the client of JAX's coordinator.
    me: number of this process.
    count: of processes.
    told: number of decisions so far; equal on all processes.
    looking: whether this process is deciding for all, so that what it asks on the way is its own business.
  """

  store: Any
  me: int
  count: int
  told: int = 0
  looking: bool = False


_peers: Peers | None = None  # None: alone


def meet(store: Any, me: int, count: int) -> None:
  """From here on there are several processes; see `join.join`."""
  global _peers
  _peers = Peers(store, me, count)


def is_first() -> bool:
  """Whether this is the process that writes, decides and talks to the terminal."""
  return _peers is None or _peers.me == 0


def is_alone() -> bool:
  """Whether there is no other process."""
  return _peers is None


def number() -> int:
  """Of this process, for messages."""
  return 0 if _peers is None else _peers.me


def agree(look: Callable[[], T]) -> T:
  """What process 0 finds, on every process; the others do not look. They must all ask, in the same order.

  Args:
    look: gives a value of plain types (lists for tuples). What it raises ends all processes.
  """
  if _peers is None or _peers.looking:
    return look()
  return _tell(look, _place(sys._getframe(1)))


def by_first(do: Callable[[], object]) -> None:
  """Process 0 does something that the others wait for."""
  def look() -> None:
    do()
  if _peers is None or _peers.looking:
    return look()
  return _tell(look, _place(sys._getframe(1)))


def _place(frame: FrameType) -> str:
  """Where the program is. No line: processes with other code must get as far as being told so."""
  return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"


def _tell(look: Callable[[], T], where: str) -> T:
  assert _peers is not None
  _peers.told += 1
  key = f"relearn/told/{_peers.told}"
  if _peers.me == 0:
    _peers.looking = True
    try:
      value = look()
    finally:
      _peers.looking = False
    said = pack([where, value])
    _peers.store.key_value_set_bytes(key, said)
    value = unpack(said)[1]  # as the others see it
  else:
    asked, value = unpack(wait(key))
    if asked != where:
      raise RuntimeError(f"process {_peers.me} is at {where}, and process 0 at {asked}")
  if _peers.told % CLEARED_EVERY == 0:
    _forget()
  return value


def pack(value: Any) -> bytes:
  """A value of plain types as bytes. What comes over a network is read as data, never as code."""
  return bytes(msgpack.packb(value))


def unpack(data: bytes) -> Any:
  """What `pack` was given, with lists for tuples."""
  return msgpack.unpackb(data, strict_map_key=False)


def _forget() -> None:
  """Lets the coordinator forget what every process has read by now."""
  assert _peers is not None
  last = _peers.told
  everyone(None)
  if _peers.me == 0:
    for told in range(max(1, last - CLEARED_EVERY), last):
      _peers.store.key_value_delete(f"relearn/told/{told}")


def wait(key: str) -> bytes:
  """What another process has put into the store, or will."""
  assert _peers is not None
  while True:
    try:
      return bytes(_peers.store.blocking_key_value_get_bytes(key, PATIENCE_MS))
    except RuntimeError as error:  # JAX's is one
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def put(key: str, value: bytes) -> None:
  """Puts something into the store for others to `wait` for; once only."""
  assert _peers is not None
  _peers.store.key_value_set_bytes(key, value)


def wait_for_all(prefix: str, seconds: float) -> None:
  """Waits until every other process has put something there, under its number, but no longer than some seconds."""
  assert _peers is not None
  end = time.monotonic() + seconds
  for other in range(1, _peers.count):
    _peers.store.blocking_key_value_get_bytes(f"{prefix}{other}", max(1, int(1000 * (end - time.monotonic()))))


def everyone(value: T) -> list[T]:
  """The value of every process, by its number, on each of them."""
  if _peers is None or _peers.looking:
    return [value]
  peers, place = _peers, _place(sys._getframe(1))
  mine = f"relearn/each/{peers.told}/"
  if peers.me:
    peers.store.key_value_set_bytes(f"{mine}{peers.me}", pack(value))

  def collect() -> list[T]:
    found = [value, *(unpack(wait(f"{mine}{other}")) for other in range(1, peers.count))]
    for other in range(1, peers.count):
      peers.store.key_value_delete(f"{mine}{other}")
    return found
  return _tell(collect, place)


def barrier() -> None:
  """No process goes on before all have come here."""
  everyone(None)


def check_alike(what: Callable[[], T], differ: Callable[[T, T], Sequence[str]],
                problem: str, mend: str, field: str | None = None) -> None:
  """Refuses processes that were not given the same.

  Args:
    what: gives what this process has.
    differ: lines that say in what two of them differ.
    problem, mend, field: see `InputError`.

  Raises:
    InputError: on every process, with a line a difference from process 0.
  """
  if _peers is None:
    return
  first, *others = everyone(what())
  lines = [f"process {number}, and process 0: {line}" for number, other in enumerate(others, 1)
           for line in differ(other, first)]
  if lines:
    raise InputError(problem + ":\n  " + "\n  ".join(lines), field=field, mend=mend)


def check_shared(folder: pathlib.Path, field: str, patience: float = 5.0) -> None:
  """Refuses a folder that not every process sees.

  Args:
    folder: that process 0 may write to.
    field: which named it.
    patience: seconds; file systems of networks take some until they show what others have written.

  Raises:
    InputError: on every process, naming those that do not see it.
  """
  if _peers is None:
    return
  file = folder / f".shared-{agree(lambda: os.urandom(8).hex())}"
  write_atomically(file, "")
  barrier()
  end = time.monotonic() + patience
  while not (sees := file.exists()) and time.monotonic() < end:
    time.sleep(0.2)
  blind = [str(number) for number, seen in enumerate(everyone(sees)) if not seen]
  if is_first():
    file.unlink()
  if blind:
    raise InputError(f"is not shared: process {', '.join(blind)} of {_peers.count} does not see what process 0 writes",
                     file=folder, field=field, mend="give a folder that is mounted on every host")


def write_atomically(path: pathlib.Path, content: str | bytes | Callable[[pathlib.Path], Any]) -> None:
  """Writes a file that appears complete or not at all; its folder is made. On other processes than the first, nothing.

  Args:
    path: of it.
    content: text (as UTF-8), bytes, or a function that writes to the path it is given.
  """
  if not is_first():
    return
  def write(temporary: pathlib.Path) -> None:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)  # type: ignore[arg-type]
  replace_file(path, content if callable(content) else write)


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """A file that appears complete or not at all, as `write` makes it at the path it is given; on this very process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = temporary_of(path)
  try:
    write(temporary)
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def temporary_of(path: pathlib.Path) -> pathlib.Path:
  """Where a file is written before it takes its name, in the same folder: a rename works within one disk only.

  Another each time: processes on two hosts that share the disk may have one number.
  """
  return path.with_name(f".{path.name[:200]}.tmp{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def folder_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into; once the block ends it stands at `path`, which is absent or empty, complete or not at all.

  For process 0 alone.
  """
  assert is_first()
  path = path.absolute()
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  try:
    temporary.mkdir(parents=True)
    yield temporary
    if path.exists():
      path.rmdir()
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def remove(path: pathlib.Path) -> None:
  """Removes a folder and everything in it, if it is there; on other processes than the first, nothing."""
  if is_first():
    shutil.rmtree(path, ignore_errors=True)


def remove_at_once(path: pathlib.Path) -> None:
  """As `remove`, for other commands too, which never see a part of it; nothing where one of them was first."""
  if is_first():
    gone = path.with_name(f"{path.name}.gone{os.getpid()}")
    with contextlib.suppress(OSError):
      os.replace(path, gone)
    remove(gone)


def check_takes_part(devices: Iterable[Any], field: str) -> None:
  """`InputError` unless every process has one of these devices: those without would have nothing to do."""
  left = sorted(set(range(_peers.count if _peers else 1)) - {device.process_index for device in devices})
  if left and _peers is not None:
    raise InputError(f"has no device of process {', '.join(map(str, left))}", field=field,
                     mend="make an axis larger, or start fewer processes")


def fetch(leaf: Any) -> Any:
  """An array as numpy, on every process, wherever its parts lie. All processes must ask."""
  import jax
  import numpy as np
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.asarray(leaf)
  if not leaf.is_fully_replicated:
    leaf = _gather(leaf.sharding)(leaf)
  return np.asarray(leaf.addressable_data(0))


@functools.lru_cache(maxsize=64)
def _gather(sharding: Any) -> Callable[[Any], Any]:
  """array -> the whole of it on every device."""
  import jax
  return jax.jit(lambda leaf: leaf, out_shardings=jax.NamedSharding(sharding.mesh, jax.P()))
