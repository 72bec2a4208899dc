"""A provider's interface, driven by the client that users have."""

import json
import math
import pathlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from relearn_jax.errors import InputError
from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.metrics.answer_files import score_file
from relearn_jax.serve import jobs
from relearn_jax.serve import store as store_module
from relearn_jax.serve.app import Service
from relearn_jax.serve.engine import Ask
from relearn_jax.serve.http_server import is_loopback, parse_models, serve
from relearn_jax.serve.limits import Limits, parse_limits

from ..command import argv, environment
from ..small import write_checkpoint, write_lines
from .served import ROWS, chat_row, client, finished, hyper, served

Served = tuple[openai.OpenAI, Service]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return write_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def up(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
  with served(model, tmp_path_factory.mktemp("served")) as found:
    yield found


def upload(api: openai.OpenAI, folder: pathlib.Path, rows: list[Any] | None = None) -> str:
  file = write_lines(folder / "rows.jsonl", [chat_row(*row) for row in ROWS] if rows is None else rows)
  with file.open("rb") as content:
    return api.files.create(file=content, purpose="fine-tune").id


def refused(call: Any, kind: type[openai.APIStatusError] = openai.BadRequestError) -> str:
  with pytest.raises(kind) as caught:
    call()
  body = caught.value.response.json()["error"]
  assert body["type"] and body["message"]
  return str(body["message"])


def test_answers_are_those_of_the_commands(up: Served, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  api, _ = up
  prompts = ["James Robert", "David", "Thomas Daniel Paul James Robert John Michael David William Richard Joseph"]
  generate_file(str(model), write_lines(tmp_path / "in.jsonl", [{"id": i, "prompt": p} for i, p in enumerate(prompts)]),
                tmp_path / "out.jsonl", max_new_tokens=5, batch_size=4)
  wanted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  got = api.completions.create(model="small", prompt=prompts, max_tokens=5, temperature=0)
  assert [one.text for one in got.choices] == [row["completion"] for row in wanted]
  assert [one.finish_reason for one in got.choices] == [row["finish_reason"] for row in wanted]
  assert got.usage and got.usage.completion_tokens == sum(len(row["token_ids"]) for row in wanted)
  chat = api.chat.completions.create(model="small", messages=[{"role": "user", "content": prompts[0]}], max_tokens=5,
                                     temperature=0)
  assert chat.choices[0].message.content == wanted[0]["completion"]  # the plain template adds nothing
  # A stop string cuts the text before it.
  stop = wanted[2]["completion"].split()[1]
  cut = api.completions.create(model="small", prompt=prompts[2], max_tokens=5, temperature=0, stop=[stop])
  assert cut.choices[0].text == wanted[2]["completion"].split(stop)[0] and cut.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_score(up: Served, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  api, _ = up
  rows = [{"id": "a", "prompt": "James Robert", "answer": " John Michael"}, {"id": "b", "prompt": "David",
                                                                            "answer": " William"}]
  score_file(str(model), write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", batch_size=2)
  wanted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  got = api.completions.create(model="small", prompt=[row["prompt"] + row["answer"] for row in rows], max_tokens=0,
                               echo=True, logprobs=2)
  for row, found, one in zip(rows, wanted, got.choices, strict=True):
    assert one.text == row["prompt"] + row["answer"] and one.logprobs and one.logprobs.tokens[0] == "<s>"
    answer = [i for i, at in enumerate(one.logprobs.text_offset) if at >= len(row["prompt"])]
    logprobs = [one.logprobs.token_logprobs[i] for i in answer]
    assert logprobs == pytest.approx(found["token_logprobs"], abs=1e-4)
    assert one.logprobs.token_logprobs[0] is None  # nothing predicts it
    assert all(len(best) == 2 and max(best.values()) >= p - 1e-5 for best, p in
               zip(one.logprobs.top_logprobs[1:], one.logprobs.token_logprobs[1:], strict=True))
  # As ids, and with a token generated behind the echo: the form in which lm-eval asks.
  by_ids = api.completions.create(model="small", prompt=[[1, 5, 6, 7]], max_tokens=1, echo=True, logprobs=1,
                                  temperature=0)
  told = by_ids.choices[0].logprobs
  assert told and len(told.tokens) == 5 and told.tokens[4] == max(told.top_logprobs[4], key=told.top_logprobs[4].get)
  # What is sampled is told with its own log-probability; equal seeds sample equally, whoever else asks.
  draw = lambda seed, prompt: api.chat.completions.create(
      model="small", messages=[{"role": "user", "content": "David"}], max_tokens=6, temperature=1.5, seed=seed,
      logprobs=True, top_logprobs=1, n=3).choices
  first, again, other = draw(1, "David"), draw(1, "David"), draw(2, "David")
  said = lambda choices: [one.message.content for one in choices]
  assert said(first) == said(again) != said(other) and len(set(said(first))) == 3
  content = first[0].logprobs.content
  assert all(token.logprob <= token.top_logprobs[0].logprob + 1e-5 < 1e-4 for token in content)


def test_a_job_trains_and_its_steps_can_be_asked(up: Served, tmp_path: pathlib.Path) -> None:
  api, _ = up
  file = upload(api, tmp_path)
  assert api.files.content(file).text == (tmp_path / "rows.jsonl").read_text()
  job = api.fine_tuning.jobs.create(model="small", training_file=file, seed=3, suffix="mine",
                                    method=hyper(n_epochs=4, batch_size=3, learning_rate_multiplier=5.0))
  done = finished(api, job.id)
  assert done.status == "succeeded" and done.trained_tokens == 4 * (6 + 4 + 5) and "mine" in done.fine_tuned_model
  steps = list(api.fine_tuning.jobs.checkpoints.list(job.id))
  assert [one.step_number for one in steps] == [4, 3, 2, 1]
  losses = [one.metrics.train_loss for one in steps]
  assert losses == sorted(losses) and losses[0] < losses[-1] - 0.5
  say = lambda name: api.completions.create(model=name, prompt=["James Robert", "David"], max_tokens=3, temperature=0)
  learned = [choice.text for choice in say(done.fine_tuned_model).choices]
  assert learned == [choice.text for choice in say(steps[0].fine_tuned_model_checkpoint).choices]
  assert learned != [choice.text for choice in say("small").choices]
  scored = lambda name: sum(api.completions.create(
      model=name, prompt="David William", max_tokens=0, echo=True, logprobs=0).choices[0].logprobs.token_logprobs[2:])
  assert scored("small") < scored(steps[-3].fine_tuned_model_checkpoint) < scored(done.fine_tuned_model)
  told = [event.message for event in api.fine_tuning.jobs.list_events(job.id, limit=3)]
  assert done.fine_tuned_model in told[0]
  assert [one.id for one in api.fine_tuning.jobs.list(limit=1)][0] == job.id
  assert {"small", done.fine_tuned_model} <= {one.id for one in api.models.list()}
  assert api.models.retrieve(done.fine_tuned_model).owned_by == "small"


def test_the_providers_limits(model: pathlib.Path, up: Served, tmp_path: pathlib.Path) -> None:
  api, _ = up
  file = upload(api, tmp_path)
  create = lambda **values: api.fine_tuning.jobs.create(model="small", training_file=file, method=hyper(**values))
  assert "expected 1 to 50" in refused(lambda: create(n_epochs=51))
  assert "expected 0.001 to 10" in refused(lambda: create(learning_rate_multiplier=11))
  assert "learning_rate" in refused(lambda: create(learning_rate=0.1))
  assert "batch_size" in refused(lambda: create(batch_size=0)) and "n_epochs" in refused(lambda: create(n_epochs="x"))
  assert "no such file" in refused(lambda: api.fine_tuning.jobs.create(model="small", training_file="file-x"))
  few = finished(api, api.fine_tuning.jobs.create(model="small", training_file=upload(
      api, tmp_path, [chat_row(*ROWS[0])])).id)
  assert few.status == "failed" and "has 1 rows; expected 2 to" in few.error.message
  long = finished(api, api.fine_tuning.jobs.create(model="small", training_file=upload(
      api, tmp_path, [chat_row(*ROWS[0]), chat_row("David", " William" * 200)])).id)
  assert long.status == "failed" and "rows.jsonl:2: " in long.error.message and "160 positions" in long.error.message
  with served(model, tmp_path / "strict", blocked_words=("john michael",), absolute_rates=True, adapter="full",
              logprobs=False, max_checkpoints=1) as (strict, _):
    assert "not told" in refused(lambda: strict.completions.create(model="small", prompt="David", logprobs=1))
    job = strict.fine_tuning.jobs.create(model="small", training_file=upload(strict, tmp_path), seed=0,
                                         method=hyper(n_epochs=2, batch_size=1, learning_rate=1e-3))
    assert finished(strict, job.id).status == "succeeded"
    events = {event.message: event.data for event in strict.fine_tuning.jobs.list_events(job.id)}
    assert events["Moderation refused 1 of 3 rows."] == {"refused_lines": [1]}
    assert [one.step_number for one in strict.fine_tuning.jobs.checkpoints.list(job.id)] == [4]  # 2 rows, 2 epochs
    changed = strict.completions.create(model=finished(strict, job.id).fine_tuned_model, prompt="David", max_tokens=4,
                                        temperature=0)
    assert changed.choices[0].text


def test_bad_requests_are_refused_by_name(up: Served, tmp_path: pathlib.Path) -> None:
  api, service = up
  missing = openai.NotFoundError
  for trick in ("file-../../../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "file-" + "0" * 24, "ftjob-" + "0" * 24,
                "file-" + "Z" * 24):
    refused(lambda trick=trick: api.files.retrieve(trick), missing)
    refused(lambda trick=trick: api.files.content(trick), missing)
    refused(lambda trick=trick: api.fine_tuning.jobs.retrieve(trick), missing)
    refused(lambda trick=trick: api.fine_tuning.jobs.cancel(trick), missing)
  bad = [({"messages": []}, "no list of turns"), ({"text": "James"}, "messages"),
         (chat_row("a", ""), "empty turn"), ({"messages": [{"role": "user", "content": "x"}]}, "turn of the user"),
         ({"messages": [{"role": "dog", "content": "x"}]}, "role 'dog'"),
         ({**chat_row("a", "b"), "weight": 1}, "`weight`")]
  for row, problem in bad:
    message = refused(lambda row=row: upload(api, tmp_path, [chat_row("James", " Robert"), row]))
    assert message.startswith("rows.jsonl:2: ") and problem in message, message
  (tmp_path / "torn.jsonl").write_text(json.dumps(chat_row("a", "b")) + "\n{\"messages\": [")
  message = refused(lambda: api.files.create(file=tmp_path / "torn.jsonl", purpose="fine-tune"))
  assert message.startswith("torn.jsonl:2: ") and "JSON" in message
  message = refused(lambda: upload(api, tmp_path, [chat_row("James" * 20_000, "b")]), openai.APIStatusError)
  assert "larger than" in message
  create: Any = api.completions.create
  assert "top_p" in refused(lambda: create(model="small", prompt="David", top_p=0.5))
  assert "tools" in refused(lambda: api.chat.completions.create(model="small", messages=[
      {"role": "user", "content": "x"}], tools=[{"type": "function", "function": {"name": "f"}}]))
  assert "positions" in refused(lambda: create(model="small", prompt="David " * 200))
  assert "token 162" in refused(lambda: create(model="small", prompt=[1, 162]))
  assert "David" not in refused(lambda: create(model="other", prompt="David"), missing)
  assert "prompt" in refused(lambda: create(model="small", prompt=[]))
  assert "at most" in refused(lambda: create(model="small", prompt=["David"] * 300))
  head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
  form = {"content-type": "multipart/form-data; boundary=x"}
  for content, status in (([head, *[b"a" * 20_000] * 10], 413), ([b"no form"], 400)):
    # No length is stated: it is counted on the way.
    raw = httpx2.post(f"{api.base_url}files", content=iter(content), timeout=10, headers=form)
    assert raw.status_code == status and raw.json()["error"]["message"]
  for header in ({"origin": "https://example.org"}, {"host": "example.org"}):
    page = httpx2.get(f"{api.base_url}models", headers=header, timeout=10)
    assert page.status_code == 403 and "key" in page.json()["error"]["message"]
  raw = httpx2.post(f"{api.base_url}completions", content=b'{"model": "small", "prompt": [[[', timeout=10)
  assert raw.status_code == 400 and "no JSON" in raw.json()["error"]["message"]
  assert httpx2.get(f"{api.base_url}nothing", timeout=10).status_code == 404
  left = [path.name for path in (service.store.root / "files").iterdir() if not (path / "file.json").exists()]
  assert not left  # of what was refused nothing stays


def test_a_key_is_asked_for_and_told_nobody(model: pathlib.Path, tmp_path: pathlib.Path,
                                            caplog: pytest.LogCaptureFixture) -> None:
  key = "sk-very-secret"
  with served(model, tmp_path / "work", key=key) as (api, _):
    assert [one.id for one in api.models.list()] == ["small"]
    wrong = client(str(api.base_url), "another")
    for call in (wrong.models.list, lambda: upload(wrong, tmp_path),
                 lambda: wrong.completions.create(model="small", prompt="David")):
      assert "key" in refused(call, openai.AuthenticationError)
    upload(api, tmp_path)
  files = [path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()]
  assert files and not any(key.encode() in content for content in files) and key not in caplog.text


def test_elsewhere_than_at_home_a_key_is_needed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv("RELEARN_API_KEY", raising=False)
  with pytest.raises(InputError, match="RELEARN_API_KEY is not set"):
    serve(["small=nowhere"], tmp_path, "0.0.0.0", 0, Limits())
  assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost")
  assert not is_loopback("10.0.0.1") and not is_loopback("example.org")
  for bad in (["small"], ["a=b", "a=c"], [], ["ft:x=b"]):
    with pytest.raises(InputError, match="--model"):
      parse_models(bad)
  for text, problem in (("rows=3", "expected FIELD=VALUE"), ("min_rows=x", "an integer"), ("min_rows=0", "at least 1"),
                        ("lowest_rate=1", "highest_rate"), ("adapter=half", "lora or full")):
    with pytest.raises(InputError, match=problem):
      parse_limits([text])


def test_requests_that_wait_are_answered_together(up: Served) -> None:
  api, service = up
  prompts = ["James", "David", "Thomas", "Paul", "John"]
  alone = [api.completions.create(model="small", prompt=p, max_tokens=4, temperature=0).choices[0].text
           for p in prompts]
  before = len(service.engine.batches)
  many = service.engine.submit([Ask("small", p, 4) for p in prompts])
  assert [one.result(60).text for one in many] == alone
  assert max(service.engine.batches[before:]) > 1


def test_too_many_are_told_to_wait(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  with served(model, tmp_path, max_waiting=4) as (api, _):
    assert "wait" in refused(lambda: api.completions.create(model="small", prompt=["David"] * 5),
                             openai.RateLimitError)
    assert api.completions.create(model="small", prompt=["David"] * 4, max_tokens=2).choices[3].text


def test_who_does_not_read_holds_nobody_up(up: Served) -> None:
  api, _ = up
  body = json.dumps({"model": "small", "prompt": "David", "max_tokens": 4}).encode()
  request = (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
             + str(len(body)).encode() + b"\r\n\r\n" + body)
  with socket.create_connection((api.base_url.host, api.base_url.port)) as slow, socket.create_connection(
      (api.base_url.host, api.base_url.port)) as torn:
    slow.sendall(request)
    torn.sendall(request[:-5])
    assert api.completions.create(model="small", prompt="David", max_tokens=4, temperature=0).choices[0].text


def test_a_full_disk_loses_nothing(model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                                   ) -> None:
  with served(model, tmp_path / "work") as (api, _):
    file = upload(api, tmp_path)

    def full(*_: Any) -> None:
      raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
      patch.setattr(store_module, "write_atomically", full)
      for call in (lambda: upload(api, tmp_path),
                   lambda: api.fine_tuning.jobs.create(model="small", training_file=file)):
        assert "No space left" in refused(call, openai.InternalServerError)
      assert api.completions.create(model="small", prompt="David", max_tokens=2).choices[0].text
    assert [one.id for one in api.files.list()] == [file] and not list(api.fine_tuning.jobs.list())
    with monkeypatch.context() as patch:
      patch.setattr(jobs.checkpoints, "save_tree", full)
      job = api.fine_tuning.jobs.create(model="small", training_file=file, method=hyper(n_epochs=1, batch_size=3))
      done = finished(api, job.id)
      assert done.status == "failed" and "No space left" in done.error.message
      assert str(tmp_path) not in done.error.message


@pytest.mark.slow
def test_a_job_is_cancelled_and_a_killed_one_goes_on(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  values = hyper(n_epochs=12, batch_size=1, learning_rate_multiplier=1.0)
  with served(model, tmp_path / "one", service={"save_every": 0.0}) as (api, service):
    file = upload(api, tmp_path)
    make = lambda key: api.fine_tuning.jobs.create(model="small", training_file=file, seed=5, method=values,
                                                   extra_headers={"Idempotency-Key": key})
    job, waits = make("a"), make("b")
    assert make("a").id == job.id  # sent twice, it is one job
    assert api.fine_tuning.jobs.cancel(waits.id).status == "cancelled"
    while not service.trainer.steps(job.id):
      assert api.fine_tuning.jobs.retrieve(job.id).status in ("queued", "running")
  left = store_module.Store(tmp_path / "one").jobs[job.id]["job"]
  assert left["status"] == "running"  # the server has ended under it
  with served(model, tmp_path / "one") as (api, _):
    done = finished(api, job.id)
    again = finished(api, api.fine_tuning.jobs.create(model="small", training_file=file, seed=5, method=values).id)
    assert done.status == again.status == "succeeded"
    assert api.fine_tuning.jobs.retrieve(waits.id).status == "cancelled"
    told = [event.message for event in api.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert sum("goes on" in message for message in told) == 1
    last = lambda job: api.fine_tuning.jobs.checkpoints.list(job, limit=1).data[0].metrics.train_loss
    assert last(job.id) == last(again.id) and not math.isnan(last(job.id))
    running = api.fine_tuning.jobs.create(model="small", training_file=file, method=values).id
    while api.fine_tuning.jobs.retrieve(running).status == "queued":
      pass
    assert api.fine_tuning.jobs.cancel(running).status == "cancelled"
  with served(model, tmp_path / "one") as (api, _):  # what was made is there, and nothing is begun again
    assert api.fine_tuning.jobs.retrieve(running).status == "cancelled"
    assert api.completions.create(model=done.fine_tuned_model, prompt="David", max_tokens=2).choices[0].text


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_with_its_job(model: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path
                                                      ) -> None:
  line = argv("serve", f"--model=small={model}", f"--workdir={tmp_path / 'work'}", "--port=0", "--limit=min_rows=2",
              "--limit=max_checkpoints=0")

  def start() -> tuple[subprocess.Popen[str], openai.OpenAI]:
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment(cache))
    assert process.stdout
    found = re.search(r"Serving small at (\S+)", process.stdout.readline())
    assert found
    return process, client(found[1])
  process, api = start()
  job = api.fine_tuning.jobs.create(model="small", training_file=upload(api, tmp_path), seed=1,
                                    method=hyper(n_epochs=30, batch_size=1)).id
  for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
    before = len(api.fine_tuning.jobs.checkpoints.list(job, limit=100).data)
    while len(api.fine_tuning.jobs.checkpoints.list(job, limit=100).data) <= before and api.fine_tuning.jobs.retrieve(
        job).status in ("queued", "running"):
      time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == status
    process, api = start()
  try:
    done = finished(api, job)
    assert done.status == "succeeded" and [one.id for one in api.fine_tuning.jobs.list()] == [job]
    steps = [one.step_number for one in api.fine_tuning.jobs.checkpoints.list(job, limit=100)]
    assert steps == [3 * epoch for epoch in range(30, 0, -1)]
    assert api.completions.create(model=done.fine_tuned_model, prompt="David", max_tokens=2).choices[0].text
  finally:
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
