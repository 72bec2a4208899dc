"""A judge behind an OpenAI-compatible endpoint: a call, and what may go wrong with it, without the key in any of it."""

import dataclasses
import ipaddress
import os
import threading
import urllib.parse
from typing import Any

from relearn_jax.errors import InputError

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"
REPLY_TOKENS = 800  # of a judge's reply at most: some sentences, and the rating
RETRIES = 5  # by the client, with exponential backoff, on 408, 409, 429, 5xx and broken connections
WINDOW = 8  # a part of the key that is longer than this is taken for the key
REFUSED = (401, 403, 404)  # no other answer of ours would fare better


@dataclasses.dataclass(frozen=True)
class Reply:
  """What came of a call.

  Attributes:
    text: the judge's words; "" where there are none.
    problem: why there are none, in words that count as a reason; "" where there are.
    model: which model the endpoint says it was.
    tokens_in, tokens_out: as the endpoint counts them.
  """

  text: str = ""
  problem: str = ""
  model: str = ""
  tokens_in: int = 0
  tokens_out: int = 0


def scrubbed(text: str, key: str) -> str:
  """Text without the key, or any part of it that is `WINDOW` characters long.

  >>> scrubbed("Incorrect API key provided: sk-abcdefghijkl.", "sk-abcdefghijkl")
  'Incorrect API key provided: [key].'
  """
  size = min(WINDOW, len(key))
  if not size:
    return text
  parts = [key[i:i + size] for i in range(len(key) - size + 1)]
  spans = sorted((at, at + size) for part in set(parts) for at in _places(text, part))
  merged: list[tuple[int, int]] = []
  for begin, end in spans:
    merged = [*merged[:-1], (merged[-1][0], end)] if merged and begin <= merged[-1][1] else [*merged, (begin, end)]
  for begin, end in reversed(merged):
    text = text[:begin] + "[key]" + text[end:]
  return text


def _places(text: str, part: str) -> list[int]:
  found, at = [], text.find(part)
  while at >= 0:
    found.append(at)
    at = text.find(part, at + 1)
  return found


def check_url(base_url: str, key: str) -> None:
  """`InputError` unless an endpoint's address is one, holds no secret, and sends the key to nobody else."""
  fail = lambda problem, mend: InputError(problem, field="--base_url", mend=mend)
  try:
    parts = urllib.parse.urlsplit(base_url)
    host, _ = parts.hostname, parts.port
  except ValueError:
    raise fail("is no address", "expected such as http://localhost:8000/v1") from None
  if parts.scheme not in ("http", "https") or not host:
    raise fail("is no address", "expected such as http://localhost:8000/v1")
  if parts.username or parts.password or parts.query or parts.fragment:
    raise fail("holds more than an address", f"give the key by the environment variable {KEY} alone")
  if key and parts.scheme == "http" and not _is_here(host):
    raise fail("would send the key over the network unencrypted", f"give an https address, or unset {KEY}")


def _is_here(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


class Endpoint:
  """Calls of one model at temperature 0 with a seed; safe to use from several threads."""

  def __init__(self, model: str, base_url: str = OPENAI, *, seed: int = 0, timeout: float = 120.0,
               retries: int = RETRIES, flag: str = "--judge"):
    """
    Args:
      model: as the endpoint calls it; one that is pinned to a date, where there is such a name.
      base_url: of the endpoint, with the version.
      seed: sent with each request; endpoints that know no seed ignore it.
      timeout: seconds of a try.
      retries: tries after the first.
      flag: where the model was set, for messages.

    Raises:
      InputError: the client is not installed, the address is none, or there is no key.
    """
    try:
      import openai
    except ImportError:
      raise InputError("needs the openai client", field=flag,
                       mend="pip install 'relearn_jax[judge]'") from None
    self._key = os.environ.get(KEY, "")
    check_url(base_url, self._key)
    if not self._key and base_url == OPENAI:
      raise InputError("is not set, and the endpoint wants a key", field=KEY,
                       mend="set it in the environment, or give another --base_url")
    self.model, self.base_url, self.seed = model, base_url.rstrip("/"), seed
    self._openai, self._flag = openai, flag
    # The placeholder is what a server without keys is sent; the client insists on one.
    self._client = openai.OpenAI(api_key=self._key or "none", base_url=self.base_url, timeout=timeout,
                                 max_retries=retries)
    self._lock, self.calls = threading.Lock(), 0

  def identity(self) -> dict[str, Any]:
    """What decides its replies, for the cache."""
    return {"endpoint": self.base_url, "model": self.model, "seed": self.seed, "temperature": 0,
            "max_tokens": REPLY_TOKENS}

  def ask(self, system: str, user: str) -> Reply:
    """A reply, or why there is none.

    Raises:
      InputError: the endpoint refuses us, or cannot be reached, so that asking on is of no use.
    """
    with self._lock:
      self.calls += 1
    openai = self._openai
    try:
      done = self._client.chat.completions.create(
          model=self.model, messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
          temperature=0, seed=self.seed, max_tokens=REPLY_TOKENS)
    except openai.APIStatusError as error:
      status, said = error.status_code, scrubbed(" ".join(error.message.split()), self._key)[:300]
    except openai.APITimeoutError:
      return Reply(problem="no answer in time")
    except openai.APIConnectionError:
      return Reply(problem="no connection")
    except (openai.OpenAIError, ValueError):  # a body that says it is JSON, and is none
      return Reply(problem="malformed reply")
    else:
      return self._read(done)
    if status in REFUSED:
      raise InputError(f"was refused by {self.base_url} (HTTP {status}: {said})", field=self._flag,
                       mend=f"look at {self._flag}, --base_url and {KEY}")
    return Reply(problem=f"HTTP {status}")

  def _read(self, done: Any) -> Reply:
    try:
      text, model, usage = done.choices[0].message.content, done.model, done.usage
      tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
      if not isinstance(text, str) or not all(type(count) is int and count >= 0 for count in tokens):
        return Reply(problem="malformed reply")
    except (AttributeError, IndexError, TypeError):
      return Reply(problem="malformed reply")
    return Reply(scrubbed(text, self._key), "", scrubbed(str(model), self._key)[:200], *tokens)
