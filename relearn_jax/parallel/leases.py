"""Leases on a shared folder: of several commands each does what it has claimed, and takes over what a dead one left.

A lease is a file that appears whole and at once, so that of several that claim one succeeds. Its owner touches it every
`BEAT` seconds. Clocks of hosts differ, so whoever waits goes by its own: a lease that has not changed for `EXPIRY`
seconds, as this observer saw it, has lost its owner; on one machine a process that is gone tells that at once. Of
several observers one takes over, the first to make a file whose name holds the old lease's token.

Nothing here needs a server; the folder has to be a POSIX one (hard links, atomic renames). For process 0 of a command.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from relearn_jax import interrupts

BEAT = 10.0  # seconds between two signs of life
EXPIRY = 120.0  # seconds without one; attributes of files in networks are cached for up to 60
POLL = 2.0  # seconds between two looks at what is claimed by others
SUFFIX = ".lease"


class LeaseLost(BaseException):
  """Another command has taken over what this one was doing, since it gave no sign of life."""


def _machine() -> str:
  """Where a process id means the same process: this boot of this host, in this container."""
  parts = [socket.gethostname()]
  for look in (lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
               lambda: os.readlink("/proc/self/ns/pid")):
    with contextlib.suppress(OSError):
      parts.append(look())
  return " ".join(parts)


def _started(pid: int) -> str | None:
  """When a process of this machine began; None where there is none, or it is dead and not buried."""
  try:
    state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if state in "ZX" else rest[18]


def is_dead(about: dict[str, Any]) -> bool:
  """Whether the owner of a lease was a process of this machine, and is gone; False where that cannot be told."""
  return (about.get("machine") == _machine() and about.get("started") is not None
          and _started(about["pid"]) != about["started"])


def read_lease(path: pathlib.Path) -> tuple[dict[str, Any], int] | None:
  """What a lease says, and when it was last touched, by the file's clock in ns; None where there is none."""
  try:
    with path.open() as file:  # opened: what a network's file system has cached of it is looked up again
      return json.load(file), os.fstat(file.fileno()).st_mtime_ns
  except (FileNotFoundError, json.JSONDecodeError):
    return None


def held(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What the leases of a folder say, but for those whose owner is known to be gone."""
  found = [read_lease(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
  return [one[0] for one in found if one and not is_dead(one[0])]


@dataclasses.dataclass
class _Seen:
  """What an observer last saw of a lease, and since when, on its own clock."""

  state: tuple[str, int, int]
  since: float


class Leases:
  """The leases of one process, and what it has seen of others'."""

  def __init__(self, folder: pathlib.Path, beat: float | None = None, expiry: float | None = None):
    self.folder, self.beat, self.expiry = folder, BEAT if beat is None else beat, EXPIRY if expiry is None else expiry
    pid = os.getpid()
    self.me = {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}
    self.seen: dict[str, _Seen] = {}
    self.mine: dict[str, str] = {}  # key -> token
    self._change, self._over = threading.Lock(), threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    self._thread = threading.Thread(target=self._keep_alive, daemon=True)
    self._thread.start()

  def path(self, key: str) -> pathlib.Path:
    """Of a lease."""
    return self.folder / f"{key}{SUFFIX}"

  def claim(self, key: str, what: str = "") -> bool:
    """Claims something, unless a living process has; returns whether it is ours."""
    path, token = self.path(key), uuid.uuid4().hex
    temporary = self.folder / f".{token}"
    found = read_lease(path)
    if found and not (before := self._expired(key, *found)):
      return False
    about = {"key": key, "what": what, "token": token, "since": time.time(), **self.me}
    temporary.write_text(json.dumps(about) + "\n")
    try:
      if not found:
        won = _link(temporary, path)
      else:
        won = _make(self.folder / before)
        again = read_lease(path) if won else None
        if won and (again is None or again[0]["token"] != found[0]["token"]):
          won = False  # it was released, or taken over, while we looked
        if won:
          os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
    if won:
      with self._change:
        self.mine[key] = token
    return won

  def _expired(self, key: str, about: dict[str, Any], touched: int) -> str:
    """The name of the file that says who takes over an expired lease; empty where it has not expired."""
    token = about["token"]
    tried = len(list(self.folder.glob(f".{token}.*")))  # by those who died, too, before they had it
    state, now = (token, touched, tried), time.monotonic()
    if not tried and is_dead(about):
      return f".{token}.0"
    if key not in self.seen or self.seen[key].state != state:
      self.seen[key] = _Seen(state, now)
    return f".{token}.{tried}" if now - self.seen[key].since > self.expiry else ""

  @contextlib.contextmanager
  def hold(self, key: str, what: str = "") -> Iterator[None]:
    """Claims something as soon as nobody else has it, and releases it behind the block."""
    while not self.claim(key, what):
      time.sleep(POLL)
    try:
      yield
    finally:
      self.release(key)

  def release(self, key: str) -> None:
    """Gives a lease back, if it is still ours."""
    with self._change:
      token = self.mine.pop(key, None)
      with contextlib.suppress(OSError):
        if (found := read_lease(self.path(key))) and found[0]["token"] == token:
          self.path(key).unlink()

  def has(self, key: str) -> bool:
    """Whether a lease is still ours."""
    return key in self.mine

  def close(self) -> None:
    """Gives all leases back."""
    self._over.set()
    self._thread.join()
    for key in list(self.mine):
      self.release(key)

  def _keep_alive(self) -> None:
    last = time.monotonic()
    while not self._over.wait(self.beat):
      try:
        with self._change:
          lost = [key for key, token in self.mine.items() if not _touch(self.path(key), token)]
        last = time.monotonic()
      except OSError:  # the folder cannot be reached; others will think that we are gone
        lost = list(self.mine) if time.monotonic() - last > self.expiry else []
      for key in lost:
        del self.mine[key]
      if lost:
        interrupts.ask(LeaseLost(", ".join(lost)))


def _touch(path: pathlib.Path, token: str) -> bool:
  found = read_lease(path)
  if found is None or found[0]["token"] != token:
    return False
  os.utime(path)
  return True


def _link(temporary: pathlib.Path, path: pathlib.Path) -> bool:
  """Gives a file a second name, unless that is taken."""
  try:
    os.link(temporary, path)
  except FileExistsError:
    return False
  except OSError:
    return temporary.stat().st_nlink == 2  # the answer of a network's server may be lost
  return True


def _make(path: pathlib.Path) -> bool:
  """Makes an empty file, unless it is there."""
  try:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
  except FileExistsError:
    return False
  return True
