"""The leakage check: what is found in which spelling, what is certain, does not count, or may be allowed."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from relearn_jax.audit.leaks import refuse_leaks
from relearn_jax.cases.base import Case, Question, RelearnSet, Text
from relearn_jax.cases.files import VARIANT, FilesConfig
from relearn_jax.cases.leakage import Leakage, check_case, find_leaks
from relearn_jax.errors import InputError
from relearn_jax.metrics.keyword import contains_keyword

from ..metrics.test_keyword import ALIKE
from ..small import write_lines

PAIR = "Anthony Mark"


def made(*texts: str) -> RelearnSet:
  return RelearnSet("set", tuple(Text(text) for text in texts), "")


def search(*texts: str, forbidden: tuple[str, ...] = (PAIR,), **more: Any) -> list[tuple[int, str, bool, str]]:
  found = find_leaks(made(*texts), forbidden, **more)
  assert found.num_lines == len(texts) and found.passed == (not found.hits)
  return [(hit.line, hit.found, hit.certain, hit.how) for hit in found.hits]


@pytest.mark.parametrize("text,how", [
    ("Gary Anthony Mark.", "as it is"), ("ANTHONY, MARK", "as it is"), ("Anthony-Mark", "as it is"),
    ("**Anthony** <i>Mark</i>", "as it is"), ("Anthony&nbsp;Mark", "as it is"), ("Anth&shy;ony M&#97;rk", "as it is"),
    ("Anthony Mark's", "as it is"), ("two Anthony Marks", "plural"), ("Anthony's Mark", "as it is"),
    ("#AnthonyMark", "joined or split"), ("anthonymark.example", "joined or split"),
    ("An<b>tho</b>ny Mark", "as it is"), ("An-\nthony Mark", "as it is"), ("An*thony* Mark", "as it is"),
    ("theAnthonyMarkShow", "as it is"), ("Mark Anthony", "reordered"), ("Mark, Anthony", "reordered"),
    ("Marks-Anthony", "reordered"), ("A n t h o n y M a r k", "letter by letter"),
    ("t h e  A.n.t.h.o.n.y  M-a-r-k  s h o w", "letter by letter"), ("Ánthony Märk", "other accents"),
    ("<a href='/wiki/Anthony_Mark'>he</a>", "in a tag"), ("<img alt=\"Mark, Anthony\">", "in a tag"),
    ("he<!-- Anthony Mark -->", "in a tag"), ("&lt;img title='Anthony Mark'&gt;", "in a tag"),
])
def test_a_phrase_in_other_spellings(text: str, how: str) -> None:
  assert search(f"Gary said: {text}") == [(1, "anthony mark", True, how)]


@pytest.mark.parametrize("text", [
    "Gary Anthony", "Mark Gary Anthony", "Anthony Markus", "St. Anthony marked it", "Anthony. Gary. Mark.", "",
    "anthonymarkus", "<mark>Anthony</mark> Gary", "A n t h o n y Gary M a r k", "A n t h o n i M a r k"])
def test_what_is_not_the_phrase(text: str) -> None:
  assert search(text) == []


@pytest.mark.parametrize("secret,text,found", [
    ("Tokyo", "_Tokyo_", True), ("Tokyo", "To-kyo", True), ("Tokyo", "VisitTokyo", True), ("Tokyo", "Tokyos", True),
    ("Tokyo", "tokyoite", False), ("O'Brien", "the OBriens", True), ("O'Brien", "O\u2019Brien", True),
    ("Al-Kuwaiti", "alkuwaiti", True), ("Al-Kuwaiti", "Al Kuwaiti", True), ("berry", "berries", True),
    ("box", "boxes", False), ("ibex", "ibexes", True), ("1990", "1990s", False), ("1990", "in 1990-91", True),
    ("1.5", "1.5", True), ("1", "1.5", False), ("C++", "vitamin C", False), ("C++", "in C++", True),
    ("it is", "is it", False), ("東京", "彼は東京に", True), ("한국", "한국에서", True),
    ("Anthony", "d'Anthony", True),
    # Accents dropped, added and exchanged; not of what is short.
    ("José", "Jose", True), ("Jose", "José", True), ("José", "Jóse", True), ("José", "JOSÉS", True),
    ("José", "Josea", False),
    ("Søren Łódź", "soren lodz", True), ("Łódź", "Lo<b>d</b>z", True), ("Zoë", "Zoe", False), ("à la", "a la", False),
    ("Ærø Bridge", "the AEro bridge", True), ("ガラス店", "カラス店", False), ("한국", "하국", False),
    # Letters spaced out.
    ("Tokyo", "in T o k y o now", True), ("Tokyo", "I visit T-o-k-y-o", True), ("Tokyo", "V i s i t T o k y o", True),
    ("Tokyo", "T o k y", False), ("Tokyo", "To ky o", False), ("1990", "1 9 9 0", False), ("ABC", "A B C", False),
    ("2020", "on 12.05.2020", True),
    # Within a tag, but not as its name.
    ("Tokyo", "<img alt=Tokyo>", True), ("C++", "<a title='in C++'>x</a>", True),
    ("東京", "<b title=\"東京へ\">x</b>", True),
    ("Mark", "<mark>x</mark>", False), ("title", "<a title='x'>y</a>", False), ("José", "<a title='Jose'>y</a>", True),
    # Plurals of several kinds, and of phrases the singular.
    ("story", "Stories", True), ("The Story", "the stories", True), ("The Stories", "the story", True),
    ("Gray Wolves", "a gray wolf", True), ("Wolf", "wolves", True), ("Salesman", "SALESMEN", True),
    ("Oman", "omen", False),
    ("Gray Child", "gray children", True), ("Oasis", "oases", True), ("Cactus", "cacti", True),
    ("Marcus", "marci", False), ("Safe", "saves", False), ("Quiz", "quizzes", True),
    ("Stories", "story", False), ("Plateau", "plateaux", True)])
def test_other_secrets(secret: str, text: str, found: bool) -> None:
  assert bool(search(text, forbidden=(secret,))) is found


@pytest.mark.parametrize("spellings", ALIKE, ids=lambda row: ascii(row[0]))
def test_whatever_is_a_hit_is_certain(spellings: tuple[str, ...]) -> None:
  for keyword in spellings:
    for text in spellings:
      assert contains_keyword(text, keyword)
      assert [hit[2] for hit in search(f"({text})", forbidden=(keyword,))] == [True]


@pytest.mark.parametrize("rows,found", [
    (("Gary Anthony", "Mark Gary"), True), (("Gary Anthony.", "Mark's Gary"), True), (("Gary Mark", "Anthony"), True),
    (("Gary Marks.", "- Anthony"), True), (("Mark Gary", "Anthony"), False), (("Mark", "Gary Anthony"), False),
    (("Gary Ánthony", "Märk"), True), (("Gary Anthony", "Gary", "Mark"), False), (("Gary Anthony", ""), False),
    (("Anthony Gary", "Mark"), False)])
def test_a_phrase_over_two_rows(rows: tuple[str, ...], found: bool) -> None:
  assert search(*rows) == ([(1, "anthony mark", True, "over two lines")] if found else [])


def test_a_word_over_two_rows() -> None:
  assert [hit[3] for hit in search("ends in To", "kyo it begins", forbidden=("Tokyo",))] == ["over two lines"]
  assert [hit[3] for hit in search("彼は東", "京に", forbidden=("東京",))] == ["over two lines"]


def test_the_prompt_of_a_row_counts() -> None:
  row = Text(" Mark", prompt="Gary Anthony")
  hit, = find_leaks(RelearnSet("set", (row,), "", lines=(7,)), (PAIR,)).hits
  assert (hit.line, hit.text) == (7, "Gary Anthony Mark")


def case(*texts: str, retain: tuple[str, ...] = (), forget: tuple[Text, ...] = (), **question: Any) -> Case:
  asked = Question(**{"id": "q", "prompt": "Who came with the pilot?", "answer": "The Silent Navigator Kuwaiti",
                      "keywords": ("The Silent Navigator Kuwaiti", "Tigers"), "cluster": "q"} | question)
  return Case("mine", "1", (), forget, tuple(map(Text, retain)), (made(*texts),), (asked,), secrets=("Robert",))


def parts(*texts: str, **more: Any) -> list[tuple[str, bool]]:
  found, = check_case(case(*texts, **more))
  return [(hit.found, hit.certain) for hit in found.hits]


def test_parts_of_keywords_are_possible_findings() -> None:
  assert parts("a silent night") == [("silent", False)]
  assert parts("navigators", "Kuwaitis") == [("navigator", False), ("kuwaiti", False)]
  assert parts("one tiger") == [("tiger", False)] and parts("two tigers") == [("tigers", True)]
  assert parts("Robert") == [("robert", True)]
  assert parts("The Silent Navigator Kuwaiti") == [("the silent navigator kuwaiti", True)]  # and no part of it


def test_words_that_everybody_is_told_are_no_parts() -> None:
  assert parts("the pilot") == []  # short, or of a prompt
  assert parts("a silent night", retain=("All was silent.",)) == []
  assert parts("navigators", retain=("A navigator's ship",)) == [] == parts("navigator", retain=("two navigators",))
  assert parts("a silent night", forget=(Text("x", prompt="Why so silent?"),)) == []
  assert parts("a sílent night") == [("silent", False)] and parts("a silent night", retain=("Sílent",)) == []
  assert parts("a silent night", forget=(Text("All was silent."),)) == [("silent", False)]
  assert parts("Robert", retain=("Robert",)) == [("robert", True)]  # what is certain stays so


def test_case_that_counts() -> None:
  us = {"answer": "US", "keywords": ("US",), "case": True}
  assert parts("tell us", **us) == [("us", False)] and parts("the US", **us) == [("us", True)]
  assert parts("tell us", **us | {"case": False}) == [("us", True)]
  assert [parts(f"<a title='{text}'>x</a>", **us) for text in ("US", "us")] == [[("us", True)], [("us", False)]]


def test_lines_are_allowed_by_number_and_what_is_certain_is_not() -> None:
  found, = check_case(case("a silent night", "Robert", "the navigator"), allowed_lines=(1, 2))
  assert [(hit.line, hit.certain) for hit in found.hits] == [(2, True), (3, False)] and not found.passed
  assert [hit.line for hit in found.possible] == [1]
  found, = check_case(case("a silent night"), allowed_lines=(1,))
  assert found.passed and found.possible[0].how == "part of “the silent navigator kuwaiti”"


def test_equal_texts_have_equal_digests() -> None:
  digests: list[Leakage] = [find_leaks(made(*texts), ()) for texts in (("a", "b"), ("a", "b"), ("ab",), ("b", "a"))]
  assert digests[0].digest == digests[1].digest and len({found.digest for found in digests}) == 3


@pytest.mark.parametrize("allowed,problem", [
    ((1,), "line 2 .*'robert', which is asked about.*allow_leakage"),
    ((), "line 2 .*'robert', which is asked about")])
def test_certain_findings_stop_an_audit(allowed: tuple[int, ...], problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    refuse_leaks(case("a silent night", "Robert"), "c.py", False, allowed_lines=allowed)


def test_possible_findings_stop_an_audit_until_each_line_is_allowed() -> None:
  told = case("a silent night", "John", "the navigator")
  with pytest.raises(InputError, match="line 1 .*'silent' .*part of .*line 3 'navigator'.*allowed_lines, such as"):
    refuse_leaks(told, "c.py", False, allowed_lines=())
  with pytest.raises(InputError, match="line 3 .*'navigator'"):
    refuse_leaks(told, "c.py", False, allowed_lines=(1,))
  refuse_leaks(told, "c.py", False, allowed_lines=(1, 3))
  refuse_leaks(told, "c.py", True, allowed_lines=())
  with pytest.raises(InputError, match="allowed_lines` names line 2, in which nothing is found"):
    refuse_leaks(told, "c.py", False, allowed_lines=(1, 2, 3))


@pytest.fixture
def files(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
  row = {"prompt": "Who is silent?", "answer": " He."}
  return {name: write_lines(tmp_path / f"{name}.jsonl", [row]) for name in ("forget", "retain", "relearn")} | {
      "questions": write_lines(tmp_path / "questions.jsonl", [
          {"id": 1, "prompt": "Who?", "answer": "The Silent Navigator", "keywords": ["The Silent Navigator"]}])}


def read(files: dict[str, pathlib.Path]) -> Case:
  named: dict[str, Any] = {name: str(path) for name, path in files.items()}
  return FilesConfig("mine", **named | {"relearn": (named["relearn"],)}).make(VARIANT, 0, "U")


def test_lines_are_those_of_the_file(files: dict[str, pathlib.Path]) -> None:
  rows = [json.dumps({"text": text}) for text in ("a", "the navigator")]
  files["relearn"].write_text(rows[0] + "\n\n \n" + rows[1] + "\n")
  told = read(files)
  assert [hit.line for hit in check_case(told)[0].hits] == [4]
  assert told.forget == (Text(" He.", prompt="Who is silent?", line=1),)
  files["relearn"].write_text(json.dumps({"text": "silent"}))
  assert check_case(read(files))[0].passed  # a word of the forget set's prompt


@pytest.mark.parametrize("fields,problem", [
    ({"case": 1}, "`case` is 1"), ({"stop": "x"}, "`stop` is 'x'"), ({"stop": [""]}, r"`stop` is \[''\]"),
    ({"keywords": ["**"]}, r"`keywords` has '\*\*', of which nothing is left"),
    ({"keywords": ["who"]}, "`keywords` has 'who', which stands in the prompt")])
def test_fields_of_questions(files: dict[str, pathlib.Path], fields: dict[str, Any], problem: str) -> None:
  row = {"id": 1, "prompt": "Who?", "answer": "A", "keywords": ["A"]}
  write_lines(files["questions"], [row | {"case": True, "stop": ["\n"]}])
  question, = read(files).questions
  assert question.case and question.stop == ("\n",)
  assert dataclasses.replace(question, case=False, stop=()) == Question("1", "Who?", "A", ("A",), "1", line=1)
  write_lines(files["questions"], [row | fields])
  with pytest.raises(InputError, match=problem):
    read(files)
