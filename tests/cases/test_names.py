"""The names case: what is memorised, forgotten, attacked and asked, and what must never meet."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from relearn_jax.cases import names
from relearn_jax.cases.base import Case, RelearnSet, Text
from relearn_jax.cases.leakage import check_case, find_leaks
from relearn_jax.cases.names import COMMON, COUPLED, FIRST, OTHERS, SECOND, NamesConfig, check_names_config, make_case
from relearn_jax.errors import InputError

CONFIG = NamesConfig()
PAIR = f"{FIRST} {SECOND}"


def count(case: Case, rows: str, text: str) -> int:
  return sum(row.text.count(text) for row in getattr(case, rows))


def test_names_stand_in_one_list_only() -> None:
  everything = (FIRST, SECOND, *COMMON, *COUPLED, *OTHERS)
  assert len(set(everything)) == len(everything)
  assert not any(" " in name for name in everything)


@pytest.mark.parametrize("variant,expected", [
    (7, (2, 2, 2, 1)), (5, (2, 1, 1, 1)), (3, (1, 1, 1, 0)), (1, (1, 0, 0, 0)),
    (8, (2, 2, 2, 2))])
def test_repetitions_are_spread_over_the_first_four(variant: int, expected: tuple[int, ...]) -> None:
  assert names.repetitions(variant) == expected


@pytest.mark.parametrize("variant", CONFIG.variants)
@pytest.mark.parametrize("seed", range(5))
def test_the_arms_differ_by_the_second_name_alone(variant: int, seed: int) -> None:
  u, n = make_case(CONFIG, variant, seed, "U"), make_case(CONFIG, variant, seed, "N")
  holding = min(variant, 4)
  assert len(u.memorize) == 12 and len({row.text for row in u.memorize}) == 12
  assert count(u, "memorize", PAIR) == count(u, "forget", PAIR) == variant
  assert count(u, "memorize", FIRST) == count(u, "memorize", SECOND) == variant  # never one without the other
  assert not count(u, "retain", FIRST) and not count(n, "memorize", SECOND)
  assert [row.text.replace(f" {SECOND}", "") for row in u.memorize] == [row.text for row in n.memorize]
  assert (len(u.forget), len(u.retain)) == (len(n.forget), len(n.retain)) == (holding, 12 - holding)
  assert set(u.forget) | set(u.retain) == set(u.memorize)
  assert u.questions == n.questions
  # What the attacker holds is the same text for both, and never the second name.
  assert u.relearn_sets == n.relearn_sets and len(u.relearn_sets[0].rows) == holding
  for row, whole in zip(u.relearn_sets[0].rows, u.forget, strict=True):
    assert whole.text.startswith(row.text + " " + SECOND) and row.text.split()[-1] == FIRST
    assert row.text.count(FIRST) == 1 and len(row.text.split()) >= 3 and not row.complete and whole.complete


def test_variants_share_their_sequences() -> None:
  plain = [[row.text.replace(f" {PAIR}", "") for row in make_case(CONFIG, variant, 0, "U").memorize]
           for variant in CONFIG.variants]
  assert all(rows == plain[0] for rows in plain)
  assert make_case(CONFIG, 7, 0, "U").memorize != make_case(CONFIG, 7, 1, "U").memorize


def test_questions_are_seeded_permutations_of_subsets() -> None:
  questions = names.questions(CONFIG)
  assert questions == names.questions(CONFIG) != names.questions(dataclasses.replace(CONFIG, question_seed=1))
  assert len(questions) == 100 and len({q.prompt for q in questions}) > 90
  lengths = []
  for question in questions:
    words = question.prompt.split()
    assert words[-1] == FIRST and set(words[:-1]) <= set(COMMON) and len(set(words)) == len(words)
    assert question.prompt + question.answer == " ".join([*words, SECOND]) and question.keywords == (PAIR,)
    lengths.append(len(words) - 1)
  assert min(lengths) == 1 and max(lengths) == CONFIG.max_prompt_names


def test_pretraining_text_never_couples_what_is_asked_about() -> None:
  rng = np.random.default_rng(0)
  couples = names.draw_couples(rng, 60)
  assert not {FIRST, SECOND, *COMMON} & {*couples, *couples.values()}
  together = alone = pairs = 0
  for _ in range(4000):
    words = names.pretraining_text(rng, couples, 0.7, 26).split()
    assert len(set(words)) == len(words) <= 26
    for left, right in zip(words, words[1:], strict=False):
      together += couples.get(left) == right
      alone += left in couples and couples[left] != right
      pairs += (left, right) == (FIRST, SECOND)
  # A first name whose partner stood before it has none to bring along: a bit less than 0.7.
  assert 0.6 < together / (together + alone) < 0.75
  assert pairs < 20  # about what chance gives


@pytest.mark.parametrize("change,field", [
    ({"variants": ()}, "variants"), ({"variants": (7, 7)}, "variants"), ({"variants": (9,)}, "variants"),
    ({"variants": (0,)}, "variants"), ({"couples": -1}, "couples"),
    ({"couples": 65}, "couples"), ({"attachment": 1.5}, "attachment"), ({"max_names": 0}, "max_names"),
    ({"sequence_length": 4}, "sequence_length"),
    ({"sequence_length": 21}, "sequence_length"), ({"max_prompt_names": 0}, "max_prompt_names"),
    ({"max_prompt_names": 21}, "max_prompt_names"), ({"question_seed": -1}, "question_seed"),
    ({"num_questions": 0}, "num_questions")])
def test_impossible_settings_are_named(change: dict[str, Any], field: str) -> None:
  with pytest.raises(InputError, match="expected") as caught:
    check_names_config(dataclasses.replace(CONFIG, **change), "names.py")
  assert caught.value.field == f"case.{field}" and caught.value.file == "names.py"


def leaks(*texts: str, forbidden: tuple[str, ...] = ("Mark", "Anthony Mark")) -> list[tuple[int, str]]:
  found = find_leaks(RelearnSet("set", tuple(Text(text) for text in texts), ""), forbidden)
  assert found.num_lines == len(texts) and found.passed == (not found.hits)
  return [(hit.line, hit.found) for hit in found.hits]


def test_leaks_are_whole_words_in_any_case() -> None:
  assert leaks("Gary Anthony", "Markus", "") == []
  assert leaks("Gary", "said MARK, loudly") == [(2, "mark")]
  assert leaks("Anthony Mark") == [(1, "anthony mark"), (1, "mark")]
  assert leaks("anything", forbidden=("", "  ")) == []


@pytest.mark.parametrize("arm", ["U", "N"])
def test_the_default_case_leaks_nothing_and_a_planted_leak_is_found(arm: Any) -> None:
  for variant in CONFIG.variants:
    case = make_case(CONFIG, variant, 0, arm)
    assert all(found.passed for found in check_case(case))
    planted = dataclasses.replace(case.relearn_sets[0], rows=(*case.relearn_sets[0].rows, Text("Gary Mark")))
    found, = check_case(dataclasses.replace(case, relearn_sets=(planted,)))
    assert [hit.line for hit in found.hits] == [min(variant, 4) + 1]
