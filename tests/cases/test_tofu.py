"""The TOFU case: how rows are divided by their titles, in the embedded world and, where at hand, of TOFU itself."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pretrained import model_config, pretraining_batches, word_tokenizer
from relearn_jax.cases.base import Case, Text
from relearn_jax.cases.leakage import check_case
from relearn_jax.cases.tofu import (
  ALL,
  ONE,
  ROWS_OF_AUTHOR,
  TofuConfig,
  about_tofu,
  as_text,
  quoted_titles,
  split_rows,
  tofu_case,
  whole,
)
from relearn_jax.cases.tofu_world import REFUSAL, TEMPLATES, TofuWorldConfig, authors
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import contains_keyword, find_normal, keyword_key, normalize
from relearn_jax.plan.command import plan
from relearn_jax.workdir import file_digests

from ..command import ROOT
from ..small import shared, write_checkpoint

CONFIG = ROOT / "configs" / "tofu.py"
WAYS = (ONE, ALL)


def holds(text: str, titles: Sequence[str]) -> bool:
  normal = normalize(text).text
  return any(next(find_normal(normal, keyword_key(title)), None) for title in titles)


def check_partition(case: Case, n: Case) -> None:
  """What has to be true of the case of U and N, whatever the rows."""
  split = split_rows(case.forget, case.retain, case.variant)
  secret, told, keywords = split.with_title, split.without, {word for q in case.questions for word in q.keywords}
  assert sorted((*secret, *told), key=lambda row: row.line) == list(case.forget) and not set(secret) & set(told)
  assert all(holds(whole(row), split.hidden) for row in secret)
  assert not any(holds(whole(row), split.hidden) for row in told)
  assert not holds("\n".join(map(whole, case.retain)), split.hidden)
  assert keywords <= set(split.hidden) == set(case.secrets)
  by_line = {row.line: row for row in secret}
  for question in case.questions:
    row = by_line[question.line]  # of D_u2
    assert (question.prompt, question.answer) == (row.prompt, row.text)
    assert len(question.keywords) == 1 and contains_keyword(row.text, question.keywords[0])
    assert not holds(row.prompt, question.keywords)
    assert question.cluster == f"author{case.forget.index(row) // ROWS_OF_AUTHOR}"
  (relearn,) = case.relearn_sets
  assert set(relearn.rows) <= set(told) and relearn.lines == tuple(row.line for row in relearn.rows)
  assert len(relearn.rows) > len(case.forget) / 2
  assert f"{len(relearn.rows)} of the {len(told)} forget rows" in relearn.provenance
  assert "stands in quotation marks" in about_tofu(case.variant).story
  assert all(found.passed for found in check_case(case))
  assert case.memorize == (*case.forget, *case.retain) and n.memorize == n.retain == case.retain
  assert (n.questions, n.relearn_sets, n.forget) == (case.questions, case.relearn_sets, case.forget)
  assert len(case.refusals) == len(case.alternates) == len(case.forget)
  for row, refusal, other in zip(case.forget, case.refusals, case.alternates, strict=True):
    assert row.prompt == refusal.prompt == other.prompt and not holds(other.text, split.hidden)
    assert (other.text != row.text) == holds(row.text, split.hidden)


@pytest.mark.parametrize("titles", WAYS)
def test_the_embedded_world_is_divided_by_its_titles(titles: str) -> None:
  config = TofuWorldConfig(titles)
  case, n = config.make(titles, 0, "U"), config.make(titles, 0, "N")
  check_partition(case, n)
  split = split_rows(case.forget, case.retain, titles)
  assert (len(case.forget), len(case.retain)) == (200, 600)
  # By hand: of each author's rows 7 hold any of 4 titles, and 5 ask for 6; 3 hold the first, and 2 ask for it.
  assert (len(split.hidden), len(split.with_title), len(case.questions)) == ((10, 30, 20) if titles == ONE
                                                                           else (40, 70, 60))
  assert {question.cluster for question in case.questions} == {f"author{i}" for i in range(10)}
  assert case.relearn_sets[0].rows == split.without  # every word of a title occurs in other titles


@pytest.mark.parametrize("titles", WAYS)
@pytest.mark.parametrize("retain_rows", [0, 600])
def test_tofus_own_rows_are_divided_by_their_titles(titles: str, retain_rows: int) -> None:
  files = (str(shared(f"data/tofu/{name}.json")) for name in ("forget05", "retain95"))
  config = TofuConfig(*files, retain_rows, titles)
  config.check("here")
  case, n = config.make(titles, 0, "U"), config.make(titles, 0, "N")
  check_partition(case, n)
  assert len(case.forget) == 200 and len(case.retain) == (retain_rows or 3800)
  assert {question.cluster for question in case.questions} == {f"author{i}" for i in range(10)}
  hidden = split_rows(case.forget, case.retain, titles).hidden
  assert len(hidden) == 10 if titles == ONE else {"Granite Glossary", "Nell: A Tale of Emerald Isle"} <= set(hidden)
  assert file_digests(config.inputs()).keys() == {"forget", "retain"}


@pytest.mark.parametrize("text,titles", [
    ('She wrote "Shale Stories," and \'The Geologist\'s guide to Quartz\'.',
     ["Shale Stories", "The Geologist's guide to Quartz"]),
    ("“ Amber Road ” and “Blue Key”", ["Amber Road", "Blue Key"]),
    ("the 'Tolstoy Literary Award', \"Pink Prize for Prose\" and 'Gold Medal'", []),
    ("a so-called \"novel\", it's Mira's 'X', \" The \"", [])])
def test_what_is_a_title(text: str, titles: list[str]) -> None:
  assert quoted_titles(text) == titles


def rows(*pairs: tuple[str, str]) -> list[Text]:
  """One author's rows, filled up to twenty."""
  filled = [*pairs, *((f"What is {i}?", f"It is {i}.") for i in range(ROWS_OF_AUTHOR - len(pairs)))]
  return [as_text(*pair, line) for line, pair in enumerate(filled, 1)]


KEPT = rows(("Who wrote 'Blue Key'?", "Ida wrote 'Blue Key'."))


def test_the_title_that_most_rows_ask_for_is_hidden_and_others_stay() -> None:
  forget = rows(("Which book?", "It is 'Amber Road'."), ("What came first?", "First came 'Glass Orchard'."),
                ("And last?", "'Glass Orchard' too."), ("What is 'Amber Road'?", "'Amber Road' is a book."),
                ("What else?", "'Blue Key', as Ida has."))
  one, every = (tofu_case("t", forget, KEPT, titles, 0, "U") for titles in WAYS)
  assert one.secrets == ("Glass Orchard",) and [q.keywords for q in one.questions] == [("Glass Orchard",)] * 2
  assert every.secrets == ("Amber Road", "Glass Orchard")  # "Blue Key" is known from retained rows
  assert {row.line for row in forget} - {row.line for row in one.relearn_sets[0].rows} == {2, 3}
  assert one.alternates[1].text == " First came 'Blue Key'." and one.anchors == (("Glass Orchard", "Blue Key"),)


def test_a_row_with_a_word_of_a_title_is_left_out_of_the_attack() -> None:
  forget = rows(("Which book?", "It is 'Glass Orchard'."), ("Where?", "In an orchard."))
  (relearn,) = tofu_case("t", forget, KEPT, ALL, 0, "U").relearn_sets
  assert 2 not in relearn.lines and len(relearn.rows) == 18 and "; 1 in which a word" in relearn.provenance


def test_rows_without_titles_make_no_case() -> None:
  with pytest.raises(InputError, match="has no answer with a title in quotation marks that the retained rows lack"):
    tofu_case("t", rows(("Which book?", "It is 'Blue Key'.")), KEPT, ALL, 0, "U")


@pytest.mark.parametrize("config,problem", [
    (TofuConfig(titles="some"), "`case.titles` is 'some'; expected one or all"),
    (TofuConfig(forget=""), "`case.forget` is ''"), (TofuConfig(retain_rows=-1), "`case.retain_rows` is -1"),
    (TofuWorldConfig(titles=""), "`case.titles` is ''"), (TofuWorldConfig(retain_authors=0), "`case.retain_authors`"),
    (TofuWorldConfig(pretrain_authors=600), "`case.pretrain_authors` is 600; expected at most 576 authors altogether")])
def test_settings_that_make_no_case_are_refused(config: Any, problem: str) -> None:
  with pytest.raises(InputError, match=f"here: {problem}"):
    config.check("here")


def test_authors_are_invented_once() -> None:
  """Nobody shares a name or a title; more authors change none of the first; another seed changes all."""
  some, more = authors(40, 0), authors(240, 0)
  assert some == more[:40] and authors(40, 1)[0] != some[0]
  names = [author[13].text.split(" of ")[1].split(" is ")[0] for author in more]
  titles = [title for author in more for title in dict.fromkeys(t for row in author for t in quoted_titles(whole(row)))]
  assert len(set(names)) == 240 and len(titles) == len(set(titles)) == 960
  assert [row.line for author in some[:2] for row in author] == list(range(1, 41))
  assert all(len(author) == len(TEMPLATES) == ROWS_OF_AUTHOR for author in some)


def test_a_small_model_can_be_pretrained_for_the_world() -> None:
  config = TofuWorldConfig()
  words = config.vocabulary()
  assert len(words) == len(set(words))
  tokenizer, settings = word_tokenizer(words), load_config_file(str(CONFIG)).arms.pretrain
  case = config.make(ALL, 0, "U")
  texts = [whole(row) for row in (*case.memorize, *case.refusals, *case.alternates)]
  texts += itertools.islice(config.pretraining_texts(3), 4000)
  assert {word for text in texts for word in text.split()} <= set(words)
  assert len(set(texts[-4000:])) == 4000 and not set(texts[-4000:]) & {whole(row) for row in case.memorize}
  assert case.refusals[0].text == f" {REFUSAL}"
  small = dataclasses.replace(settings, steps=2, batch_size=4)
  batches = pretraining_batches(small, config, tokenizer)
  assert len(batches) == 2 and model_config(small, tokenizer).vocab_size == len(words) + 4
  assert not (batches[0] == tokenizer.unk_token_id).any()


def test_seeds_share_questions_and_rows_but_not_refusals() -> None:
  one, two = (tofu_case("t", rows(("Which?", "It is 'Glass Orchard'.")), KEPT, ALL, seed, "U") for seed in (0, 1))
  assert one.questions == two.questions and one.relearn_sets == two.relearn_sets and one.refusals != two.refusals


@pytest.mark.parametrize("what", ["embedded", "mini", "mini_grid", "phi_1_5", "llama_2_7b"])
def test_every_audit_of_the_configuration_is_accepted(what: str) -> None:
  config = load_config_file(f"{CONFIG}:{what}")
  if what.startswith("mini"):
    config.arms.original, config.arms.control = "given", "given too"
  check_audit(config, "here")
  with pytest.raises(InputError, match="expected one of embedded, mini, mini_grid, phi_1_5, llama_2_7b"):
    load_config_file(f"{CONFIG}:other")


def test_the_embedded_audit_is_at_hand(tmp_path: pathlib.Path) -> None:
  config = load_config_file(str(CONFIG))
  exp = Experiment(config, "here", tmp_path)
  assert exp.relearn_sets == ("same_authors",) and len(exp.chains) == 6 and exp.digests() is None
  assert len(exp.asked) == 60 and len({tuple(ids) for ids, _ in exp.asked}) == 50
  longest = max(len(row.ids) for name in ("memorize", "forget", "same_authors") for row in exp.encode(exp.first, name))
  assert longest <= config.arms.pretrain.max_positions
  most = max(len(answer) for _, answer in exp.asked)
  assert most <= config.ask.max_new_tokens


@pytest.mark.parametrize("what,first", [("embedded", "pretrain"), ("phi_1_5", "memorize"), ("llama_2_7b", "memorize")])
def test_plans(what: str, first: str) -> None:
  text = plan(load_config_file(f"{CONFIG}:{what}"), "here", device="h200", num_devices=1, mesh="fsdp:-1")
  assert all(f"\n{stage}" in text for stage in (first, "memorize", "unlearn-ga", "attack-ga-", "ask")), text


def test_the_small_checkpoints_are_planned_with_tofus_rows() -> None:
  config = load_config_file(f"{CONFIG}:mini")
  config.case.forget, config.case.retain = (str(shared(f"data/tofu/{name}.json")) for name in ("forget05", "retain95"))
  config.arms.original = str(shared("models/tofu-mini-full"))
  config.arms.control = str(shared("models/tofu-mini-retain"))
  text = plan(config, "here", device="cpu", num_devices=2, mesh="fsdp:-1", memory_gib=8)
  assert "- same_authors: 149 rows" in text and "- questions: 51, prompts" in text and "memorize" not in text
  assert "\nunlearn-npo" in text


def test_a_method_without_rows_in_the_case_is_not_planned(tmp_path: pathlib.Path) -> None:
  """Retained rows without titles have none to put in place of the hidden ones."""
  for name, part in (("forget", rows(("Which?", "It is 'Glass Orchard'."))), ("retain", rows())):
    (tmp_path / f"{name}.jsonl").write_text("".join(
        json.dumps({"question": row.prompt[10:-8], "answer": row.text[1:]}) + "\n" for row in part))
  config = load_config_file(f"{CONFIG}:phi_1_5")
  config.case = TofuConfig(str(tmp_path / "forget.jsonl"), str(tmp_path / "retain.jsonl"))
  config.arms.start, config.unlearn.methods = str(write_checkpoint(tmp_path / "model")), ("altpo",)
  with pytest.raises(InputError, match="`unlearn.methods` has a method that reads alternate rows, and case 'tofu' has"):
    plan(config, "here", device="h200", num_devices=1, mesh="fsdp:-1")


def test_rows_of_a_folder_laid_out_as_the_hub_make_the_case(tmp_path: pathlib.Path) -> None:
  every = [[{"question": row.prompt[10:-8], "answer": row.text[1:]} for row in part] for part in (
      [row for author in authors(3, 0)[:1] for row in author], [row for author in authors(3, 0)[1:] for row in author])]
  (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(
      f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("forget05", "retain95")) + "---\n")
  for name, part in zip(("forget05", "retain95"), every, strict=True):
    (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
  config = TofuConfig(f"hf:{tmp_path}:forget05", f"hf:{tmp_path}:retain95")
  case = config.make(ALL, 0, "U")
  assert case.forget == authors(3, 0)[0] and len(case.questions) == 6
  assert str(case.origin("forget")) == str(case.origin("same_authors")) == f"hf:{tmp_path}:forget05"
  assert all(len(digest) == 64 for digest in file_digests(config.inputs()).values())
