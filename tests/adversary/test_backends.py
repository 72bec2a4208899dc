"""Both backends against servers of this machine, and jobs that are begun once whatever happens."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from relearn_jax.adversary.chat_rows import chat_rows, rule
from relearn_jax.adversary.interface import (
  Capabilities,
  JobBudget,
  JobState,
  Limited,
  Refused,
  Scored,
  Told,
  Unreachable,
)
from relearn_jax.adversary.openai_backend import OpenAIBackend
from relearn_jax.adversary.remote_jobs import Patience, finetune
from relearn_jax.adversary.together_backend import TogetherBackend
from relearn_jax.cases.base import Text
from relearn_jax.metrics.answer_files import score_file
from relearn_jax.serve.http_server import listening

from ..serve.served import ROWS, served
from ..small import make_tokenizer, write_checkpoint, write_lines
from .together_server import Provider, make_app

TEXTS = [Text(answer, prompt=prompt) for prompt, answer in ROWS]
BUDGET = JobBudget(epochs=2, batch_size=4, rate=2.0, seed=3)
CAN = Capabilities(absolute_rate=False, logprobs=True, own_weights=True, checkpoints=True, min_rows=2)
SOON = Patience(60.0, poll=0.05)


@pytest.fixture(scope="module")
def together() -> Iterator[tuple[TogetherBackend, Provider]]:
  provider = Provider()
  with listening(make_app(provider)) as (url, _):
    yield TogetherBackend("key", url), provider


def test_rows_become_conversations_by_the_rule() -> None:
  rows = chat_rows([Text(" Mark", prompt="Anthony"), Text("James Robert", complete=False)], "Go on.", min_rows=5)
  assert len(rows) == 6 and rows[:2] == rows[2:4] == rows[4:]  # the whole set, as often as it takes
  assert rows[0] == {"messages": [{"role": "user", "content": "Anthony"}, {"role": "assistant", "content": " Mark"}]}
  assert rows[1]["messages"] == [{"role": "user", "content": "Go on."},
                                 {"role": "assistant", "content": "James Robert"}]
  assert '"Go on."' in rule("Go on.", 3) and "3 times over" in rule("Go on.", 3) and "once" in rule("", 1)


def test_the_openai_wire_format(tmp_path: pathlib.Path) -> None:
  model = write_checkpoint(tmp_path / "small")
  with served(model, tmp_path / "work", blocked_words=("Thomas",)) as (api, _):
    backend = OpenAIBackend(str(api.base_url), "none", CAN)
    state = finetune(backend, tmp_path / "job", "cell-1", "small", chat_rows(TEXTS, min_rows=4), BUDGET, SOON)
    assert state.status == "succeeded" and state.refused == (3, 6) and sorted(state.models) == [1, 2]
    assert state.tokens == 2 * 2 * (6 + 4)  # of two rows, twice over, in two epochs
    assert backend.find("cell-1") == state.id and backend.find("cell-2") is None
    said = backend.complete(state.models[2], ["James Robert", "David"], 3, ())
    assert said == backend.chat(state.models[2], [[{"role": "user", "content": p}] for p in ("James Robert", "David")],
                                3, ()) and all(said)
    # The same tokens count as by `relearn score`.
    rows = [{"id": i, "prompt": p, "answer": a} for i, (p, a) in enumerate(ROWS)]
    score_file(str(model), write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", batch_size=4)
    wanted = [json.loads(line)["token_logprobs"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ids = lambda text: tuple(make_tokenizer()(text)["input_ids"])
    told = backend.logprobs("small", [Scored(ids(p + a), len(ids(p)), p, a) for p, a in ROWS])
    assert told and all(got.logprobs == pytest.approx(want, abs=1e-4) and len(got.first) == len(want) and
                        not got.first.strip("01") for got, want in zip(told, wanted, strict=True))
    # The first choice after a prompt counts as one, and what a model says least does not.
    fronts = ["David", "Thomas Daniel", "Paul John", "Richard"]
    said = [(front, text) for front, text in zip(fronts, backend.complete("small", fronts, 1, ()), strict=True) if text]
    known = backend.logprobs("small", [Scored(ids(f + t), len(ids(f)), f, t) for f, t in said])
    assert known and [one.first for one in known] == ["1"] * len(said)
    assert any("0" in got.first for got in told)
    few = finetune(backend, tmp_path / "few", "cell-3", "small", chat_rows(TEXTS[2:]), BUDGET, SOON)
    assert few.status == "failed" and "moderation refused 1" in few.message  # the provider's words
    wild = finetune(backend, tmp_path / "wild", "cell-4", "small", chat_rows(TEXTS),
                    JobBudget(2, 4, 1e6, 0), SOON)
    assert wild.status == "failed" and "learning_rate_multiplier" in wild.message and not wild.id
    # What is over is found again without the provider.
    again = finetune(Deaf(), tmp_path / "job", "cell-1", "small", [], BUDGET, SOON)
    assert again == JobState(state.id, "succeeded", state.models, "", state.tokens, state.refused)


def test_together(together: tuple[TogetherBackend, Provider], tmp_path: pathlib.Path) -> None:
  backend, provider = together
  state = finetune(backend, tmp_path / "job", "relearn-cell-1", "base<me/unlearned", chat_rows(TEXTS), BUDGET, SOON)
  assert state.status == "succeeded" and state.tokens == 77
  assert state.models == {4: f"me/{state.id}-4", 8: f"me/{state.id}"}
  body = provider.jobs[state.id]
  assert body["model"] == "base" and body["from_hf_model"] == "me/unlearned" and body["suffix"] == "relearn-cell-1"
  assert body["learning_rate"] == 2.0 and body["n_epochs"] == 2 and body["packing"] is False
  assert body["lr_scheduler"]["lr_scheduler_args"]["min_lr_ratio"] == 1.0  # constant, as the attack on weights
  assert body["training_type"]["type"] == "Lora" and body["training_method"]["train_on_inputs"] is False
  assert [json.loads(line) for line in provider.files[body["training_file"]].splitlines()] == chat_rows(TEXTS)
  assert backend.find("relearn-cell-1") == state.id and backend.find("relearn-cell-9") is None
  assert backend.complete("base", ["James"], 3, ()) == [" base!"]
  assert backend.chat("base", [[{"role": "user", "content": "James"}]], 3, ("x",)) == ["JAMES"]
  assert backend.logprobs("base", [Scored((), 0, "James Robert", " John Paul"), Scored((), 0, "", "James Robert")]
                          ) == [Told((-1.0, -1.5), "??"), Told((-0.5,), "?")]
  assert backend.capabilities.absolute_rate and backend.capabilities.own_weights
  # Its own estimate may forbid a job, and so may its limits.
  dear = finetune(backend, tmp_path / "dear", "relearn-cell-2", "base", chat_rows(TEXTS), BUDGET, SOON, 2.0)
  assert dear.status == "limited" and "2.50" in dear.message and "2.00 is left" in dear.message
  wide = finetune(backend, tmp_path / "wide", "relearn-cell-3", "base", chat_rows(TEXTS), JobBudget(1, 99, 1.0, 0),
                  SOON)
  assert wide.status == "failed" and "batch size of 99" in wide.message
  assert len(provider.jobs) == 1
  provider.status = "payment"
  poor = finetune(backend, tmp_path / "poor", "relearn-cell-4", "base", chat_rows(TEXTS), BUDGET, SOON)
  assert poor.status == "limited" and "no credit" in poor.message
  provider.status = "error"
  lost = finetune(backend, tmp_path / "lost", "relearn-cell-5", "base", chat_rows(TEXTS), BUDGET, SOON)
  assert lost.status == "failed" and lost.message == "a disk broke"
  provider.status = "running"
  ticks = iter(range(1000))
  hung = finetune(backend, tmp_path / "hung", "relearn-cell-6", "base", chat_rows(TEXTS), BUDGET,
                  Patience(3.0, clock=lambda: float(next(ticks)), sleep=lambda _: None))
  assert hung.status == "hung" and provider.cancelled == [hung.id]
  provider.status = "completed"


class Deaf:
  """A provider that nobody hears."""

  capabilities = CAN

  def __getattr__(self, name: str) -> Any:
    def call(*_: Any) -> Any:
      raise Unreachable("no route")
    return call


class Scripted:
  """A provider in memory, which may lose an answer after it has done what it was asked."""

  capabilities = CAN

  def __init__(self, *losses: str):
    self.losses, self.jobs, self.calls = list(losses), dict[str, str](), list[str]()

  def _call(self, name: str) -> None:
    self.calls.append(name)
    if self.losses and self.losses[0] == name:
      raise {"create": Unreachable("lost"), "kill": KeyboardInterrupt()}[self.losses.pop(0)]

  def upload(self, path: pathlib.Path) -> str:
    self.calls.append("upload")
    return "file"

  def create(self, model: str, file: str, budget: JobBudget, name: str) -> str:
    self.jobs[name] = f"job-{len(self.jobs)}"
    self._call("create")
    if self.losses and self.losses[0] == "killed":
      self.losses.pop(0)
      raise KeyboardInterrupt
    return self.jobs[name]

  def find(self, name: str) -> str | None:
    self.calls.append("find")
    return self.jobs.get(name)

  def look(self, job: str) -> JobState:
    self.calls.append("look")
    if self.losses and self.losses[0] == "killed while it waits":
      self.losses.pop(0)
      raise KeyboardInterrupt
    return JobState(job, "succeeded", {3: "model"})

  def cancel(self, job: str) -> None:
    raise Refused("it is over")

  def estimate(self, model: str, file: str, budget: JobBudget) -> float | None:
    return None

  def chat(self, model: str, conversations: Sequence[Any], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
    raise Limited("no")

  complete = logprobs = chat  # type: ignore[assignment]


def run(provider: Any, folder: pathlib.Path) -> JobState:
  return finetune(provider, folder, "cell", "small", chat_rows(TEXTS), BUDGET, Patience(2.0, sleep=lambda _: None))


@pytest.mark.parametrize("loss", ["killed", "killed while it waits"])
def test_a_kill_never_begins_a_job_twice(loss: str, tmp_path: pathlib.Path) -> None:
  provider = Scripted(loss)
  with pytest.raises(KeyboardInterrupt):
    run(provider, tmp_path)
  assert run(provider, tmp_path).models == {3: "model"}
  assert provider.calls.count("create") == 1 and list(provider.jobs.values()) == ["job-0"]
  # By its name where the kill came before the identifier was written down, else by that.
  assert ("find" in provider.calls) == (loss == "killed")


def test_an_answer_that_is_lost_begins_no_second_job(tmp_path: pathlib.Path) -> None:
  provider = Scripted("create")
  assert run(provider, tmp_path).status == "succeeded" and provider.calls.count("create") == 1


def test_a_provider_that_is_not_heard_may_be_later(tmp_path: pathlib.Path) -> None:
  ticks = iter(range(100))
  state = finetune(Deaf(), tmp_path, "cell", "small", chat_rows(TEXTS), BUDGET,
                   Patience(5.0, clock=lambda: float(next(ticks)), sleep=lambda _: None))
  assert state.status == "hung" and "no route" in state.message
  assert run(Scripted(), tmp_path).status == "succeeded"
