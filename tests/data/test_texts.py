"""Training rows: which tokens count, worked out by hand, and what is refused."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from relearn_jax.cases.files import read_texts, whole_text
from relearn_jax.data.chat import Chat, ChatSettings, open_chat
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import encode_row, stack_rows
from relearn_jax.errors import InputError

from ..small import MODEL, params, write_lines

CHAT = ("{% for m in messages %}<u> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<a> {% endif %}")


def tokenizer(chat: str | None = None) -> Any:
  """Words w0 to w9 are the ids 5 to 14."""
  vocabulary = {token: i for i, token in enumerate(
      ["<pad>", "<s>", "</s>", "<u>", "<a>", *(f"w{n}" for n in range(10))])}
  raw = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
  raw.pre_tokenizer = WhitespaceSplit()
  raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
  made.chat_template = chat
  return made


def rows(tmp_path: pathlib.Path, *values: dict) -> tuple[pathlib.Path, list]:
  path = write_lines(tmp_path / "rows.jsonl", list(values))
  return path, read_texts(path)


def test_of_an_answer_its_tokens_and_the_end_count(tmp_path: pathlib.Path) -> None:
  path, (answer, text, ended) = rows(tmp_path, {"prompt": "w0 w1", "answer": " w2 w3"}, {"text": "w4 w5"},
                                     {"text": "w6 </s>"})
  assert encode_row(tokenizer(), answer, path, 9) == Encoded([1, 5, 6, 7, 8, 2], 3)
  assert encode_row(tokenizer(), text, path, 9) == Encoded([1, 9, 10, 2], 1)
  assert encode_row(tokenizer(), ended, path, 9) == Encoded([1, 11, 2], 1)  # its own end is not doubled
  assert whole_text(answer) == "w0 w1 w2 w3" and whole_text(text) == "w4 w5"


def test_a_chat_template_puts_its_own_special_tokens(tmp_path: pathlib.Path) -> None:
  path, (answer, text) = rows(tmp_path, {"prompt": "w0", "answer": "w2"}, {"text": "w4"})
  chat = tokenizer(CHAT)
  assert encode_row(chat, answer, path, 9, chat=Chat(CHAT)) == Encoded([3, 5, 4, 7, 2], 3)
  assert encode_row(chat, text, path, 9, chat=Chat(CHAT)) == Encoded([1, 9, 2], 1)
  assert open_chat(ChatSettings(), chat, tmp_path, "chat_template") == Chat(CHAT)
  with pytest.raises(InputError, match="tokenizer_config.json: `chat_template` asks for .* which it does not have"):
    open_chat(ChatSettings(), tokenizer(), tmp_path, "chat_template")


def test_rows_are_padded_on_the_right_and_few_places_are_picked(tmp_path: pathlib.Path) -> None:
  path, found = rows(tmp_path, {"prompt": "w0 w1 w2 w3 w4", "answer": " w5"}, {"prompt": "w0", "answer": " w1 w2"})
  encoded = [encode_row(tokenizer(), row, path, 20) for row in found]
  stacked = stack_rows(encoded, 2)
  assert stacked.tokens.shape == (2, 2, 8)
  np.testing.assert_array_equal(stacked.tokens[1], [[1, 5, 6, 7, 8, 9, 10, 2], [1, 5, 6, 7, 2, 0, 0, 0]])
  np.testing.assert_array_equal(stacked.mask[0], [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0]])
  assert stacked.positions is not None
  np.testing.assert_array_equal(stacked.positions[0], [[6, 7, 0], [2, 3, 4]])
  path, found = rows(tmp_path, {"text": "w0 w1 w2 w3 w4"}, {"prompt": "w0", "answer": " w1 w2"})
  assert stack_rows([encode_row(tokenizer(), row, path, 20) for row in found], 1).positions is None


def test_picked_places_give_the_log_probabilities_of_all(tmp_path: pathlib.Path) -> None:
  from relearn_jax.training.step import model_outputs
  path, found = rows(tmp_path, {"prompt": "w0 w1 w2 w3 w4", "answer": " w5"}, {"prompt": "w0", "answer": " w1 w2"})
  one = jax.tree.map(lambda leaf: leaf[0], stack_rows([encode_row(tokenizer(), row, path, 20) for row in found], 1))
  picked, every = (model_outputs(MODEL, params(), data).logprobs for data in (one, one._replace(positions=None)))
  np.testing.assert_allclose(picked, every * one.mask, atol=1e-6)
  assert np.count_nonzero(picked) == 5


@pytest.mark.parametrize(("row", "problem"), [
    ({"text": "w0", "answer": "w1"}, "`text` stands beside `answer`"),
    ({"text": ""}, "`text` is empty"), ({"prompt": "w0", "answer": ""}, "`answer` is empty"),
    ({"prompt": "w0"}, "`answer` is missing"),
    ({"promt": "w0", "answer": "w1"}, r"`prompt` is missing \(there is `promt`"),
    ({"text": 3}, "`text` is 3"), ({}, "`prompt` is missing")])
def test_a_bad_row_is_named(tmp_path: pathlib.Path, row: dict, problem: str) -> None:
  with pytest.raises(InputError, match=rf"rows.jsonl:2: {problem}"):
    rows(tmp_path, {"text": "w0"}, row)


@pytest.mark.parametrize(("row", "problem"), [
    ({"text": "w0 w1 w2 w3"}, "`text` has 6 tokens with its end, more than the model's 5 positions"),
    ({"prompt": "w0 w1", "answer": " w2 w3 w4"}, "`answer` ends at token 6, counted with the prompt"),
    ({"prompt": "w0 w1", "answer": " w2 w3"}, "`answer` has 6 tokens with its end"),
    ({"prompt": "w0", "answer": " "}, "`answer` adds no token to the prompt")])
def test_a_row_that_does_not_fit_is_named(tmp_path: pathlib.Path, row: dict, problem: str) -> None:
  path, found = rows(tmp_path, {"text": "w0"}, row)
  with pytest.raises(InputError, match=rf"rows.jsonl:2: {problem}"):
    encode_row(tokenizer(), found[1], path, 5)
