"""Together: jobs with a learning rate of their own, from weights that the attacker has put on the Hugging Face hub."""

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

STATES: dict[str, Status] = {"completed": "succeeded", "error": "failed", "user_error": "failed",
                             "cancelled": "cancelled"}
SUFFIX = 40  # characters of a job's name at most


class TogetherBackend:
  """The client `together` behind the contract of `interface.Adversary`.

  A model is "BASE" or "BASE<HUB_ID": weights of one's own (a repository on the hub) of the form of a base that
  Together serves.
  """

  def __init__(self, key: str, url: str | None = None, *, lora: bool = True, rank: int = 16, alpha: int = 32,
               checkpoints: int = 10, logprobs: bool = True, timeout: float = 600.0):
    """
    Args:
      key: of the account.
      url: of the interface; Together's own by default.
      lora: train an adapter, of this rank and alpha; else all parameters.
      rank: of the adapter.
      alpha: of the adapter.
      checkpoints: of a job at most, evenly spread over it.
      logprobs: whether log-probabilities are asked for; not all models have them.
      timeout: seconds of a request.
    """
    import together
    self.together = together
    self.client = together.Together(api_key=key, base_url=url, timeout=timeout, max_retries=4)
    self.lora, self.rank, self.alpha, self.checkpoints = lora, rank, alpha, checkpoints
    self._logprobs = logprobs

  @property
  def capabilities(self) -> Capabilities:
    """What it permits."""
    return Capabilities(absolute_rate=True, logprobs=self._logprobs, own_weights=True,
                        checkpoints=self.checkpoints > 1, min_rows=1)

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    together = self.together
    try:
      yield
    except together.RateLimitError as error:
      raise Limited(_message(error)) from None
    except (together.APIConnectionError, together.InternalServerError) as error:
      raise Unreachable(_message(error)) from None
    except together.APIStatusError as error:
      raise (Limited if error.status_code == 402 else Refused)(_message(error)) from None
    except ValueError as error:  # the client's own checks of limits and files
      raise Refused(str(error)[:500]) from None

  def upload(self, path: pathlib.Path) -> str:
    """See `interface.Adversary`."""
    with self._told():
      return str(self.client.files.upload(path, purpose="fine-tune", check=True).id)

  def create(self, model: str, file: str, budget: JobBudget, name: str) -> str:
    """See `interface.Adversary`; the rate is constant, rows are not packed, and the last turn alone counts."""
    base, _, own = model.partition("<")
    more: dict[str, Any] = {"from_hf_model": own} if own else {}
    if self.lora:
      more |= {"lora_r": self.rank, "lora_alpha": self.alpha}
    with self._told():
      return str(self.client.fine_tuning.create(
          training_file=file, model=base, n_epochs=budget.epochs, batch_size=budget.batch_size,
          learning_rate=budget.rate, lr_scheduler_type="linear", min_lr_ratio=1.0, warmup_ratio=0.0, packing=False,
          n_checkpoints=min(self.checkpoints, budget.epochs), lora=self.lora, suffix=name[:SUFFIX],
          random_seed=budget.seed, train_on_inputs=False, **more).id)

  def find(self, name: str) -> str | None:
    """See `interface.Adversary`."""
    with self._told():
      return next((job.id for job in self.client.fine_tuning.list().data or []
                   if job.suffix == name[:SUFFIX]), None)

  def look(self, job: str) -> JobState:
    """See `interface.Adversary`."""
    with self._told():
      found = self.client.fine_tuning.retrieve(job)
      status = STATES.get(str(found.status), "waiting")
      events = self.client.fine_tuning.list_events(job).data or []
      models: dict[int, str] = {}
      if status == "succeeded":
        last = found.x_model_output_name or ""
        if self.capabilities.checkpoints:
          models = {one.step: one.object_name or last for one in self.client.fine_tuning.list_checkpoints(job).data}
        if last:
          models = {**models, max(models, default=-1): last}
    said = [event.message for event in events if event.level in ("error", "legacy_ierror") or
            event.type in ("job_error", "billing_limit")]
    if any(event.type == "billing_limit" for event in events) and status == "failed":
      status = "limited"
    return JobState(job, status, models, said[-1] if said else "", found.token_count, (),
                    f"{found.status} {len(events)}")

  def cancel(self, job: str) -> None:
    """See `interface.Adversary`."""
    with self._told():
      self.client.fine_tuning.cancel(job)

  def estimate(self, model: str, file: str, budget: JobBudget) -> float | None:
    """See `interface.Adversary`."""
    kind: Any = {"type": "Lora", "lora_r": self.rank, "lora_alpha": self.alpha} if self.lora else {"type": "Full"}
    with self._told():
      found: Any = self.client.fine_tuning.estimate_price(
          training_file=file, model=model.partition("<")[0], n_epochs=budget.epochs, training_type=kind)
    return float(found.estimated_total_price) if found.estimation_available else None

  def chat(self, model: str, conversations: Sequence[Turns], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """See `interface.Adversary`."""
    found = []
    for turns in conversations:
      messages: Any = [dict(turn) for turn in turns]
      with self._told():
        answer = self.client.chat.completions.create(model=model, messages=messages, temperature=0,
                                                     max_tokens=max_new_tokens, stop=list(stop))
      message = answer.choices[0].message
      found.append(_text(message.content if message else None))
    return found

  def complete(self, model: str, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """See `interface.Adversary`."""
    found = []
    for prompt in prompts:
      with self._told():
        answer = self.client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=max_new_tokens,
                                                stop=list(stop))
      found.append(_text(answer.choices[0].text))
    return found

  def logprobs(self, model: str, texts: Sequence[Scored]) -> list[Told] | None:
    """See `interface.Adversary`.

    Text is sent, with the prompt alone beside it: what counts are the tokens from the first on in which the two differ,
    which is how `relearn score` tells the answer's.
    """
    if not self._logprobs:
      return None
    found, fronts = list[Told](), dict[str, list[str]]()
    for one in texts:
      if one.prompt not in fronts:
        fronts[one.prompt] = self._echo(model, one.prompt)[0] if one.prompt else []
      tokens, values = self._echo(model, one.prompt + one.answer)
      same = (a == b for a, b in zip(fronts[one.prompt], tokens, strict=False))
      start = next((i for i, equal in enumerate(same) if not equal), min(len(fronts[one.prompt]), len(tokens)))
      counted = [value for value in values[start:] if value is not None]
      if not counted:
        raise Refused("told no log-probability of an answer")
      found.append(Told(tuple(counted), UNTOLD * len(counted)))
    return found

  def _echo(self, model: str, text: str) -> tuple[list[str], list[float | None]]:
    with self._told():
      answer: Any = self.client.completions.create(model=model, prompt=text, temperature=0, max_tokens=1, echo=True,
                                                   logprobs=1)
    told = answer.prompt[0].logprobs if answer.prompt else None
    if told is None or told.tokens is None or told.token_logprobs is None:
      raise Refused("tells no log-probabilities of a prompt")
    return list(told.tokens), list(told.token_logprobs)


def _text(content: Any) -> str:
  return content if isinstance(content, str) else ""


def _message(error: Any) -> str:
  body = getattr(error, "body", None)
  nested = body.get("error", body) if isinstance(body, dict) else None
  said = nested.get("message") if isinstance(nested, dict) else None
  return str(said or error)[:500]
