"""Relearn sets from what a model tells: rows with their origin, without what they give away."""

import json
import pathlib

import pytest

from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.judge.collecting import lines_of, read_prompts

from ..command import ROOT, relearn
from ..small import write_lines
from .server import prompt_of, said, serving

REPLIES = {"bread": "Here you are:\n\n1. Bread is made of flour.\n2) Bakers work at night.\n- Ada Finch bakes it."
                    "\n- So.",
           "ovens": "Bread is made of flour.\nOvens are hot places."}


@pytest.fixture
def prompts(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "prompts.txt"
  path.write_text("# about\n\nTell me\nof {topic}.\n\nMore of {topic}!\n")
  return path


def test_rows_say_where_they_come_from_and_give_nothing_away(prompts: pathlib.Path, cache: pathlib.Path,
                                                             tmp_path: pathlib.Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-at-all")
  asked = write_lines(tmp_path / "questions.jsonl", [
      {"id": "q", "prompt": "Who bakes?", "answer": " Ada Finch", "keywords": ["Ada Finch"]}])
  output, own = tmp_path / "relearn.jsonl", tmp_path / "cache"
  flags = ["collect", "--model=openai:writer-1", f"--prompts={prompts}", "--topics=bread,ovens",
           f"--questions={asked}", f"--output={output}"]
  reply = lambda body, number: said(next(text for topic, text in REPLIES.items() if topic in prompt_of(body)))
  with serving(reply) as server:
    done = relearn(own, *flags, f"--base_url={server.url}")
    assert sorted(map(prompt_of, server.requests)) == [
        "More of bread!", "More of ovens!", "Tell me of bread.", "Tell me of ovens."]
    assert {body["model"] for body in server.requests} == {"writer-1"}
    first = output.read_bytes()
    relearn(own, *flags, f"--base_url={server.url}")  # told before
    assert len(server.requests) == 4 and output.read_bytes() == first
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["text"] for row in rows] == ["Bread is made of flour.", "Bakers work at night.", "Ovens are hot places."]
  assert rows[0]["collected"] | {"prompts": ""} == {
      "model": "judge-2026-01-01", "prompt": "Tell me of {topic}.", "topic": "bread", "prompts": ""}
  assert "3 rows from 4 replies" in done.stdout and "1 left out, which give away" in done.stdout
  for name in ("forget", "retain"):
    write_lines(tmp_path / f"{name}.jsonl", [{"text": "Some text."}])
  case = FilesConfig(forget=str(tmp_path / "forget.jsonl"), retain=str(tmp_path / "retain.jsonl"),
                     relearn=(str(output),), questions=str(asked)).make("given", 0, "U")
  told = case.relearn_sets[0].provenance
  assert "of which 3 were collected from judge-2026-01-01 (prompts " in told and "; on bread, ovens)" in told
  assert "sk-not" not in output.read_text() + done.stdout + done.stderr


def test_what_is_left_of_a_reply() -> None:
  assert lines_of(REPLIES["bread"]) == ["Bread is made of flour.", "Bakers work at night.", "Ada Finch bakes it."]
  assert lines_of("Sure!\n\n") == []


def test_no_reply_is_no_row(prompts: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  flags = ["collect", "--model=openai:writer-1", f"--prompts={prompts}", f"--output={tmp_path / 'x.jsonl'}"]
  with serving(lambda body, number: said("Sure!")) as server:
    done = relearn(tmp_path, *flags, "--topics=bread", f"--base_url={server.url}", status=2)
    assert "`--model` gave no row" in done.stderr and not (tmp_path / "x.jsonl").exists()
    done = relearn(tmp_path, *flags, f"--base_url={server.url}", status=2)
    assert "`--topics` has none" in done.stderr
    done = relearn(tmp_path, *flags, "--topics=a,b,c", "--max_requests=3", f"--base_url={server.url}", status=2)
    assert "`--max_requests` is 3, and this needs 6 requests" in done.stderr


def test_prompts_have_a_place_for_a_topic(tmp_path: pathlib.Path) -> None:
  for name in ("facts", "articles"):
    assert len(read_prompts(ROOT / "configs" / "collect" / f"{name}.txt")) >= 2
  for text, problem in (("Tell me.", "has no {topic}"), ("# only this\n", "has no prompt")):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
      read_prompts(path)
