"""A file of prompts to a file of completions, on a small checkpoint and on the real one."""

import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.chat import ChatSettings
from relearn_jax.data.tokens import completion_text, text_ids
from relearn_jax.errors import InputError
from relearn_jax.generation import prompt_files
from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.generation.prompts import end_ids
from relearn_jax.generation.stop import find_stop
from relearn_jax.models.checkpoint import check_checkpoint
from relearn_jax.models.export import export

from ..small import MODEL, params, shared, write_lines
from .small import MAX_POSITIONS, make_tokenizer, no_device, read_rows, real_rows, refuses, write_checkpoint

REAL = "models/tofu-mini-full"
ROWS: list[dict[str, Any]] = [
    {"id": "long", "prompt": " ".join(f"w{i}" for i in range(30))}, {"id": 7, "prompt": "w1 w2"},
    {"id": "7", "prompt": "w9"}, {"id": "é", "prompt": ""}, {"id": -1, "prompt": "w3 w3 w3", "keywords": ["w1"]},
    {"id": "same", "prompt": "w1 w2"}, {"id": "unknown", "prompt": "w4 nothing"}]
NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small"))


def generate(checkpoint: str, folder: pathlib.Path, rows: list[Any] | None = None, **settings: Any
             ) -> list[dict[str, Any]]:
  """Generated rows."""
  prompts = write_lines(folder / "prompts.jsonl", ROWS if rows is None else rows)
  settings = {"max_new_tokens": NEW, "batch_size": 4, **settings}
  number = generate_file(checkpoint, prompts, folder / "out.jsonl", **settings)
  got = read_rows(folder / "out.jsonl")
  assert number == len(got)
  return got


def eos_of(rows: list[dict[str, Any]]) -> int:
  """A word that one row comes to in its midst and another never."""
  lists = [row["token_ids"] for row in rows]
  return next(t for ids in lists for t in ids[2:-2] if t not in ids[:2] and not all(t in other for other in lists))


def test_rows_come_out_in_order_with_their_ids_and_fields(checkpoint: str, tmp_path: pathlib.Path) -> None:
  tokenizer = make_tokenizer()
  got = generate(checkpoint, tmp_path)
  assert [(row["id"], row["prompt"]) for row in got] == [(row["id"], row["prompt"]) for row in ROWS]
  for row in got:
    assert list(row) == ["id", "prompt", "completion", "token_ids", "finish_reason"]
    assert row["completion"].split() == str(tokenizer.decode(row["token_ids"], skip_special_tokens=True)).split()
    assert len(row["token_ids"]) == NEW if row["finish_reason"] == "length" else row["token_ids"][-1] == 2
  assert got[1]["completion"] == got[5]["completion"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_row_depends_on_the_batch_size(checkpoint: str, tmp_path: pathlib.Path, temperature: float) -> None:
  one, four = (generate(checkpoint, tmp_path, temperature=temperature, seed=3, batch_size=size) for size in (1, 4))
  assert one == four


def test_samples_are_rows_and_the_first_is_what_it_is_alone(checkpoint: str, tmp_path: pathlib.Path) -> None:
  one = generate(checkpoint, tmp_path, temperature=1.0, seed=3)
  three, slots_of_two = (generate(checkpoint, tmp_path, temperature=1.0, seed=3, samples=3, batch_size=size)
                         for size in (4, 2))
  assert three == slots_of_two
  assert [(row["id"], row.pop("sample")) for row in three] == [(row["id"], i) for row in ROWS for i in range(3)]
  assert three[::3] == one
  assert all(len({row["completion"] for row in three[start:start + 3]}) == 3 for start in range(0, len(three), 3))


def test_greedy_rows_do_not_depend_on_their_order(checkpoint: str, tmp_path: pathlib.Path) -> None:
  assert generate(checkpoint, tmp_path, ROWS[::-1])[::-1] == generate(checkpoint, tmp_path)


def test_the_seed_and_the_place_decide_what_is_sampled(checkpoint: str, tmp_path: pathlib.Path) -> None:
  first, again, other = (generate(checkpoint, tmp_path, temperature=1.0, seed=seed) for seed in (3, 3, 4))
  assert first == again != other
  assert first[1]["prompt"] == first[5]["prompt"] and first[1]["token_ids"] != first[5]["token_ids"]
  more = generate(checkpoint, tmp_path, [*ROWS, {"id": "more", "prompt": "w5"}], temperature=1.0, seed=3)
  assert more[:-1] == first


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_eos_ends_a_row_and_is_its_last_token(checkpoint: str, tmp_path: pathlib.Path, where: str) -> None:
  free = generate(checkpoint, tmp_path)
  eos = eos_of(free)
  folder = write_checkpoint(tmp_path / "eos", **({"eos_token_id": eos} if where == "config.json" else {}))
  if where != "config.json":
    (folder / where).write_text(json.dumps({"eos_token_id": [eos]}))
  for row, whole in zip(generate(str(folder), tmp_path), free, strict=True):
    ids = whole["token_ids"]
    expected = ids[:ids.index(eos) + 1] if eos in ids else ids
    assert (row["token_ids"], row["finish_reason"]) == (expected, "stop" if eos in ids else "length")
    # The word that ends the row is no special token of the tokenizer, and yet no part of the text.
    assert row["completion"].split() == [f"w{i - 4}" for i in expected if i != eos and i > 3]


def test_stop_strings_cut_text_and_tokens(checkpoint: str, tmp_path: pathlib.Path) -> None:
  free = generate(checkpoint, tmp_path)
  word = f"w{eos_of([row for row in free if min(row['token_ids']) > 3]) - 4}"
  prefix = word + " "  # complete only with the word after it
  got, none = generate(checkpoint, tmp_path, stop=["never", prefix]), generate(checkpoint, tmp_path, stop=["never"])
  assert none == free
  assert {row["finish_reason"] for row in got} >= {"stop"}
  tokenizer = make_tokenizer()
  for row, whole in zip(got, free, strict=True):
    text, ids = whole["completion"], whole["token_ids"]
    if prefix not in text:
      assert row == whole
      continue
    assert row["completion"] == text[:text.index(prefix)] and row["finish_reason"] == "stop"
    assert row["token_ids"] == ids[:len(row["token_ids"])]
    assert prefix in tokenizer.decode(row["token_ids"], skip_special_tokens=True)
    assert prefix not in tokenizer.decode(row["token_ids"][:-1], skip_special_tokens=True)


@pytest.mark.parametrize("stop,expected", [
    (["x"], None), (["c"], (2, 3)), (["d", "c"], (2, 3)), (["abcd", "b"], (1, 2)), (["bc", "abc", "c"], (0, 3))])
def test_the_first_stop_string_to_be_complete_counts(stop: list[str], expected: Any) -> None:
  assert find_stop("abcdabcd", stop) == expected


def test_a_dropped_template_eos_is_not_one_of_the_text() -> None:
  after = make_tokenizer("<s> $A </s>")
  assert text_ids(after, "w1") == [1, 5] and text_ids(after, "") == [1] and text_ids(after, "w1 </s>") == [1, 5, 2]
  before = make_tokenizer()
  assert text_ids(before, "w1 </s>") == [1, 5, 2] and text_ids(before, "") == [1]
  bare = make_tokenizer("$A")
  assert text_ids(bare, "</s> </s>") == [2, 2] and text_ids(bare, "") == []
  assert text_ids(make_tokenizer("$A </s>"), "") == []


def test_one_new_token_fills_the_last_position(checkpoint: str, tmp_path: pathlib.Path) -> None:
  rows = [{"id": 0, "prompt": " ".join(["w1"] * (MAX_POSITIONS - 2))}, {"id": 1, "prompt": "w1"}]
  assert [len(row["token_ids"]) for row in generate(checkpoint, tmp_path, rows, max_new_tokens=1)] == [1, 1]


def test_nothing_is_drawn_on_a_stderr_that_is_no_terminal(checkpoint: str, tmp_path: pathlib.Path,
                                                          capfd: pytest.CaptureFixture[str]) -> None:
  generate(checkpoint, tmp_path)
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("settings,field,problem,mend", [
    ({"max_new_tokens": 0}, "--max_new_tokens", "is 0", "expected at least 1"),
    ({"batch_size": 0}, "--batch_size", "is 0", "expected at least 1"),
    ({"samples": 0, "temperature": 1.0}, "--samples", "is 0", "expected at least 1"),
    ({"samples": 2}, "--samples", "is 2", "and 1 at temperature 0"),
    ({"temperature": -1.0}, "--temperature", "is -1.0", "expected 0 (greedy) or a positive number"),
    ({"temperature": float("nan")}, "--temperature", "is nan", "expected 0 (greedy) or a positive number"),
    ({"temperature": float("inf")}, "--temperature", "is inf", "expected 0 (greedy) or a positive number"),
    ({"seed": -1}, "--seed", "is -1", "expected 0 to"),
    ({"seed": 2**32}, "--seed", "is 4294967296", "expected 0 to"),
    ({"stop": ["x", ""]}, "--stop", "is empty", "give text")])
def test_bad_arguments_are_named(checkpoint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                 settings: dict[str, Any], field: str, problem: str, mend: str) -> None:
  no_device(monkeypatch, prompt_files)
  with refuses(problem, field=field, mend=mend):
    generate(checkpoint, tmp_path, **settings)


@pytest.mark.parametrize("row,field,problem,mend", [
    ({"id": 1}, "prompt", "is missing", "give it, as str"),
    ({"id": 1, "prompt": 5}, "prompt", "is 5", "expected str"),
    ({"id": "long", "prompt": "w"}, "id", "'long' stands in line 1 too", "give every row an id of its own"),
    ({"id": 1, "prompt": "w1 " * (MAX_POSITIONS - NEW)}, "prompt",
     f"has {MAX_POSITIONS - NEW + 1} tokens, and with {NEW} new ones more than the model's {MAX_POSITIONS} positions",
     "shorten it, or lower --max_new_tokens")])
def test_a_bad_row_is_named_with_its_line(checkpoint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                          row: dict[str, Any], field: str, problem: str, mend: str) -> None:
  no_device(monkeypatch, prompt_files)
  with refuses(problem, file=tmp_path / "prompts.jsonl", line=3, field=field, mend=mend):
    generate(checkpoint, tmp_path, [*ROWS[:2], row])
  assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_without_tokens_or_of_unknown_words_is_named(tmp_path: pathlib.Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
  no_device(monkeypatch, prompt_files)
  folder = str(write_checkpoint(tmp_path / "bare", make_tokenizer("$A", unknown=False)))
  where: dict[str, Any] = {"file": tmp_path / "prompts.jsonl", "line": 2, "field": "prompt"}
  with refuses("gives no token", mend="give text", **where):
    generate(folder, tmp_path, [{"id": 1, "prompt": "w1"}, {"id": 2, "prompt": " "}])
  with refuses("cannot be tokenized", mend="use text that the checkpoint's tokenizer knows", **where):
    generate(folder, tmp_path, [{"id": 1, "prompt": "w1"}, {"id": 2, "prompt": "other"}])


def test_a_bad_checkpoint_prompt_file_or_output_is_named(checkpoint: str, tmp_path: pathlib.Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
  no_device(monkeypatch, prompt_files)
  missing = tmp_path / "none"
  with refuses("does not exist", file=missing, field="--model", mend="give an existing folder"):
    generate(str(missing), tmp_path)
  with refuses("does not exist", file=missing, mend="give a file of JSON lines"):
    generate_file(checkpoint, missing, tmp_path / "out.jsonl", max_new_tokens=1)
  prompts = write_lines(tmp_path / "prompts.jsonl", ROWS)
  with refuses("is the file that is read", file=prompts, field="--output", mend="give another file"):
    generate_file(checkpoint, prompts, prompts, max_new_tokens=1)
  with refuses("cannot be written (it is a folder)", file=tmp_path, field="--output", mend="give a file"):
    generate_file(checkpoint, prompts, tmp_path, max_new_tokens=1)
  folder = write_checkpoint(tmp_path / "tokenizerless")
  (folder / "tokenizer.json").unlink()
  with refuses("does not exist", file=folder / "tokenizer.json", mend="copy the checkpoint's tokenizer files"):
    generate(str(folder), tmp_path)
  folder = write_checkpoint(tmp_path / "ids")
  (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
  with refuses("is 'x'", file=folder / "generation_config.json", field="eos_token_id", mend="expected a token id"):
    generate(str(folder), tmp_path)
  (folder / "generation_config.json").write_text("{}")
  assert end_ids(check_checkpoint(folder)) == (2,)


def test_weights_that_give_no_finite_numbers_are_refused(tmp_path: pathlib.Path) -> None:
  weight = jnp.full_like(params()["final_norm"]["weight"], 3e38)  # finite, what comes of it is not
  broken = {**params(), "final_norm": {"weight": weight}}
  export(broken, MODEL, tmp_path / "nan", tokenizer=make_tokenizer())
  with pytest.raises(InputError, match="gives no finite numbers for .*prompts.jsonl:"):
    generate(str(tmp_path / "nan"), tmp_path)
  assert not (tmp_path / "out.jsonl").exists()


def test_memorised_answers_come_back(tmp_path: pathlib.Path) -> None:
  rows = real_rows(24)
  prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
  got = generate(str(shared(REAL)), tmp_path, prompts, max_new_tokens=144, batch_size=12)
  exact = [row["completion"] == want["answer"] for row, want in zip(got, rows, strict=True)]
  print(f"{sum(exact)} of {len(exact)} answers come back exactly")
  assert np.mean(exact) >= 0.9
  # Stopping at the first space after a word: the leading space of the completion is the answer's own.
  cut = generate(str(shared(REAL)), tmp_path, prompts[:4], max_new_tokens=16, stop=["e"], batch_size=4)
  for row, want in zip(cut, rows, strict=False):
    assert row["completion"] == want["answer"].partition("e")[0] and row["finish_reason"] == "stop"


def test_text_that_ends_within_a_character_is_decoded_alone() -> None:
  from transformers import AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained(shared(REAL))
  ids: list[int] = tokenizer("née 東京", add_special_tokens=False)["input_ids"]
  for place in range(len(ids)):
    before = str(tokenizer.decode(ids[:place]))
    text = completion_text(tokenizer, ids[:place], ids[place:])
    assert "née 東京" == before + text or "\ufffd" in before


def test_the_precision_is_a_setting(checkpoint: str, tmp_path: pathlib.Path) -> None:
  assert generate(checkpoint, tmp_path) == generate(checkpoint, tmp_path, dtype="float32")  # auto, on CPU
  assert generate(checkpoint, tmp_path, dtype="bfloat16") != generate(checkpoint, tmp_path, dtype="float32")
  with pytest.raises(InputError, match="`--dtype` is 'float16'; expected auto, float32 or bfloat16"):
    generate(checkpoint, tmp_path, dtype="float16")


def test_what_the_chat_template_is_told_changes_the_prompt(checkpoint: str, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "chat"
  shutil.copytree(checkpoint, folder)
  (folder / "chat_template.jinja").write_text(
      "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
  rows = [{"id": 1, "prompt": "w3"}]
  told = generate(str(folder), tmp_path, rows, chat=ChatSettings(system="w1 w2"))
  joined = generate(checkpoint, tmp_path, [{"id": 1, "prompt": "w1 w2 w3 "}])
  assert told[0]["prompt"] == "w3" and told != generate(str(folder), tmp_path, rows, chat=ChatSettings())
  assert told[0]["token_ids"] == joined[0]["token_ids"]
