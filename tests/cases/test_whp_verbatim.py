"""Verbatim passages: chunks, rows and facts of the invented novel and, where at hand, of a book."""

import dataclasses
import itertools
import pathlib
from typing import Any

import pytest

from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pretrained import pretraining_batches, word_tokenizer
from relearn_jax.cases.base import Case, Text
from relearn_jax.cases.books import all_ngrams, ngrams, read_book, sentences, windows
from relearn_jax.cases.leakage import check_case
from relearn_jax.cases.novel import FACTS, HEROINE, novel, told
from relearn_jax.cases.novel_world import NovelVerbatimConfig
from relearn_jax.cases.whp_verbatim import ExcerptSettings, WhpVerbatimConfig, draw_chunks, verbatim_case
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.metrics.scores import Asked, Stored, rouge_l
from relearn_jax.plan.command import plan

from ..command import ROOT
from ..small import shared

CONFIG = ROOT / "configs" / "whp_verbatim.py"


def check_partition(case: Case, n: Case, book: list[str], settings: ExcerptSettings) -> None:
  """What has to be true of the case of U and N, whatever the book."""
  start, size, half = settings.excerpt_start, settings.chunk_words, settings.chunk_words // 2
  excerpt = book[start:start + settings.excerpt_words]
  assert len(case.questions) == settings.chunks and case.metric == "rouge_l"
  starts = [int(question.id.removeprefix("word")) for question in case.questions]
  for at, question in zip(starts, case.questions, strict=True):
    assert (question.prompt.split(), question.answer.split()) == (excerpt[at:at + half], excerpt[at + half:at + size])
    assert question.answer.startswith(" ") and question.cluster == question.id and not question.keywords
  assert all(after - before >= size for before, after in itertools.pairwise(starts))
  # Every word of the excerpt is trained on, and no word of the rest is.
  assert [row.text for row in case.forget] == windows(excerpt, settings.row_words, settings.stride)
  end = start + settings.excerpt_words
  rest = windows(book[end:end + settings.retain_words], settings.row_words, settings.stride)
  assert case.retain and {row.text for row in case.retain} <= set(rest)
  assert not any(row.complete for row in (*case.forget, *case.retain))
  # The control has memorised the rest alone, and nothing of what is asked.
  assert case.memorize == (*case.forget, *case.retain) and n.memorize == n.retain == case.retain
  asked = all_ngrams((question.answer for question in case.questions), settings.shared_words)
  assert not asked & all_ngrams((row.text for row in n.memorize), settings.shared_words)
  (relearn,) = case.relearn_sets
  assert not ngrams(" ".join(excerpt), settings.shared_words) & all_ngrams(
      (row.prompt + row.text for row in relearn.rows), settings.shared_words)
  assert all(found.passed for found in check_case(case))
  assert (n.questions, n.relearn_sets, n.forget) == (case.questions, case.relearn_sets, case.forget)


def test_the_embedded_novel() -> None:
  config = NovelVerbatimConfig()
  config.check("here")
  case, n = config.make("excerpt", 0, "U"), config.make("excerpt", 0, "N")
  book = novel(0, 0, 10, 8, 3, 6)
  check_partition(case, n, told(book), config)
  rows = case.relearn_sets[0].rows
  deeds = sum(map(len, book.chapters))
  assert len(rows) == 6 * len(FACTS) + deeds == 48 + 80
  assert all(any(name in row.text for name in book.cast) for row in rows)
  assert config.make("excerpt", 1, "U") == case  # runs differ in the order of their rows
  other = dataclasses.replace(config, chunk_seed=1).make("excerpt", 0, "U")
  assert other.questions != case.questions and other.forget == case.forget


def test_the_public_domain_book() -> None:
  config = load_config_file(f"{CONFIG}:book").case
  config.book = str(shared("data/books/alice_in_wonderland.txt"))
  config.check("here")
  case, n = config.make("excerpt", 0, "U"), config.make("excerpt", 0, "N")
  check_partition(case, n, " ".join(read_book(config.book)).split(), config)
  assert case.forget[0].text.startswith("Alice was beginning to get very tired")
  assert set(config.inputs()) == {"book", "facts"}


def test_chunks_are_random_and_fill_an_excerpt_that_has_no_word_to_spare() -> None:
  tight = ExcerptSettings(excerpt_words=40, chunks=5, chunk_words=8, row_words=8, stride=4)
  excerpt = [f"w{i}" for i in range(40)]
  assert [question.id for question in draw_chunks(excerpt, tight)] == ["word0", "word8", "word16", "word24", "word32"]
  loose = [draw_chunks([f"w{i}" for i in range(60)], dataclasses.replace(tight, excerpt_words=60, chunk_seed=seed))
           for seed in range(200)]
  firsts = {int(questions[0].id.removeprefix("word")) for questions in loose}
  lasts = {int(questions[-1].id.removeprefix("word")) for questions in loose}
  assert min(firsts) == 0 and max(lasts) == 52 and len(firsts) > 8 and len(lasts) > 8


BOOK = [f"word{i}" for i in range(100)]
SMALL = ExcerptSettings(
    excerpt_words=32, retain_words=64, row_words=16, stride=8, chunks=2, chunk_words=16, shared_words=4)


def test_a_fact_that_shares_words_with_the_excerpt_is_refused() -> None:
  facts = [Text("Word7 and word8."), Text("He said “Word7, word8 - WORD9; word10!” at once.", line=5)]
  with pytest.raises(InputError, match=r"^5?:?.*`case.facts` shares 'word7 word8 word9 word10' with the excerpt"):
    verbatim_case("v", BOOK, facts, SMALL, "U")
  assert verbatim_case("v", BOOK, facts[:1], SMALL, "U").relearn_sets[0].rows == (facts[0],)
  assert verbatim_case("v", BOOK, facts, dataclasses.replace(SMALL, shared_words=5), "U").questions


def test_what_repeats_the_asked_words_is_not_retained() -> None:
  question = verbatim_case("v", BOOK, [Text("A fact.")], SMALL, "N").questions[0]
  again = [*BOOK[:60], *question.answer.split()[:4], *BOOK[64:]]
  case = verbatim_case("v", again, [Text("A fact.")], SMALL, "N")
  assert len(case.memorize) == 7 - 2 and "2 rows of the rest, which repeat it" in case.relearn_sets[0].provenance


def test_a_book_that_is_too_short_is_refused() -> None:
  with pytest.raises(InputError, match="`case.book` has 40 words; expected at least 48"):
    verbatim_case("v", BOOK[:40], [Text("A fact.")], SMALL, "U")


@pytest.mark.parametrize("change,problem", [
    ({"chunks": 0}, "`case.chunks` is 0"), ({"chunk_words": 7}, "`case.chunk_words` is 7; expected an even number"),
    ({"chunks": 31}, "`case.excerpt_words` is 2400; expected at least 2480: 31 chunks"),
    ({"row_words": 79}, "`case.row_words` is 79; expected at least chunk_words, 80"),
    ({"stride": 161}, "`case.stride` is 161"), ({"excerpt_start": -1}, "`case.excerpt_start` is -1"),
    ({"book": ""}, "`case.book` is ''"), ({"facts": ""}, "`case.facts` is ''")])
def test_settings_that_make_no_case_are_refused(change: dict[str, Any], problem: str) -> None:
  good = WhpVerbatimConfig(book="b.txt", facts="f.txt")
  good.check("here")
  with pytest.raises(InputError, match=f"here: {problem}"):
    dataclasses.replace(good, **change).check("here")


def test_a_small_model_can_be_pretrained_for_the_novel() -> None:
  config, settings = NovelVerbatimConfig(), load_config_file(str(CONFIG)).arms.pretrain
  words, case = config.vocabulary(), config.make("excerpt", 0, "U")
  assert len(words) == len(set(words))
  texts = list(itertools.islice(config.pretraining_texts(3), 3000))
  own = [row.text for row in (*case.memorize, *case.relearn_sets[0].rows)]
  assert {word for text in (*texts, *own) for word in text.split()} <= set(words)
  name = " ".join(HEROINE)
  assert any(name in text for text in own) and not any(name in text for text in texts)
  assert not set(texts) & {row.text for row in case.memorize}
  tokenizer = word_tokenizer(words)
  batches = pretraining_batches(dataclasses.replace(settings, steps=2, batch_size=4), config, tokenizer)
  assert len(batches) == 2 and not (batches[0] == tokenizer.unk_token_id).any()


def test_rouge_tells_the_excerpt_from_what_else_the_novel_says() -> None:
  """The level at which a model counts as unlearned lies above that of the rest of the book, and far below 1."""
  config = load_config_file(str(CONFIG))
  case = config.case.make("excerpt", 0, "N")
  score = lambda question, said: rouge_l(
      Asked(question.id, question.prompt, question.answer, (), question.cluster), Stored(said, 0.0, ""))
  others = [score(question, " ".join(row.text.split()[:40])) for question in case.questions for row in case.retain]
  assert all(score(question, question.answer) == 1 for question in case.questions)
  assert 0.1 < sum(others) / len(others) < config.unlearn.max_score < 0.5


@pytest.mark.parametrize("what", ["embedded", "book", "llama_2_7b"])
def test_every_audit_of_the_configuration_is_accepted(what: str) -> None:
  config = load_config_file(f"{CONFIG}:{what}")
  if what != "embedded":
    config.case.book, config.case.facts = "book.txt", config.case.facts or "facts.txt"
  check_audit(config, "here")
  with pytest.raises(InputError, match="expected one of embedded, book, llama_2_7b"):
    load_config_file(f"{CONFIG}:other")


def test_the_embedded_audit_is_at_hand(tmp_path: pathlib.Path) -> None:
  config = load_config_file(str(CONFIG))
  exp = Experiment(config, "here", tmp_path)
  assert exp.relearn_sets == ("facts",) and len(exp.chains) == 6 and exp.digests() is None
  assert {(len(prompt), len(answer)) for prompt, answer in exp.asked} == {(41, 40)}  # BOS, and a token a word
  assert config.ask.max_new_tokens == 40


@pytest.mark.parametrize("what", ["embedded", "book", "llama_2_7b"])
def test_plans(what: str) -> None:
  config = load_config_file(f"{CONFIG}:{what}")
  if what != "embedded":
    config.case.book = str(shared("data/books/alice_in_wonderland.txt"))
    config.case.facts = config.case.facts or str(ROOT / "configs" / "alice_facts.txt")
  text = plan(config, "here", device="h200", num_devices=1, mesh="fsdp:-1")
  stages = ("memorize", *(f"unlearn-{method}" for method in config.unlearn.methods), "attack-ga-", "ask")
  assert all(f"\n{stage}" in text for stage in stages), text


@pytest.mark.parametrize("text,found", [
    ("`Oh!' said Mr. Vale.  “Come in?” J. R. left... Now what", ["`Oh!' said Mr. Vale.", "“Come in?”", "J. R. left...",
                                                                "Now what"]),
    ("One", ["One"]), ("a 1.5 b. c", ["a 1.5 b. c"])])
def test_sentences(text: str, found: list[str]) -> None:
  assert sentences(text) == found


def test_a_book_is_read_by_its_chapters(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "book.txt"
  path.write_text("TITLE: A Book\n\nCHAPTER I. The first\n=( A motto )=\nIt  rained\n  and rained.\n\nChapter 2\n"
                  "Then not.")
  assert read_book(str(path)) == ["It rained and rained.", "Then not."]
  path.write_text("No heading.\nBut text.\n")
  assert read_book(f"file:{path}") == ["No heading. But text."]
  path.write_text("CHAPTER I\n")
  with pytest.raises(InputError, match="book.txt: `text` has no text"):
    read_book(str(path))


def test_windows_cover_every_word() -> None:
  assert windows("abcdefg", 3, 2) == ["a b c", "c d e", "e f g"]
  assert windows("abcdef", 3, 2) == ["a b c", "c d e", "d e f"] and windows("ab", 3, 2) == ["a b"]
