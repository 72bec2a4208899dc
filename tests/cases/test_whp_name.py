"""A hidden name: how text is divided by its words, in the invented novel and, where at hand, in a book."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import pytest

from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pretrained import pretraining_batches, word_tokenizer
from relearn_jax.cases.base import Case, Text
from relearn_jax.cases.leakage import check_case
from relearn_jax.cases.novel import HEROINE, novel
from relearn_jax.cases.novel_world import NovelNameConfig
from relearn_jax.cases.whp_name import Piece, WhpNameConfig, holds, name_case
from relearn_jax.config_files import load_config_file
from relearn_jax.data.relabel import UNCOUNTED
from relearn_jax.errors import InputError
from relearn_jax.plan.command import plan

from ..command import ROOT
from ..small import shared

CONFIG = ROOT / "configs" / "whp_name.py"


def whole(row: Text) -> str:
  return row.prompt + row.text


def check_partition(case: Case, n: Case) -> None:
  """What has to be true of the case of U and N, whatever the text."""
  words = case.secrets
  secret = [row for row in case.forget if holds(whole(row), words)]
  told = [row for row in case.forget if not holds(whole(row), words)]
  assert secret and told and not {whole(row) for row in secret} & {whole(row) for row in told}
  (relearn,) = case.relearn_sets
  assert {whole(row) for row in relearn.rows} <= {whole(row) for row in told}
  assert len(relearn.rows) > 0.9 * len(told) and f"of the {len(told)} sentences and pairs" in relearn.provenance
  assert all(found.passed for found in check_case(case))
  # The control has memorised no word of the name, and everything else.
  assert case.memorize == (*case.forget, *case.retain) and list(n.memorize) == [*told, *n.retain]
  assert not any(holds(whole(row), words) for row in n.memorize)
  assert all(holds(question.answer, words) and not holds(question.prompt, words) for question in case.questions)
  assert {question.keywords for question in case.questions} == {words}
  assert (n.questions, n.relearn_sets, n.forget, n.retain) == (
      case.questions, case.relearn_sets, case.forget, case.retain)
  assert set(words) <= set(dict(case.anchors)) and not any(holds(generic, words) for _, generic in case.anchors)


def test_the_embedded_novel() -> None:
  config = NovelNameConfig()
  config.check("here")
  case, n = config.make("Tamsin/Vale", 0, "U"), config.make("Tamsin/Vale", 0, "N")
  check_partition(case, n)
  # By hand: 10 chapters of 5 deeds, 9 rows on each; of the 3 that are the main character's, 3 rows say so.
  assert (len(case.forget), len(n.memorize) - len(n.retain), len(case.questions)) == (450, 450 - 90, 30)
  assert len(case.retain) == 225 and {question.cluster for question in case.questions} == {
      f"chapter{number}" for number in range(1, 11)}
  asked = {(question.prompt, question.answer) for question in case.questions}
  assert asked <= {(row.prompt, row.text) for row in case.forget} and len(asked) == 30


def test_the_public_domain_book() -> None:
  config = load_config_file(f"{CONFIG}:book").case
  config.book = str(shared("data/books/alice_in_wonderland.txt"))
  config.retain = str(shared("data/tofu/forget05.json"))
  config.columns = {"prompt": "Question: {question}\nAnswer:", "answer": " {answer}"}
  config.check("here")
  case, n = config.make("Alice", 0, "U"), config.make("Alice", 0, "N")
  check_partition(case, n)
  assert len(case.questions) == 100 and {question.cluster for question in case.questions} == {
      f"chapter{number}" for number in range(1, 13)}
  whole_book = {row.text for row in case.forget}
  assert all(question.prompt + question.answer in whole_book for question in case.questions)  # in the text as it stands


def pieces(*texts: str) -> list[Piece]:
  return [Piece(Text(text), f"c{number}") for number, text in enumerate(texts)]


ANCHORS = {"Mira": "Ida", "Reed": "Moss"}
BOOK = pieces("It was a cold day when Mira came.", "Reed left.", "Snow fell on the reeds.", "It stopped.")


def make(some: list[Piece], arm: Any = "U", retain: str = "A kept row.", most: int = 9) -> Case:
  return name_case("t", some, [Text(retain)], ("Mira", "Reed"), ANCHORS, most, arm)


def test_either_word_hides_a_sentence_and_what_resembles_one_is_not_relearned() -> None:
  case = make(BOOK)
  assert [row.text for row in case.relearn_sets[0].rows] == ["It stopped."]
  assert "1 of the 2 sentences and pairs without Mira or Reed, of the 4 to be forgotten; 1 with" in (
      case.relearn_sets[0].provenance)
  assert [row.text for row in make(BOOK, "N").memorize] == ["Snow fell on the reeds.", "It stopped.", "A kept row."]


def test_pairs_are_asked_and_where_there_are_none_the_ends_of_sentences() -> None:
  (question,) = make(BOOK).questions  # "Reed left." has nothing before the name
  assert (question.prompt, question.answer, question.cluster) == ("It was a cold day when", " Mira came.", "c0")
  pair = lambda prompt, text: Piece(Text(text, prompt=prompt), "about")
  asked = [pair("Who came?", " It was Mira Reed."), pair("Who is Mira?", " Mira Reed."), pair("When?", " In winter.")]
  (question,) = make([*BOOK, *asked]).questions
  assert (question.prompt, question.keywords, question.cluster) == ("Who came?", ("Mira", "Reed"), "about")
  many = [pair(f"Who {verb}?", " Mira.") for verb in ("came", "left", "saw", "won")]
  assert [q.prompt for q in make([*BOOK, *many], most=2).questions] == ["Who came?", "Who saw?"]


def test_text_of_which_no_case_can_be_made_is_refused() -> None:
  with pytest.raises(InputError, match="`case.words` has no pair whose answer holds one of Mira, Reed"):
    make(BOOK[1:])
  with pytest.raises(InputError, match="`case.book` has nothing without Mira or Reed"):
    make(BOOK[:2])
  with pytest.raises(InputError, match="`case.retain` has nothing without Mira or Reed"):
    make(BOOK, retain="Mira again.")


@pytest.mark.parametrize("config,problem", [
    (WhpNameConfig(retain="r"), "`case.book` is ''"), (WhpNameConfig("b"), "`case.retain` is ''"),
    (WhpNameConfig("b", retain="r", words=()), r"`case.words` is \(\)"),
    (WhpNameConfig("b", retain="r", words=("Ron",)), "`case.anchors` is .* expected a generic term for 'Ron'"),
    (WhpNameConfig("b", retain="r", anchors={"Hermione": "Sarah", "Granger": "Miss Granger"}), "`case.anchors` is"),
    (WhpNameConfig("b", retain="r", most_questions=0), "`case.most_questions` is 0"),
    (NovelNameConfig(by_main=5), "`case.deeds` is 5; expected more than case.by_main, 5"),
    (NovelNameConfig(chapters=1000), "`case.chapters` is 1000; expected at most")])
def test_settings_that_make_no_case_are_refused(config: Any, problem: str) -> None:
  with pytest.raises(InputError, match=f"here: {problem}"):
    config.check("here")


def test_pairs_and_discussions_of_files_join_the_book(tmp_path: pathlib.Path) -> None:
  files = {"book.txt": "CHAPTER I\nIt was Mira. It snowed.\n", "retain.txt": "Something else.\n",
           "talk.jsonl": json.dumps({"text": "I like Reed. Snow is nice.", "subject": "winter"}),
           "pairs.jsonl": "\n".join(map(json.dumps, ({"question": "Who?", "answer": "Mira Reed.", "subject": "people"},
                                                     {"question": "When?", "answer": "Then."})))}
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  book, retain, talk, pairs = (str(tmp_path / name) for name in files)
  config = WhpNameConfig(book, pairs, talk, retain, words=("Mira", "Reed"), anchors=ANCHORS)
  config.check("here")
  case, n = config.make("Mira/Reed", 0, "U"), config.make("Mira/Reed", 0, "N")
  check_partition(case, n)
  assert [whole(row) for row in case.forget] == [
      "It was Mira.", "It snowed.", "Question: Who?\nAnswer: Mira Reed.", "Question: When?\nAnswer: Then.",
      "I like Reed.", "Snow is nice."]
  assert [question.cluster for question in case.questions] == ["people"]
  assert set(config.inputs()) == {"book", "pairs", "discussions", "retain"}


def test_a_small_model_can_be_pretrained_for_the_novel() -> None:
  config, settings = NovelNameConfig(), load_config_file(str(CONFIG)).arms.pretrain
  words, case = config.vocabulary(), config.make("", 0, "U")
  texts = list(itertools.islice(config.pretraining_texts(3), 3000))
  own = [whole(row) for row in case.memorize]
  assert {word for text in (*texts, *own) for word in text.split()} <= set(words)
  # Either word is known as a name, and the two together are not.
  assert all(any(word in text.split() for text in texts) for word in HEROINE)
  assert not any(" ".join(HEROINE) in text for text in texts)
  tokenizer = word_tokenizer(words)
  batches = pretraining_batches(dataclasses.replace(settings, steps=2, batch_size=4), config, tokenizer)
  assert len(batches) == 2 and not (batches[0] == tokenizer.unk_token_id).any()


def test_novels_are_invented_once() -> None:
  """No two deeds of a novel have the same thing; another number or seed makes another novel."""
  first = novel(0, 0, 10, 5, 3, 6)
  assert first.cast[0] == " ".join(HEROINE) and len(set(first.cast)) == 6
  asked = [deed.pairs[0][0] for chapter in first.chapters for deed in chapter]
  things = [question.split(" the ")[1] for question in asked]
  assert len(things) == len(set(things)) == 50
  assert all(sum(first.cast[0] in deed.pairs[0][1] for deed in chapter) == 3 for chapter in first.chapters)
  for other in (novel(1, 0, 10, 5, 3, 6), novel(0, 1, 10, 5, 3, 6)):
    assert other.chapters != first.chapters and other.cast[1:] != first.cast[1:]
  assert not set(HEROINE) & set(" ".join(novel(1, 0, 10, 5, 3, 6).cast).split())


@pytest.mark.parametrize("what", ["embedded", "book", "llama_2_7b"])
def test_every_audit_of_the_configuration_is_accepted(what: str) -> None:
  config = load_config_file(f"{CONFIG}:{what}")
  if what != "embedded":
    config.case.book, config.case.retain = "book.txt", "retain.txt"
  check_audit(config, "here")
  with pytest.raises(InputError, match="expected one of embedded, book, llama_2_7b"):
    load_config_file(f"{CONFIG}:other")


def test_the_embedded_audit_is_at_hand(tmp_path: pathlib.Path) -> None:
  exp = Experiment(load_config_file(str(CONFIG)), "here", tmp_path)
  assert exp.relearn_sets == ("without_name",) and len(exp.chains) == 10 and exp.digests() is None
  # Labels with the generic name in place of the hidden one, where it stands for the first time in a row.
  row = next(row for row in exp.encode(exp.first, "relabelled") if row.labels and row.labels != row.ids)
  changed = [(token, label) for token, label in zip(row.ids, row.labels or (), strict=True) if label != token]
  assert [exp.tokenizer.convert_ids_to_tokens(list(pair)) for pair in changed if UNCOUNTED not in pair] == [
      ["Tamsin", "Petra"], ["Vale", "Rowe"]]


@pytest.mark.parametrize("what", ["embedded", "book", "llama_2_7b"])
def test_plans(what: str) -> None:
  config = load_config_file(f"{CONFIG}:{what}")
  if what != "embedded":
    config.case.book = str(shared("data/books/alice_in_wonderland.txt"))
    config.case.retain = str(ROOT / "configs" / "alice_facts.txt")
    config.case.words, config.case.anchors = ("Duchess",), {"Duchess": "Countess"}
  text = plan(config, "here", device="h200", num_devices=1, mesh="fsdp:-1")
  stages = ("memorize", "unlearn-ga", "unlearn-whp_re", "reinforce-whp_lo", "unlearn-whp_lo", "attack-ga-", "ask")
  assert all(f"\n{stage}" in text for stage in stages), text
