"""Control sets: as large as the relearn set, and each without what it is to be without."""

import dataclasses
import pathlib

import pytest

from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.cases.base import Case, Question, RelearnSet, Text
from relearn_jax.cases.content import content_words
from relearn_jax.cases.control_sets import KINDS, Stock, control_set
from relearn_jax.cases.leakage import check_case
from relearn_jax.errors import InputError

from ..audit.tiny import tiny_names

ROWS = (Text("Yesterday the old baker Ada Finch sold bread in Norwick, and Ada was glad.", complete=False),
        Text(" It was Ada Finch.", prompt="Question: Who sold the bread in Norwick?\nAnswer:"),
        Text("In Norwick people say that Finch bakes best."))
SET = RelearnSet("rows", ROWS, "")
STOCK = Stock(count=lambda text: len(text.split()), generic=("Rain fell on the hills.", "A secret Vale lies there."),
              forbidden=frozenset(["vale"]))
whole = lambda row: row.prompt + row.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_set_has_as_many_rows_of_as_many_tokens(kind: str) -> None:
  found = control_set(kind, SET, STOCK)
  size = sum(len(whole(row).split()) for row in ROWS)
  assert found.name == f"control-{kind}"
  assert f"3 rows with {size} tokens, beside 3 with {size}" in found.provenance
  for ours, theirs in zip(found.rows, ROWS, strict=True):
    assert ours.complete == theirs.complete and ours != theirs
    for field in ("prompt", "text"):
      assert STOCK.count(getattr(ours, field)) == STOCK.count(getattr(theirs, field))
  other = {control_set(kind, SET, STOCK, seed=seed).rows for seed in range(4)}
  assert found == control_set(kind, SET, STOCK) and (len(other) > 1) == (kind != "unrelated")  # it has one text
  letters = dataclasses.replace(STOCK, count=len)  # tokens that words do not end with: never more of them
  for ours, theirs in zip(control_set(kind, SET, letters).rows, ROWS, strict=True):
    assert 0.6 * len(whole(theirs)) < len(whole(ours)) <= len(whole(theirs))


def test_what_each_kind_changes() -> None:
  rows = {kind: [whole(row) for row in control_set(kind, SET, STOCK).rows] for kind in KINDS}
  plain = set(" ".join(map(whole, ROWS)).lower().split())
  assert not plain & set(" ".join(rows["gibberish"]).split())
  assert set(" ".join(rows["unrelated"]).split()) == set("Rain fell on the hills.".split())
  # "Yesterday", "In" and "It" begin sentences, "Question" and "Answer" are in form like those that do.
  first, second, third = rows["same_syntax"]
  ada, finch, norwick = (word.strip("?.,") for word in (*first.split()[4:6], first.split()[9]))
  assert first == f"Yesterday the old baker {ada} {finch} sold bread in {norwick}, and {ada} was glad."
  assert second == f"Question: Who sold the bread in {norwick}?\nAnswer: It was {ada} {finch}.".replace("\n", " ")
  assert third == f"In {norwick} people say that {finch} bakes best."
  assert not {ada, finch, norwick} & {"Ada", "Finch", "Norwick"} and len({ada, finch, norwick}) == 3
  for ours, theirs in zip(rows["same_topic"], ROWS, strict=True):
    assert set(content_words(ours)) == set(content_words(whole(theirs))) and ours != whole(theirs)
    assert not {"the", "was", "and"} & set(ours.lower().split())


def test_words_that_are_hidden_are_in_no_set_and_words_are_of_the_vocabulary() -> None:
  stock = dataclasses.replace(STOCK, vocabulary=("Vale", "Tamsin", "stone", "grass"), forbidden=frozenset(["vale"]))
  said = {word for kind in ("gibberish", "same_syntax") for row in control_set(kind, SET, stock).rows
          for word in whole(row).split()}
  assert "Vale" not in said and {"stone", "grass", "Tamsin"} <= said


@pytest.mark.parametrize("kind,rows,stock,problem", [
    ("unrelated", ROWS, dataclasses.replace(STOCK, generic=()), "there is no generic text"),
    ("unrelated", ROWS, dataclasses.replace(STOCK, generic=("The Vale.",)), "no generic text without the words"),
    ("same_syntax", (Text("nobody has a name"),), STOCK, "the relearn set has no name"),
    ("same_syntax", ROWS, dataclasses.replace(STOCK, vocabulary=("Ada", "stone")), "has no other names")])
def test_a_set_that_cannot_be_made_is_refused(kind: str, rows: tuple[Text, ...], stock: Stock, problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    control_set(kind, RelearnSet("rows", rows, ""), stock)


def test_an_audit_attacks_with_control_sets_and_learns_none_of_them(tmp_path: pathlib.Path) -> None:
  config = tiny_names(attack__controls=KINDS, ask__generic="pretraining", ask__score_rows=5)
  check_audit(config, "here")
  exp, plain = Experiment(config, "here", tmp_path), Experiment(tiny_names(), "here", tmp_path)
  assert exp.relearn_sets == ("prefixes", *(f"control-{kind}" for kind in KINDS)) and len(exp.generic) == 5
  assert exp.memorized_keys == plain.memorized_keys  # a grid that gets control sets keeps its models
  for case in exp.all_cases():
    sizes = {name: sum(len(row.ids) for row in exp.encode(case, name)) for name in exp.relearn_sets}
    assert len(set(sizes.values())) == 1, sizes  # one budget, to the token
    assert all(found.passed for found in check_case(case))
  for change, field in (({"attack__controls": ("gibberish", "gibberish")}, "attack.controls"),
                        ({"attack__controls": ("nonsense",)}, "attack.controls"),
                        ({"ask__generic": "pretraining", "arms__start": "model"}, "ask.generic")):
    with pytest.raises(InputError, match=f"`{field}`"):
      check_audit(tiny_names(**change), "here")


def test_eight_words_of_an_answer_are_a_leak_unless_everybody_is_told_them() -> None:
  answer = " one two three four five six seven eight nine"
  question = Question("q", "What comes after zero?", answer, (), "q")
  row = Text("Zero, two three four five six seven; eight nine: and so on.")
  case = Case("", "", (), (), (), (RelearnSet("rows", (Text("Seven or eight."), row), ""),), (question,))
  (found,) = check_case(case)
  assert [(hit.line, hit.found, hit.how, hit.certain) for hit in found.hits] == [
      (2, "two three four five six seven eight nine", "8 words of an answer", True)]
  # Of ten content words, zero to nine and "comes", the second row has eight.
  assert found.overlap is not None and found.overlap.line == 2 and found.overlap.question == "q"
  assert found.overlap.share == pytest.approx(8 / 10, abs=0.11)
  told = dataclasses.replace(case, retain=(Text("He counted two three four five six seven eight nine"),))
  assert check_case(told)[0].passed
  shorter = dataclasses.replace(case, relearn_sets=(RelearnSet("rows", (Text("two three four five six seven"),), ""),))
  assert check_case(shorter)[0].passed
