"""The contract of a provider: what it can do, jobs, and answers; two backends keep it."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Status = Literal["waiting", "succeeded", "failed", "cancelled", "limited", "hung"]
OVER = ("succeeded", "failed", "cancelled", "limited", "hung")
UNTOLD = "?"
Turns = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Capabilities:
  """What a provider permits.

  Attributes:
    absolute_rate: a job states a learning rate; else a multiplier of the provider's own.
    logprobs: log-probabilities of given text are told.
    own_weights: a job can begin from weights of one's own.
    checkpoints: models of earlier steps can be asked, not the last alone.
    min_rows: of a training file.
    chat_rows: training rows are conversations, and end where they end.
    moderation: rows may be refused for what they say.
  """

  absolute_rate: bool
  logprobs: bool
  own_weights: bool
  checkpoints: bool
  min_rows: int
  chat_rows: bool = True
  moderation: bool = True


@dataclasses.dataclass(frozen=True)
class JobBudget:
  """What a job is told.

  Attributes:
    epochs, batch_size, seed: of training.
    rate: learning rate, or a multiplier; see `Capabilities`.
  """

  epochs: int
  batch_size: int
  rate: float
  seed: int


@dataclasses.dataclass(frozen=True)
class JobState:
  """How a job stands.

  Attributes:
    id: at the provider.
    status: "waiting" until it is over; "limited": the provider wants more money, or less at a time; "hung": nothing
      was heard of it for too long.
    models: step -> name of the model that can be asked, the last step among them once it has succeeded.
    message: why it is over, where it did not succeed.
    tokens: that it was trained on, as the provider counts them; None: it does not say.
    refused: lines of the training file that moderation refused.
    news: changes whenever the job has got on.
  """

  id: str
  status: Status
  models: Mapping[int, str] = dataclasses.field(default_factory=dict)
  message: str = ""
  tokens: int | None = None
  refused: tuple[int, ...] = ()
  news: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
  """A text whose log-probability is asked for.

  Attributes:
    ids: its tokens by one's own tokenizer.
    start: the first that counts.
    prompt, answer: the same as text, for a provider that takes no tokens.
  """

  ids: tuple[int, ...]
  start: int
  prompt: str
  answer: str


@dataclasses.dataclass(frozen=True)
class Told:
  """What a provider tells of a `Scored`.

  Attributes:
    logprobs: natural, of the tokens that count.
    first: for each of them "1" where it is the model's first choice, "0" where it is not, `UNTOLD` where that is not
      told.
  """

  logprobs: tuple[float, ...]
  first: str


class Refused(Exception):
  """The provider does not do what it was asked; it will not if it is asked again."""


class Limited(Refused):
  """The provider wants more money, or less at a time."""


class Unreachable(Exception):
  """The provider was not heard; it may be later."""


class Adversary(Protocol):
  """A provider. Methods raise `Refused`, `Limited` or `Unreachable`."""

  @property
  def capabilities(self) -> Capabilities:
    """What it permits."""

  def upload(self, path: pathlib.Path) -> str:
    """Sends a training file of conversations; returns its identifier."""

  def create(self, model: str, file: str, budget: JobBudget, name: str) -> str:
    """Begins a job that `find` finds by its name; returns its identifier."""

  def find(self, name: str) -> str | None:
    """The job that was begun under a name; None: there is none."""

  def look(self, job: str) -> JobState:
    """How a job stands."""

  def cancel(self, job: str) -> None:
    """Ends a job, if it is not over."""

  def estimate(self, model: str, file: str, budget: JobBudget) -> float | None:
    """What a job would cost by the provider's own estimate; None: it gives none."""

  def chat(self, model: str, conversations: Sequence[Turns], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """Greedy answers to conversations."""

  def complete(self, model: str, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    """Greedy continuations of texts."""

  def logprobs(self, model: str, texts: Sequence[Scored]) -> list[Told] | None:
    """How likely the tokens of each text are that count; None: it is not told."""
