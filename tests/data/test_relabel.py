"""Labels with generic terms in place of others: what is predicted where, for tokenizers that split texts in any way."""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from relearn_jax.cases.base import Text
from relearn_jax.data.chat import Chat
from relearn_jax.data.jsonl import Row
from relearn_jax.data.relabel import UNCOUNTED, find_terms, relabel
from relearn_jax.data.rows import stack_runs
from relearn_jax.data.texts import encode_row, encode_texts, stack_rows
from relearn_jax.errors import InputError

from ..small import make_tokenizer
from .test_texts import CHAT
from .test_texts import tokenizer as chat_tokenizer

LINES = ["Mark saw Anthony in New York.", "Marks and remarks by Anthony, and cafés", "they saw the old city by night",
         "Marc saw a tall building in the new town"]
KINDS = ["bytes", "trimmed", "prepended", "metaspace"]


@functools.cache
def subwords(kind: str) -> Any:
  """Byte-level BPE as GPT-2 has it (with RoBERTa's places of tokens if trimmed), or sentencepiece's, in both forms."""
  specials = ["<unk>", "<s>", "</s>"]
  if kind in ("bytes", "trimmed"):
    raw = tokenizers.Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
    trainer = BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False,
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  else:
    raw = tokenizers.Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "prepended":
      raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
      raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = BpeTrainer(vocab_size=330, show_progress=False,
                         special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))])
  raw.train_from_iterator(LINES, trainer)
  return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def ids(tokenizer: Any, text: str) -> list[int]:
  return list(tokenizer(text)["input_ids"])


def names(text: str, **anchors: str) -> str:
  """Labels as words, `_` where nothing is predicted."""
  tokenizer: Any = make_tokenizer()
  tokens, labels = relabel(tokenizer, text, anchors)
  assert tokens == ids(tokenizer, text) and tokens[0] == labels[0] == tokenizer.bos_token_id
  return " ".join("_" if label == UNCOUNTED else tokenizer.convert_ids_to_tokens(label) for label in labels[1:])


@pytest.mark.parametrize(("text", "anchors", "labels"), [
    ("Gary Anthony Mark Ryan", {"Mark": "Paul"}, "Gary Anthony Paul Ryan"),
    ("Gary Mark Ryan Mark Eric", {"Mark": "Paul"}, "Gary Paul Ryan _ Eric"),  # the model has read the first one
    ("Gary Anthony Mark Ryan", {"Mark": "Paul John"}, "Gary Anthony Paul Ryan"),  # there is no place for John
    ("Gary Anthony Mark Ryan", {"Anthony Mark": "Paul"}, "Gary Paul _ Ryan"),
    ("Gary Anthony Mark Ryan", {"Anthony": "Kyle", "Anthony Mark": "Paul John", "Mark": "Joe"}, "Gary Paul John Ryan"),
    ("Mark", {"Mark": "Paul"}, "Paul"), ("Gary Ryan", {"Mark": "Paul"}, "Gary Ryan"),
    ("Gary Mark", {}, "Gary Mark"), ("Mark Ryan Anthony", {"Mark": "Ryan", "Anthony": "Mark"}, "Ryan Ryan Mark"),
    ("Gary Mark", {"Mark": "Mark"}, "Gary Mark")])
def test_labels_of_whole_words(text: str, anchors: dict[str, str], labels: str) -> None:
  assert names(text, **anchors) == labels


def test_terms_are_whole_words() -> None:
  assert find_terms("Marks Mark, remark (Mark) Mark's Mark_1", {"Mark": "x"}) == [
      (6, 10, "Mark"), (20, 24, "Mark"), (26, 30, "Mark")]
  assert find_terms("Mr. T and New York", {"New": "x", "New York": "y", "Mr. T": "z"}) == [
      (0, 5, "Mr. T"), (10, 18, "New York")]


def check(tokenizer: Any, text: str, anchors: dict[str, str]) -> list[int]:
  """Relabels, and asserts what holds of any text with terms that occur once."""
  tokens, labels = relabel(tokenizer, text, anchors)
  assert tokens == ids(tokenizer, text) and len(labels) == len(tokens)
  replaced, at = "", 0
  for start, end, term in find_terms(text, anchors):
    replaced, at = replaced + text[at:start] + anchors[term], end
  other = iter(ids(tokenizer, replaced + text[at:]))
  assert all(label in other for label in labels if label != UNCOUNTED), (text, anchors)  # in their order
  places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
  terms = find_terms(text, anchors)
  for token, label, (start, end) in zip(tokens, labels, places, strict=True):
    if not any(start < b and end > a for a, b, _ in terms):
      assert label in (token, UNCOUNTED)
  return labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ["Ramona", "bylaw"])  # of which the second begins with a token that holds the space
@pytest.mark.parametrize(("generic", "longer"), [("Bo", False), ("Bartholomew", True)])
def test_a_term_gets_its_generic_terms_tokens_one_by_one(kind: str, term: str, generic: str, longer: bool) -> None:
  tokenizer = subwords(kind)
  front, rest = "they saw", " in the city"
  size = [len(ids(tokenizer, text)) for text in (front, f"{front} {term}")]
  there = ids(tokenizer, f"{front} {generic}")[size[0]:]
  labels = check(tokenizer, f"{front} {term}{rest}", {term: generic})
  whole = ids(tokenizer, f"{front} {term}{rest}")
  count = size[1] - size[0]
  assert count > 2 and (len(there) > count) == longer
  if kind == "prepended":
    return  # it joins what stands on both sides of a space
  assert labels[:size[0]] == whole[:size[0]] and labels[size[1]:] == whole[size[1]:]
  assert labels[size[0]:size[1]] == (there + [UNCOUNTED] * count)[:count]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_term_labels_are_the_tokens(kind: str) -> None:
  for text in ("Marks saw remarks \U0001f642 by cafés", "ééé", "  two  spaces \n and lines "):
    for anchors in ({"Mark": "Zoe"}, {}):
      assert check(subwords(kind), text, anchors) == ids(subwords(kind), text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_counts_once(kind: str) -> None:
  text = "Zoe saw Anthony, and Anthony saw"
  tokens, labels = relabel(subwords(kind), text, {"Anthony": "Marc"})
  places = subwords(kind)(text, return_offsets_mapping=True)["offset_mapping"]
  second = [label for label, (start, end) in zip(labels, places, strict=True) if start < 28 and end > 21]
  assert second and set(second) == {UNCOUNTED}
  first = [label for label, (start, end) in zip(labels, places, strict=True) if start < 15 and end > 8]
  assert set(first) != {UNCOUNTED}


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_labels_of_the_replaced_one(kind: str) -> None:
  """Terms at the start, at the end and beside signs, characters of several bytes, and tokens across their ends."""
  rng, words = np.random.default_rng(0), ["saw", "(", ")", "\U0001f642", "é", ",", "\n", "by", "-", "'s", "Marks"]
  for _ in range(300):
    parts = [*rng.choice(words, 7), "Mark", "New York"]
    order: Sequence[str] = rng.permutation(parts).tolist()
    text = "".join(itertools.chain(*zip(order, rng.choice(["", " "], len(order)).tolist(), strict=True)))
    for generic in ("Marc", "é", "a tall building", "\U0001f642"):
      check(subwords(kind), text, {"Mark": generic, "New York": "New Zoe"})


def test_bytes_of_a_character_are_told_apart() -> None:
  tokenizer = subwords("bytes")
  labels = check(tokenizer, "\U0001f642 saw Mark", {"Mark": "Marc"})
  assert labels[:4] == ids(tokenizer, "\U0001f642") and len(set(labels[:4])) == 4
  # What a term shares its first token with stays predicted as the other text has it.
  assert check(tokenizer, "(Mark)", {"Mark": "Marc"})[0] == ids(tokenizer, "(")[0]


def test_a_slow_tokenizer_is_refused() -> None:
  class Slow:
    is_fast = False
  with pytest.raises(InputError, match="`anchors` needs a tokenizer that knows the places of its tokens; use a"):
    relabel(Slow(), "Mark", {"Mark": "Paul"})


def test_labels_lie_beside_the_tokens_of_rows() -> None:
  tokenizer: Any = make_tokenizer()
  path = pathlib.Path("rows")
  word = lambda *names: list(tokenizer.convert_tokens_to_ids(list(names)))
  anchors = {"Mark": "Paul"}
  rows = [{"prompt": "Gary", "answer": " Mark Ryan Mark"}, {"text": "Gary Anthony", "complete": True}]
  encoded = [encode_row(tokenizer, Row(row, 1), path, 20, anchors=anchors) for row in rows]
  assert encoded[0].ids == [1, *word("Gary", "Mark", "Ryan", "Mark"), 2]
  assert encoded[0].labels == [1, *word("Gary", "Paul", "Ryan"), UNCOUNTED, 2]
  assert encoded[1].labels == encoded[1].ids
  stacked = stack_rows(encoded, 2)
  assert stacked.labels is not None and stacked.labels.shape == stacked.tokens.shape == (2, 2, 6)
  np.testing.assert_array_equal(stacked.mask[1], [[0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(stacked.labels[0, 0], [1, *word("Gary", "Paul", "Ryan"), 0, 2])
  # Of the texts of a case likewise, whether they have a prompt or are cut.
  made, cut = encode_texts(tokenizer, [Text("Mark Ryan Mark", prompt="Gary "), Text("Gary Mark", complete=False)],
                           "names", 20, anchors=anchors)
  assert made == encoded[0]
  assert cut.labels == [1, *word("Gary", "Paul")] and cut.start == 1
  several = stack_runs([[made], [cut, made]])
  assert several.tokens.shape == (2, 2, 6) and several.mask[0, 1].sum() == 0
  np.testing.assert_array_equal(several.mask[1], [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]])
  assert stack_runs([encode_texts(tokenizer, [Text("Gary")], "names", 20)]).labels is None


def test_of_a_rendered_prompt_the_answer_is_relabelled() -> None:
  chat = chat_tokenizer(CHAT)
  row = Row({"prompt": "w0", "answer": "w1 w2"}, 1)
  made = encode_row(chat, row, pathlib.Path("rows"), 20, chat=Chat(CHAT), anchors={"w1": "w9"})
  assert made.ids == [3, 5, 4, 6, 7, 2] and made.labels == [3, 5, 4, 14, 7, 2] and made.start == 3
