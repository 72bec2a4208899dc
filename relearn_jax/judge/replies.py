"""Replies to many questions at once: what is cached, what it may cost, and who asks when."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.judge.endpoint import REPLY_TOKENS, Endpoint, Reply
from relearn_jax.progress import progress

BYTES_PER_TOKEN = 3  # of English text rather 4; an estimate should not be too low
OVER = "over the limit of cost"


@dataclasses.dataclass(frozen=True)
class Limits:
  """What judging may take.

  Attributes:
    concurrency: requests at a time.
    max_requests: that are not answered from the cache; tries after the first do not count.
    prices: of a million tokens, in and out, in any currency; (): unknown.
    max_cost: in the same currency; 0: no limit.
  """

  concurrency: int = 8
  max_requests: int = 2000
  prices: tuple[float, ...] = ()
  max_cost: float = 0.0

  def check(self) -> None:
    """`InputError` for limits that limit nothing."""
    for value, least, flag in ((self.concurrency, 1, "concurrency"), (self.max_requests, 0, "max_requests")):
      if value < least:
        raise InputError(f"is {value}", field=f"--{flag}", mend=f"expected at least {least}")
    if self.prices and (len(self.prices) != 2 or not all(0 <= price < float("inf") for price in self.prices)):
      raise InputError(f"is {self.prices}", field="--prices",
                       mend="expected two numbers, of a million tokens in and out, such as 2.5,10")
    if not 0 <= self.max_cost < float("inf") or (self.max_cost and not self.prices):
      raise InputError(f"is {self.max_cost}", field="--max_cost", mend="expected a positive number, and --prices")

  def cost(self, tokens_in: float, tokens_out: float) -> float:
    """Of some tokens; 0 where prices are unknown."""
    return sum(price * count for price, count in zip(self.prices, (tokens_in, tokens_out), strict=False)) / 1e6


def prices_of(given: Sequence[str]) -> tuple[float, ...]:
  """Prices as they stand on a command line.

  Raises:
    InputError: they are no numbers.
  """
  try:
    return tuple(map(float, given))
  except ValueError:
    raise InputError(f"is {','.join(given)!r}", field="--prices", mend="expected two numbers, such as 2.5,10") from None


def tokens_in(asked: tuple[str, str]) -> int:
  """About how many tokens a question to the judge has."""
  return 20 + -(-sum(len(part.encode()) for part in asked) // BYTES_PER_TOKEN)


def statement(asked: Sequence[tuple[str, str]], cached: int, limits: Limits) -> str:
  """What will be asked, and what it costs at most, about.

  Raises:
    InputError: it is more than a limit.
  """
  count, put = len(asked), sum(map(tokens_in, asked))
  cost = limits.cost(put, count * REPLY_TOKENS)
  said = (f"{count} requests ({cached} more are answered from the cache), about {put} tokens in and at most "
          f"{count * REPLY_TOKENS} out" + (f", which cost about {cost:.2f} at most" if limits.prices else ""))
  if count > limits.max_requests:
    raise InputError(f"is {limits.max_requests}, and this needs {said}", field="--max_requests",
                     mend="raise it, or judge fewer answers")
  if limits.max_cost and cost > limits.max_cost:
    raise InputError(f"is {limits.max_cost:g}, and this needs {said}", field="--max_cost",
                     mend="raise it, or judge fewer answers")
  return said


def endpoint_replies(endpoint: Endpoint, asked: Sequence[tuple[str, str]], limits: Limits
                     ) -> Iterator[tuple[int, Reply]]:
  """Replies as they come, with their places; the first question goes alone, so that what fails always fails once.

  Raises:
    InputError: the endpoint refuses us, or cannot be reached.
  """
  spent, numbers = 0.0, iter(range(len(asked)))
  running: dict[Future[Reply], int] = {}
  if not asked:
    return
  first = endpoint.ask(*asked[next(numbers)])
  if first.problem == "no connection":
    raise InputError(f"cannot be reached ({endpoint.base_url})", field="--base_url", mend="look whether it is running")
  yield 0, first
  spent += limits.cost(first.tokens_in, first.tokens_out)
  pool = ThreadPoolExecutor(limits.concurrency)
  left = next(numbers, None)
  try:
    while running or left is not None:
      while left is not None and len(running) < limits.concurrency:
        # What is under way may cost as much as it can.
        under_way = [*(asked[number] for number in running.values()), asked[left]]
        worst = limits.cost(sum(map(tokens_in, under_way)), len(under_way) * REPLY_TOKENS)
        if limits.max_cost and spent + worst > limits.max_cost:
          if running:
            break
          yield left, Reply(problem=OVER)
        else:
          running[pool.submit(endpoint.ask, *asked[left])] = left
        left = next(numbers, None)
      done = wait(running, return_when=FIRST_COMPLETED).done
      for future in done:
        number, reply = running.pop(future), future.result()
        spent += limits.cost(reply.tokens_in, reply.tokens_out)
        yield number, reply
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def cache_key(identity: Mapping[str, Any], asked: tuple[str, str]) -> str:
  """By what a reply is found again: the judge, and every word that it is told."""
  return hashlib.sha256(json.dumps([identity, asked], sort_keys=True).encode()).hexdigest()


def open_cache(folder: pathlib.Path) -> Any:
  """Replies by `cache_key`, as JSON; the folder is made.

  Raises:
    InputError: diskcache is not installed.
  """
  try:
    import diskcache
  except ImportError:
    raise InputError("needs diskcache", field="--judge", mend="pip install 'relearn_jax[judge]'") from None
  return diskcache.Cache(str(folder), disk=diskcache.JSONDisk)


def all_replies(judge: Any, asked: Sequence[tuple[str, str]], places: Sequence[int], limits: Limits,
                doing: str = "judge", unit: str = "answer") -> Iterator[tuple[int, Reply]]:
  """The replies to the questions at some places, with a bar; `judge` is an `Endpoint` or a `LocalJudge`."""
  some = [asked[place] for place in places]
  found = endpoint_replies(judge, some, limits) if isinstance(judge, Endpoint) else judge.replies(some)
  with progress(len(some), doing, unit) as bar:
    for number, reply in found:
      bar.update(1)
      yield places[number], reply
