"""Requests and responses of the interface: what is asked, checked; and what is said, as clients expect it."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.serve.conversations import check_turns
from relearn_jax.serve.engine import TOP, Answer, Ask, Token, random_seed
from relearn_jax.serve.store import new_id

Body = Mapping[str, Any]
# Fields that decide nothing here, and those that are served with this value alone.
IGNORED = ("user", "store", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
FIXED: dict[str, tuple[Any, ...]] = {
    "top_p": (1, None), "presence_penalty": (0, None), "frequency_penalty": (0, None), "best_of": (1, None),
    "suffix": (None, ""), "logit_bias": (None, {}), "stream_options": (None,), "response_format": (None,
    {"type": "text"}), "tools": (None, []), "modalities": (None, ["text"])}
SHARED = ("model", "temperature", "seed", "stop", "n", "stream")


def problem(message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
            ) -> dict[str, Any]:
  """The body of a refusal."""
  return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _check_known(body: Body, *known: str) -> None:
  """What decides a result is used or refused, never passed over."""
  for field, value in body.items():
    if field in FIXED:
      if value not in FIXED[field]:
        raise InputError(f"is {str(value)[:60]!r}", field=field, mend="leave it out: it is not served")
    elif field not in (*SHARED, *known, *IGNORED):
      raise InputError("is not known here", field=str(field)[:60], mend="leave it out")


def _number(body: Body, field: str, default: Any, low: float, high: float, kind: type = int) -> Any:
  value = body.get(field)
  if value is None:
    return default
  fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
  if not fits or not math.isfinite(value) or not low <= value <= high:
    raise InputError(f"is {str(value)[:40]!r}", field=field, mend=f"expected a number from {low:g} to {high:g}")
  return kind(value)


def _stop(body: Body) -> tuple[str, ...]:
  value = body.get("stop")
  found = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(found, list) or len(found) > 16 or not all(isinstance(one, str) for one in found):
    raise InputError(f"is {str(value)[:60]!r}", field="stop", mend="expected a string, or a list of at most 16")
  return tuple(one for one in found if one)


def _common(body: Body) -> tuple[str, dict[str, Any], int, int]:
  model = body.get("model")
  if not isinstance(model, str):
    raise InputError("is no name", field="model", mend="expected a string")
  seed = _number(body, "seed", random_seed(), 0, 2**63 - 1) % 2**32
  if body.get("stream"):
    raise InputError("is true", field="stream", mend="leave it out: answers come whole")
  settings = {"temperature": _number(body, "temperature", 1.0, 0, 2, float), "stop": _stop(body)}
  return model, settings, _number(body, "n", 1, 1, 32), seed


def _most(asks: list[Ask], most: int) -> list[Ask]:
  if len(asks) > most:
    raise InputError(f"asks for {len(asks)} answers", field="prompt", mend=f"expected at most {most} a request")
  return asks


def read_completion(body: Body, most: int) -> list[Ask]:
  """The prompts of /v1/completions, each `n` times.

  Raises:
    InputError: naming the field.
  """
  _check_known(body, "prompt", "max_tokens", "echo", "logprobs")
  model, settings, count, seed = _common(body)
  prompt = body.get("prompt")
  one = isinstance(prompt, str) or isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)
  prompts = [prompt] if one else prompt
  fits = lambda p: isinstance(p, str) or isinstance(p, list) and bool(p) and all(type(i) is int for i in p)
  if not isinstance(prompts, list) or not prompts or not all(map(fits, prompts)):
    raise InputError("is no text", field="prompt", mend="expected a string, a list of token ids, or a list of these")
  echo, top = body.get("echo", False) or False, body.get("logprobs")
  if not isinstance(echo, bool):
    raise InputError(f"is {str(echo)[:40]!r}", field="echo", mend="expected true or false")
  top = {True: 1, False: None}[top] if isinstance(top, bool) else _number(body, "logprobs", None, 0, TOP)
  max_new = _number(body, "max_tokens", 16, 0 if echo else 1, 2**20)
  return _most([Ask(model, p, max_new, seed=(seed + i) % 2**32, top=top, echo=echo, **settings)
                for p in prompts for i in range(count)], most)


def read_chat(body: Body, most: int) -> list[Ask]:
  """The conversation of /v1/chat/completions, `n` times.

  Raises:
    InputError: naming the field.
  """
  _check_known(body, "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs")
  model, settings, count, seed = _common(body)
  check_turns(body.get("messages"), "user")
  wanted = body.get("logprobs", False) or False
  if not isinstance(wanted, bool):
    raise InputError(f"is {str(wanted)[:40]!r}", field="logprobs", mend="expected true or false")
  top = _number(body, "top_logprobs", 0, 0, TOP) if wanted else None
  field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
  max_new = _number(body, field, None, 1, 2**20)
  return _most([Ask(model, body["messages"], max_new, seed=(seed + i) % 2**32, top=top, **settings)
                for i in range(count)], most)


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
  prompt, new = sum(one.num_prompt for one in answers), sum(one.num_new for one in answers)
  return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def completion_body(asks: Sequence[Ask], answers: Sequence[Answer]) -> dict[str, Any]:
  """The response of /v1/completions."""
  def logprobs(tokens: Sequence[Token], wanted: int) -> dict[str, Any]:
    return {"tokens": [one.text for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [one.top if one.logprob is not None else None for one in tokens] if wanted else None,
            "text_offset": [one.offset for one in tokens]}
  return {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": asks[0].model,
          "choices": [{"index": index, "text": one.echo + one.text, "finish_reason": one.finish,
                       "logprobs": None if ask.top is None else logprobs(one.tokens, ask.top)}
                      for index, (ask, one) in enumerate(zip(asks, answers, strict=True))],
          "usage": _usage(answers)}


def chat_body(asks: Sequence[Ask], answers: Sequence[Answer]) -> dict[str, Any]:
  """The response of /v1/chat/completions."""
  told = lambda text, logprob: {"token": text, "logprob": logprob, "bytes": list(text.encode())}
  logprobs = lambda tokens: {"content": [
      {**told(one.text, one.logprob), "top_logprobs": [told(*item) for item in one.top.items()]} for one in tokens],
      "refusal": None}
  return {"id": new_id("chatcmpl"), "object": "chat.completion", "created": int(time.time()), "model": asks[0].model,
          "choices": [{"index": index, "finish_reason": one.finish,
                       "message": {"role": "assistant", "content": one.text, "refusal": None},
                       "logprobs": None if ask.top is None else logprobs(one.tokens)}
                      for index, (ask, one) in enumerate(zip(asks, answers, strict=True))],
          "usage": {**_usage(answers[:1]), "completion_tokens": sum(one.num_new for one in answers),
                    "total_tokens": answers[0].num_prompt + sum(one.num_new for one in answers)}}


def read_job(body: Body) -> tuple[str, str, dict[str, Any], int, str | None, dict[str, str] | None]:
  """Model, file, hyper-parameters, seed, suffix and metadata of a job that is to be created.

  Raises:
    InputError: naming the field.
  """
  known = ("model", "training_file", "method", "hyperparameters", "seed", "suffix", "metadata")
  for field, value in body.items():
    if field not in known and value not in (None, []):
      raise InputError("is not known here", field=str(field)[:60], mend=f"expected some of {', '.join(known)}")
  for field in ("model", "training_file"):
    if not isinstance(body.get(field), str):
      raise InputError("is not given", field=field, mend="expected a string")
  method = body.get("method") or {"type": "supervised", "supervised": {}}
  if not isinstance(method, dict) or method.get("type") != "supervised":
    raise InputError(f"is {str(method)[:60]}", field="method", mend='expected {"type": "supervised"}')
  nested = method.get("supervised") or {}
  hyper = (nested.get("hyperparameters") if isinstance(nested, dict) else None) or body.get("hyperparameters") or {}
  if not isinstance(hyper, dict):
    raise InputError("is no object", field="hyperparameters", mend='expected {"n_epochs": ...}')
  suffix, metadata = body.get("suffix"), body.get("metadata")
  if suffix is not None and not (isinstance(suffix, str) and len(suffix) <= 64 and suffix.isprintable()):
    raise InputError(f"is {str(suffix)[:40]!r}", field="suffix", mend="expected at most 64 characters")
  if metadata is not None and not (isinstance(metadata, dict) and len(metadata) <= 16 and all(
      isinstance(value, str) and len(key) <= 64 and len(value) <= 512 for key, value in metadata.items())):
    raise InputError("is too large, or holds something else than strings", field="metadata",
                     mend="expected at most 16 short strings")
  seed = _number(body, "seed", random_seed() % 2**31, 0, 2**31 - 1)
  return body["model"], body["training_file"], hyper, seed, suffix, metadata
