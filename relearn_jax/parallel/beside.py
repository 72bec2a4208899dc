"""Host work beside the device's: done by one thread, in the order in which it was handed over.

Devices are given nothing to compute here, since several processes have to do that in one order; and what those agree
upon on the way has an order, too. Of several, each does its work at once, where it is handed over.
"""

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import TypeVar

from relearn_jax.parallel.processes import is_alone

T = TypeVar("T")
MOST = 4  # pieces of work that wait or are at work; whoever hands over another waits
Future = concurrent.futures.Future


class Beside:
  """A thread that does what it is given, one after the other; nothing more once something has failed.

  Use as a context manager, as often as wanted: behind the block everything is done. Where the block raises, what has
  not been begun is dropped.
  """

  def __init__(self) -> None:
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "beside")
    self._left: collections.deque[Future] = collections.deque()

  def do(self, work: Callable[[], T]) -> "Future[T]":
    """Does something behind all that was handed over before; raises what of that has failed."""
    if not is_alone():
      done: Future[T] = Future()
      done.set_result(work())
      return done
    while self._left and (len(self._left) >= MOST or self._left[0].done()):
      self._first()
    self._left.append(self._pool.submit(self._behind, self._left[-1] if self._left else None, work))
    return self._left[-1]

  @staticmethod
  def _behind(before: Future | None, work: Callable[[], T]) -> T:
    if before is not None and before.exception() is not None:
      raise concurrent.futures.CancelledError
    return work()

  def _first(self) -> None:
    """Waits for the first that is left."""
    self._left[0].result()  # an interrupt leaves it where it is
    self._left.popleft()

  def wait(self) -> None:
    """Waits until everything is done; raises what has failed."""
    while self._left:
      self._first()

  def __enter__(self) -> "Beside":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      if kind is None:
        self.wait()
    finally:
      while self._left:
        last = self._left.pop()
        if not last.cancel():
          with contextlib.suppress(Exception):  # what ended the block is said
            last.result()
