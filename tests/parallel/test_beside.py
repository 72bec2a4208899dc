"""Work beside the device's: in order, to its end, and nothing behind what has failed."""

import concurrent.futures
import threading

import pytest

from relearn_jax.parallel.beside import MOST, Beside


def test_it_is_done_in_order_and_by_another_thread() -> None:
  done: list[int] = []
  threads: set[int] = set()
  go = threading.Event()
  with Beside() as beside:
    for _ in range(2):  # as often as wanted
      for number in range(MOST):
        last = beside.do(lambda number=number: go.wait() and threads.add(threading.get_ident()) or done.append(number))
      assert not last.done() or go.is_set()
      go.set()
      beside.wait()
      assert last.result() is None
  assert done == 2 * list(range(MOST)) and threads.isdisjoint({threading.get_ident()})


def test_no_more_waits_than_is_told() -> None:
  begun, go = threading.Event(), threading.Event()

  def work() -> None:
    begun.set()
    go.wait()
  with Beside() as beside:
    for _ in range(MOST):
      beside.do(work)
    begun.wait()
    threading.Timer(0.05, go.set).start()
    beside.do(lambda: None)  # waits for the first, which waits for the timer
    assert go.is_set()


def test_what_fails_is_raised_and_nothing_is_done_behind_it() -> None:
  done: list[str] = []

  def fails() -> None:
    raise OSError(28, "No space left on device")
  beside = Beside()
  with pytest.raises(OSError, match="No space left"), beside:
    beside.do(lambda: done.append("before"))
    beside.do(fails)
    later = beside.do(lambda: done.append("behind"))
    with pytest.raises(concurrent.futures.CancelledError):
      later.result()
  assert done == ["before"]
  with beside:  # what has failed is told once
    beside.do(lambda: done.append("after"))
  assert done == ["before", "after"]


def test_where_the_block_raises_what_has_not_begun_is_dropped() -> None:
  done: list[str] = []
  begun, go = threading.Event(), threading.Event()

  def work() -> None:
    begun.set()
    go.wait()
    done.append("begun")
  with pytest.raises(KeyboardInterrupt), Beside() as beside:
    beside.do(work)
    beside.do(lambda: done.append("not begun"))
    begun.wait()
    threading.Timer(0.05, go.set).start()
    raise KeyboardInterrupt
  assert done == ["begun"]
