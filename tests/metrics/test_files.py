"""A file of answers to a file of log-probabilities, on a small checkpoint and on the real one."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from relearn_jax.errors import InputError
from relearn_jax.metrics import answer_files
from relearn_jax.metrics.answer_files import score_file
from relearn_jax.models.export import export

from ..generation.small import (
    MAX_POSITIONS,
    WORDS,
    make_tokenizer,
    no_device,
    read_rows,
    real_rows,
    refuses,
    write_checkpoint,
)
from ..small import MODEL, params, shared, write_lines

REAL = "models/tofu-mini-full"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "w1 w2 ", "answer": "w3"}, {"id": 5, "prompt": "", "answer": "w3 w4 w5"},
    {"id": "long", "prompt": " ".join(WORDS[:40]), "answer": " w7 w7 w8"},
    {"id": "last", "prompt": "w9", "answer": " w1" * 20}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small"))


def score(checkpoint: str, folder: pathlib.Path, rows: list[Any] | None = None, **settings: Any
          ) -> list[dict[str, Any]]:
  """Scored rows."""
  data = write_lines(folder / "data.jsonl", ROWS if rows is None else rows)
  number = score_file(checkpoint, data, folder / "out.jsonl", **{"batch_size": 4, **settings})
  got = read_rows(folder / "out.jsonl")
  assert number == len(got)
  return got


@jax.jit
def forward_logprobs(tokens: Any) -> Any:
  """Log-probabilities of every next token by the full forward pass."""
  return jax.nn.log_softmax(MODEL.logits(params(), MODEL.hidden(params(), tokens)))


def expected(prompt: list[int], answer: list[int]) -> np.ndarray:
  """Log-probabilities of an answer, its row alone."""
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, :len(prompt) + len(answer)] = prompt + answer
  places = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
  return np.asarray(forward_logprobs(tokens))[0, places, answer]


def test_scores_are_those_of_the_full_forward_in_order(checkpoint: str, tmp_path: pathlib.Path) -> None:
  tokenizer = make_tokenizer()
  for row, got in zip(ROWS, score(checkpoint, tmp_path), strict=True):
    assert list(got) == ["id", "logprob_sum", "num_tokens", "token_logprobs"] and got["id"] == row["id"]
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["answer"])["input_ids"][1:]
    np.testing.assert_allclose(got["token_logprobs"], expected(prompt, answer), atol=2e-5)
    assert got["num_tokens"] == len(answer) and got["logprob_sum"] == math.fsum(got["token_logprobs"])


def test_no_row_depends_on_the_others(checkpoint: str, tmp_path: pathlib.Path) -> None:
  all_at_once = score(checkpoint, tmp_path)
  for size, rows in ((1, ROWS), (4, ROWS[::-1]), (4, ROWS[2:3])):
    for got in score(checkpoint, tmp_path, rows, batch_size=size):
      want = next(row for row in all_at_once if row["id"] == got["id"])
      np.testing.assert_allclose(got["token_logprobs"], want["token_logprobs"], atol=1e-5)


def test_a_template_eos_is_neither_read_nor_scored(checkpoint: str, tmp_path: pathlib.Path) -> None:
  folder = write_checkpoint(tmp_path / "eos", make_tokenizer("<s> $A </s>"))
  assert score(str(folder), tmp_path) == score(checkpoint, tmp_path)


def test_where_the_boundary_merges_the_answer_begins_at_the_first_differing_token(tmp_path: pathlib.Path) -> None:
  letters = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6, "bc": 7}
  raw = tokenizers.Tokenizer(BPE(letters, [("b", "c")], unk_token="<unk>"))
  raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  folder = str(write_checkpoint(tmp_path / "bpe", PreTrainedTokenizerFast(
      tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
  got = score(folder, tmp_path, [{"id": 1, "prompt": "ab", "answer": "ca"}, {"id": 2, "prompt": "ab", "answer": "a"}])
  np.testing.assert_allclose(got[0]["token_logprobs"], expected([1, 4], [7, 4]), atol=2e-5)
  np.testing.assert_allclose(got[1]["token_logprobs"], expected([1, 4, 5], [4]), atol=2e-5)


@pytest.mark.parametrize("row,field,problem,mend", [
    ({"id": 1, "prompt": "w1"}, "answer", "is missing", "give it, as str"),
    ({"id": 1, "prompt": "w1", "answer": None}, "answer", "is null", "expected str"),
    ({"id": 1, "prompt": "w1", "answer": ""}, "answer", "is empty", "give the text to score"),
    ({"id": 1, "prompt": "w1", "answer": "  "}, "answer", "adds no token to the prompt", "give text"),
    ({"id": 1, "prompt": "w1", "answer": " w2" * MAX_POSITIONS}, "answer",
     f"ends at token {MAX_POSITIONS + 2}, counted with the prompt, beyond the model's {MAX_POSITIONS} positions",
     "shorten it or its prompt"),
    ({"id": 5, "prompt": "w1", "answer": "w2"}, "id", "5 stands in line 2 too", "give every row an id of its own")])
def test_a_bad_row_is_named_with_its_line(checkpoint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                          row: dict[str, Any], field: str, problem: str, mend: str) -> None:
  no_device(monkeypatch, answer_files)
  with refuses(problem, file=tmp_path / "data.jsonl", line=3, field=field, mend=mend):
    score(checkpoint, tmp_path, [*ROWS[:2], row])
  assert not (tmp_path / "out.jsonl").exists()


def test_an_answer_needs_a_token_in_front(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  no_device(monkeypatch, answer_files)
  folder = str(write_checkpoint(tmp_path / "bare", make_tokenizer("$A")))
  with refuses("leaves no token in front of the answer", file=tmp_path / "data.jsonl", line=1, field="prompt",
               mend="give a prompt"):
    score(folder, tmp_path, [{"id": 1, "prompt": "", "answer": "w1"}])


def test_bad_arguments_and_files_are_named(checkpoint: str, tmp_path: pathlib.Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
  no_device(monkeypatch, answer_files)
  with refuses("is 0", field="--batch_size", mend="expected at least 1"):
    score(checkpoint, tmp_path, batch_size=0)
  with refuses("does not exist", file=tmp_path / "none", field="--model", mend="give an existing folder"):
    score(str(tmp_path / "none"), tmp_path)
  data = write_lines(tmp_path / "data.jsonl", ROWS)
  with refuses("is the file that is read", file=data, field="--output", mend="give another file"):
    score_file(checkpoint, data, data)
  below = data / "out.jsonl"
  with refuses("cannot be written (", file=below, field="--output", mend="give a file in a folder"):
    score_file(checkpoint, data, below)


def test_weights_that_give_no_finite_numbers_are_refused(tmp_path: pathlib.Path) -> None:
  weight = jnp.full_like(params()["final_norm"]["weight"], 3e38)  # finite, what comes of it is not
  broken = {**params(), "final_norm": {"weight": weight}}
  export(broken, MODEL, tmp_path / "nan", tokenizer=make_tokenizer())
  with pytest.raises(InputError, match="gives no finite numbers for .*data.jsonl:"):
    score(str(tmp_path / "nan"), tmp_path)


def test_scores_agree_with_transformers_per_token(tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained(shared(REAL))
  theirs = AutoModelForCausalLM.from_pretrained(shared(REAL), dtype=torch.float32).eval()
  rows = real_rows(8)
  # Answers that were not memorised have log-probabilities far from 0.
  rows += [{"id": f"other{i}", "prompt": row["prompt"], "answer": rows[i - 1]["answer"]} for i, row in enumerate(rows)]
  worst = 0.0
  for row, got in zip(rows, score(str(shared(REAL)), tmp_path, rows, batch_size=5), strict=True):
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["answer"])["input_ids"]
    assert list(ids)[:len(prompt)] == list(prompt)
    with torch.no_grad():
      logprobs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].float(), -1)
    want = logprobs[torch.arange(len(prompt) - 1, len(ids) - 1), torch.tensor(ids[len(prompt):])].numpy()
    assert got["num_tokens"] == len(want)
    worst = max(worst, float(np.abs(np.array(got["token_logprobs"]) - want).max()))
  print(f"largest difference of a token's log-probability from transformers': {worst:.1e}")
  assert worst < 1e-4


def test_the_precision_is_a_setting(checkpoint: str, tmp_path: pathlib.Path) -> None:
  full, auto, half = (score(checkpoint, tmp_path, dtype=dtype) for dtype in ("float32", "auto", "bfloat16"))
  assert full == auto != half
  with pytest.raises(InputError, match="`--dtype` is 'half'; expected auto, float32 or bfloat16"):
    score(checkpoint, tmp_path, dtype="half")
