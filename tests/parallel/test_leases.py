"""Leases: one of many has it, whoever dies loses it, and nobody's clock is trusted."""

import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from relearn_jax import interrupts
from relearn_jax.parallel import leases
from relearn_jax.parallel.leases import LeaseLost, Leases, held, is_dead, read_lease

from ..command import ROOT


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
  yield
  interrupts.ask(None)


class Clock:
  """In place of `time`, for the observer."""

  def __init__(self) -> None:
    self.now = 0.0
    self.time, self.sleep = time.time, time.sleep

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  found = Clock()
  monkeypatch.setattr(leases, "time", found)
  return found


def elsewhere(one: Leases) -> Leases:
  """Lets leases look like those of another machine, of which one cannot tell whether a process lives."""
  one.me |= {"machine": "another"}
  return one


def test_of_many_threads_one_has_it(tmp_path: pathlib.Path) -> None:
  everyone, start = [Leases(tmp_path) for _ in range(8)], threading.Barrier(8)
  for number in range(20):
    won: list[int] = []

    def claim(me: int, key: str = f"stage{number}", won: list[int] = won) -> None:
      start.wait()
      if everyone[me].claim(key):
        won.append(me)
    threads = [threading.Thread(target=claim, args=(me,)) for me in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(won) == 1 and everyone[won[0]].has(f"stage{number}")
  for one in everyone:
    one.close()
  assert not list(tmp_path.iterdir())


def test_a_lease_is_released(tmp_path: pathlib.Path) -> None:
  ours, theirs = Leases(tmp_path), Leases(tmp_path)
  with ours.hold("a", "something"):
    assert not theirs.claim("a") and theirs.claim("b")
    about = read_lease(ours.path("a"))
    assert about and about[0]["what"] == "something" and about[0]["pid"] == os.getpid()
    assert [one["key"] for one in held(tmp_path)] == ["a", "b"]
  assert theirs.claim("a")
  ours.release("a")  # which is not ours any more
  assert theirs.has("a") and read_lease(theirs.path("a"))


def test_an_observer_goes_by_its_own_clock(tmp_path: pathlib.Path, clock: Clock) -> None:
  """Whatever the file's times are: they are only looked at for changes."""
  owner, observer = elsewhere(Leases(tmp_path, beat=1e6)), Leases(tmp_path, beat=1e6, expiry=100)
  assert owner.claim("a")
  os.utime(owner.path("a"), (0, 0))  # the owner's clock is at 1970
  assert not observer.claim("a")
  clock.now = 99
  assert not observer.claim("a")
  os.utime(owner.path("a"), (1, 1))  # a sign of life
  clock.now = 150
  assert not observer.claim("a")
  clock.now = 249
  assert not observer.claim("a")
  clock.now = 251
  assert observer.claim("a")
  assert not owner.claim("a")


def test_of_many_observers_one_takes_over(tmp_path: pathlib.Path, clock: Clock) -> None:
  owner = elsewhere(Leases(tmp_path, beat=1e6))
  observers = [elsewhere(Leases(tmp_path, beat=1e6, expiry=100)) for _ in range(6)]
  for number in range(10):
    key = f"stage{number}"
    assert owner.claim(key) and not any(one.claim(key) for one in observers)
    clock.now += 101
    won: list[bool] = []
    threads = [threading.Thread(target=lambda one=one, key=key, won=won: won.append(one.claim(key)))
               for one in observers]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert sum(won) == 1


def test_whoever_dies_while_it_takes_over_is_followed(tmp_path: pathlib.Path, clock: Clock,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
  owner, dying, last = (elsewhere(Leases(tmp_path, beat=1e6, expiry=100)) for _ in range(3))
  assert owner.claim("a") and not dying.claim("a") and not last.claim("a")
  clock.now = 101

  def dies(*_: object) -> None:
    raise KeyboardInterrupt
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, "replace", dies)
    dying.claim("a")
  assert not last.claim("a")  # somebody is about to have it
  clock.now = 202
  assert last.claim("a") and last.has("a")


def test_a_process_of_this_machine_that_is_gone_loses_it_at_once(tmp_path: pathlib.Path) -> None:
  code = ("import os, pathlib, signal, sys\nfrom relearn_jax.parallel.leases import Leases\n"
          "Leases(pathlib.Path(sys.argv[1])).claim('a')\nprint('has it', flush=True)\nsignal.pause()\n")
  child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert child.stdout and child.stdout.readline() == "has it\n"
  ours = Leases(tmp_path)
  assert not ours.claim("a")
  child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and not buried yet
  assert held(tmp_path) == [] and ours.claim("a")
  child.wait()
  child.stdout.close()


def test_another_container_may_have_the_same_numbers() -> None:
  assert is_dead({"machine": leases._machine(), "pid": 2**22 + 1, "started": "1"})
  assert not is_dead({"machine": "another", "pid": 2**22 + 1, "started": "1"})
  assert not is_dead({"machine": leases._machine(), "pid": os.getpid(), "started": leases._started(os.getpid())})


def test_an_owner_notices_that_it_was_given_up(tmp_path: pathlib.Path) -> None:
  """As one does that was suspended for long."""
  owner = elsewhere(Leases(tmp_path, beat=0.01))
  assert owner.claim("a") and owner.claim("b")
  beat = read_lease(owner.path("b"))
  os.utime(owner.path("b"), (0, 0))
  os.replace(tmp_path / "b.lease", tmp_path / "a.lease")  # another's token
  end = time.monotonic() + 10
  while owner.mine and time.monotonic() < end:
    time.sleep(0.01)
  assert not owner.has("a") and isinstance(interrupts.asked(), LeaseLost) and beat
  owner.close()
  assert (tmp_path / "a.lease").exists()  # is not its own to remove


def test_an_owner_gives_signs_of_life(tmp_path: pathlib.Path) -> None:
  owner = Leases(tmp_path, beat=0.01)
  assert owner.claim("a")
  os.utime(owner.path("a"), (0, 0))
  end = time.monotonic() + 10
  while (found := read_lease(owner.path("a"))) and found[1] == 0 and time.monotonic() < end:
    time.sleep(0.01)
  assert found and found[1] > 0
  owner.close()
