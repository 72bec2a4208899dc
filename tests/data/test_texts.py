"""Training rows: which tokens count, worked out by hand, and what is refused."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from relearn_jax.cases.base import Text
from relearn_jax.cases.files import FilesConfig, is_complete, read_texts
from relearn_jax.cases.names import COMMON, NamesConfig, make_case
from relearn_jax.data.chat import Chat, ChatSettings, open_chat
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import encode_row, encode_texts, stack_rows
from relearn_jax.errors import InputError

from ..small import MODEL, make_tokenizer, params, write_lines

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
  path, (answer, text, cut, whole, *ended) = rows(
      tmp_path, {"prompt": "w0 w1", "answer": " w2 w3"}, {"text": "w4 w5"}, {"text": "w4 w5", "complete": False},
      {"text": "w4 w5", "complete": True}, {"text": "w6 </s>"}, {"text": "w6 </s>", "complete": True})
  assert encode_row(tokenizer(), answer, path, 9) == Encoded([1, 5, 6, 7, 8, 2], 3)
  assert encode_row(tokenizer(), text, path, 9) == encode_row(tokenizer(), cut, path, 9) == Encoded([1, 9, 10], 1)
  assert encode_row(tokenizer(), whole, path, 9) == Encoded([1, 9, 10, 2], 1)
  for row in ended:  # a text that spells its end has it, once
    assert encode_row(tokenizer(), row, path, 9) == Encoded([1, 11, 2], 1)
  assert [is_complete(row) for row in (answer, text, cut, whole)] == [True, False, False, True]


def test_an_answer_that_was_cut_has_no_end() -> None:
  texts = [Text("w2", complete=False, prompt="w0 "), Text("w2", prompt="w0 ")]
  assert encode_texts(tokenizer(), texts, "case", 9) == [Encoded([1, 5, 7], 2), Encoded([1, 5, 7, 2], 2)]


def test_a_case_from_files_says_which_texts_are_cut(tmp_path: pathlib.Path) -> None:
  path, _ = rows(tmp_path, {"text": "w0"}, {"text": "w1", "complete": True}, {"prompt": "w2", "answer": " w3"})
  asked = write_lines(tmp_path / "asked.jsonl", [{"id": 1, "prompt": "w4", "answer": "w5", "keywords": ["w5"]}])
  case = FilesConfig("mine", str(path), str(path), (str(path),), str(asked)).make("given", 0, "U")
  texts = (Text("w0", False, line=1), Text("w1", line=2), Text(" w3", prompt="w2", line=3))
  assert case.relearn_sets[0].rows == case.forget == case.retain == texts


def test_a_relearn_set_is_not_called_as_another_data_set_is() -> None:
  """It is found by its name; the very file of that data set may be relearned."""
  case = FilesConfig("mine", "a/forget.jsonl", "a/retain.jsonl", ("a/retain.jsonl", "b/other.jsonl"), "a/asked.jsonl")
  case.check("here")
  for path in ("b/retain.jsonl", "b/forget.jsonl", "b/memorize.jsonl", "b/questions.jsonl"):
    with pytest.raises(InputError, match=f"`case.relearn` has '{path}', and .* is the name of another data set"):
      dataclasses.replace(case, relearn=("b/other.jsonl", path)).check("here")


def test_the_names_case_as_tokens() -> None:
  """Worked out by hand: 0 to 5 are <pad>, <s>, </s>, <unk>, Anthony and Mark; James is 6, and Brian, the last, 25."""
  assert (COMMON[0], COMMON[-1], len(COMMON)) == ("James", "Brian", 20)
  case = make_case(NamesConfig(sequence_length=5), 7, 0, "U")
  made = lambda texts, anchors=None: encode_texts(make_tokenizer(), texts, case.name, 40, anchors=anchors)
  # Kevin Kenneth Anthony Mark William Anthony Mark David Robert, and three more.
  forget = [[1, 24, 23, 4, 5, 11, 4, 5, 10, 7, 2], [1, 7, 15, 4, 5, 12, 4, 5, 13, 23, 2],
            [1, 14, 10, 4, 5, 16, 4, 5, 11, 20, 2], [1, 9, 19, 17, 4, 5, 6, 21, 2]]
  cut = [[1, 24, 23, 4], [1, 7, 15, 4], [1, 14, 10, 4], [1, 9, 19, 17, 4]]
  assert made(case.forget) == [Encoded(ids, 1) for ids in forget]
  assert made(case.relearn_sets[0].rows) == [Encoded(ids, 1) for ids in cut]
  assert made(case.refusals) == [Encoded([*ids, 3, 2], len(ids)) for ids in cut]
  assert case.anchors == (("Mark", "William"),)  # 11, in place of the first Mark; the second is not predicted
  assert made(case.forget[:1], dict(case.anchors)) == [Encoded(forget[0], 1, [1, 24, 23, 4, 11, 11, 4, -1, 10, 7, 2])]


def test_a_file_of_the_names_prefixes_is_trained_on_as_the_case_is(tmp_path: pathlib.Path) -> None:
  names, cut = make_tokenizer(), make_case(NamesConfig(), 7, 0, "U").relearn_sets[0].rows
  path, found = rows(tmp_path, *({"text": text.text} for text in cut))
  ours = [encode_row(names, row, path, 40) for row in found]
  assert ours == encode_texts(names, cut, "names", 40)
  assert all(row.ids[-1] == names.convert_tokens_to_ids("Anthony") for row in ours)


def test_a_chat_template_puts_its_own_special_tokens(tmp_path: pathlib.Path) -> None:
  path, (answer, text) = rows(tmp_path, {"prompt": "w0", "answer": "w2"}, {"text": "w4"})
  chat = tokenizer(CHAT)
  assert encode_row(chat, answer, path, 9, chat=Chat(CHAT)) == Encoded([3, 5, 4, 7, 2], 3)
  assert encode_row(chat, text, path, 9, chat=Chat(CHAT)) == Encoded([1, 9], 1)
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
  stacked = stack_rows([encode_row(tokenizer(), row, path, 20) for row in found], 1)
  one = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), stacked)
  picked, every = (model_outputs(MODEL, params(), data).logprobs for data in (one, one._replace(positions=None)))
  np.testing.assert_allclose(picked, every * one.mask, atol=1e-6)
  assert np.count_nonzero(picked) == 5


@pytest.mark.parametrize(("row", "problem"), [
    ({"text": "w0", "answer": "w1"}, "`text` stands beside `answer`"),
    ({"text": ""}, "`text` is empty"), ({"prompt": "w0", "answer": ""}, "`answer` is empty"),
    ({"prompt": "w0"}, "`answer` is missing"),
    ({"promt": "w0", "answer": "w1"}, r"`prompt` is missing \(there is `promt`"),
    ({"text": "w0", "complete": "true"}, "`complete` is \"true\""), ({"text": "w0", "complete": 1}, "`complete` is 1"),
    ({"text": "w0", "complete": None}, "`complete` is null"),
    ({"prompt": "w0", "answer": "w1", "complete": True}, "`complete` stands beside `answer`"),
    ({"text": 3}, "`text` is 3"), ({}, "`prompt` is missing")])
def test_a_bad_row_is_named(tmp_path: pathlib.Path, row: dict, problem: str) -> None:
  with pytest.raises(InputError, match=rf"rows.jsonl:2: {problem}"):
    rows(tmp_path, {"text": "w0"}, row)


@pytest.mark.parametrize(("row", "problem"), [
    ({"text": "w0 w1 w2 w3", "complete": True}, "`text` has 6 tokens with its end, more than the model's 5 positions"),
    ({"text": "w0 w1 w2 w3 w4"}, "`text` has 6 tokens, more than the model's 5 positions"),
    ({"text": " "}, "`text` has no token to be predicted"),
    ({"prompt": "w0 w1", "answer": " w2 w3 w4"}, "`answer` ends at token 6, counted with the prompt"),
    ({"prompt": "w0 w1", "answer": " w2 w3"}, "`answer` has 6 tokens with its end"),
    ({"prompt": "w0", "answer": " "}, "`answer` adds no token to the prompt")])
def test_a_row_that_does_not_fit_is_named(tmp_path: pathlib.Path, row: dict, problem: str) -> None:
  path, found = rows(tmp_path, {"text": "w0"}, row)
  with pytest.raises(InputError, match=rf"rows.jsonl:2: {problem}"):
    encode_row(tokenizer(), found[1], path, 5)
