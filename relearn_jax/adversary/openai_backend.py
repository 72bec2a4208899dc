"""A provider that speaks the wire format of OpenAI's fine-tuning: files, jobs, events, checkpoints, completions."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from relearn_jax.adversary.interface import (
  UNTOLD,
  Capabilities,
  JobBudget,
  JobState,
  Limited,
  Refused,
  Scored,
  Status,
  Told,
  Turns,
  Unreachable,
)

AT_ONCE = 64  # prompts of a request
NAME = "relearn_job"  # of a job's metadata: what it is found by
STATES: dict[str, Status] = {"succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled"}


class OpenAIBackend:
  """The client `openai` behind the contract of `interface.Adversary`."""

  def __init__(self, url: str, key: str, capabilities: Capabilities, timeout: float = 600.0):
    """
    Args:
      url: of the interface, such as http://127.0.0.1:8000/v1.
      key: of it.
      capabilities: the wire format does not tell them.
      timeout: seconds of a request.
    """
    import openai
    self.openai = openai
    self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=4)
    self._capabilities = capabilities

  @property
  def capabilities(self) -> Capabilities:
    """What it permits."""
    return self._capabilities

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    openai = self.openai
    try:
      yield
    except openai.RateLimitError as error:
      raise Limited(_message(error)) from None
    except (openai.APIConnectionError, openai.InternalServerError) as error:
      raise Unreachable(_message(error)) from None
    except openai.APIStatusError as error:
      raise (Limited if error.status_code == 402 else Refused)(_message(error)) from None

  def upload(self, path: pathlib.Path) -> str:
    """See `interface.Adversary`."""
    with self._told(), path.open("rb") as content:
      return str(self.client.files.create(file=content, purpose="fine-tune").id)

  def create(self, model: str, file: str, budget: JobBudget, name: str) -> str:
    """See `interface.Adversary`; the same name begins one job where the provider knows idempotency keys."""
    stated = "learning_rate" if self._capabilities.absolute_rate else "learning_rate_multiplier"
    hyper = {"n_epochs": budget.epochs, "batch_size": budget.batch_size, stated: budget.rate}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    with self._told():
      return str(self.client.fine_tuning.jobs.create(
          model=model, training_file=file, method=method, seed=budget.seed, metadata={NAME: name},
          extra_headers={"Idempotency-Key": name}).id)

  def find(self, name: str) -> str | None:
    """See `interface.Adversary`."""
    with self._told():
      return next((job.id for job in self.client.fine_tuning.jobs.list(limit=100)
                   if (job.metadata or {}).get(NAME) == name), None)

  def look(self, job: str) -> JobState:
    """See `interface.Adversary`."""
    with self._told():
      found = self.client.fine_tuning.jobs.retrieve(job)
      status = STATES.get(found.status, "waiting")
      events = list(self.client.fine_tuning.jobs.list_events(job, limit=100).data)
      models = {}
      if status == "succeeded":
        if self._capabilities.checkpoints:
          models = {one.step_number: one.fine_tuned_model_checkpoint
                    for one in self.client.fine_tuning.jobs.checkpoints.list(job, limit=100)}
        if found.fine_tuned_model and not models:
          models = {-1: found.fine_tuned_model}
      message = found.error.message if found.error and found.error.message else ""
    lines = [line for event in events if isinstance(event.data, dict)
             for line in event.data.get("refused_lines", [])]  # type: ignore[attr-defined]
    news = f"{found.status} {events[0].id if events else ''}"
    return JobState(job, status, models, message, found.trained_tokens, tuple(sorted(set(lines))), news)

  def cancel(self, job: str) -> None:
    """See `interface.Adversary`."""
    with self._told():
      self.client.fine_tuning.jobs.cancel(job)

  def estimate(self, model: str, file: str, budget: JobBudget) -> float | None:
    """The wire format has none."""
    return None

  def chat(self, model: str, conversations: Sequence[Turns], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """See `interface.Adversary`."""
    found = []
    for turns in conversations:
      messages: Any = [dict(turn) for turn in turns]
      with self._told():
        answer = self.client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_new_tokens, stop=list(stop) or None)
      found.append(answer.choices[0].message.content or "")
    return found

  def complete(self, model: str, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """See `interface.Adversary`."""
    found: list[str] = []
    for start in range(0, len(prompts), AT_ONCE):
      with self._told():
        answer = self.client.completions.create(
            model=model, prompt=list(prompts[start:start + AT_ONCE]), temperature=0, max_tokens=max_new_tokens,
            stop=list(stop) or None)
      found += [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    return found

  def logprobs(self, model: str, texts: Sequence[Scored]) -> list[Told] | None:
    """See `interface.Adversary`; tokens are sent, so that it is the same ones that count."""
    if not self._capabilities.logprobs:
      return None
    found: list[Told] = []
    for start in range(0, len(texts), AT_ONCE):
      part = texts[start:start + AT_ONCE]
      with self._told():
        answer = self.client.completions.create(
            model=model, prompt=[list(one.ids) for one in part], temperature=0, max_tokens=0, echo=True, logprobs=1)
      for one, choice in zip(part, sorted(answer.choices, key=lambda choice: choice.index), strict=True):
        told: Any = choice.logprobs
        if told is None or len(told.token_logprobs or []) != len(one.ids):
          raise Refused(f"does not tell log-probabilities of {len(one.ids)} tokens")
        top = told.top_logprobs or [None] * len(one.ids)
        first = (UNTOLD if not best else str(int(max(best, key=best.get) == token))
                 for token, best in zip(told.tokens[one.start:], top[one.start:], strict=True))
        found.append(Told(tuple(map(float, told.token_logprobs[one.start:])), "".join(first)))
    return found


def _message(error: Any) -> str:
  body = getattr(error, "body", None)
  said = body.get("message") if isinstance(body, dict) else None
  return str(said or error)[:500]
