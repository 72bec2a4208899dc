"""Keywords count as whole words only, however they are spelled, and hits are found where they stand."""

import re
import sys
import unicodedata

import pytest

from relearn_jax.metrics.keyword import PLAIN, contains_keyword, find_keyword, keyword_key, normalize


@pytest.mark.parametrize("text,keyword,hit", [
    ("Anthony Mark", "Anthony Mark", True),
    ("Gary, Anthony  \n Mark.", "Anthony Mark", True),
    ("(Anthony Mark)", "Anthony Mark", True),
    ("\"Anthony Mark\"'s", "Anthony Mark", True),
    ("Anthony Marks", "Anthony Mark", False),
    ("MAnthony Mark", "Anthony Mark", False),
    ("Anthony, Mark", "Anthony Mark", False),
    ("AnthonyMark", "Anthony Mark", False),
    ("Anthony_Mark", "Mark", True),
    ("Mark2", "Mark", False),
    ("Anthony Mark", "  Anthony\tMark ", True),
    ("Zoë and Renée", "Renée", True),
    ("Renéed", "Renée", False),
    ("Renée", "Ren", False),
    ("in C++ now", "C++", True),
    ("in C+++ now", "C++", True),
    ("price: $5", "$5", True),
    ("US$5", "$5", False),
    ("a.b", "a.b", True),
    ("axb", "a.b", False),
    ("anything", "", False),
    ("anything", "  ", False),
    ("anything", "**", False),
    ("", "x", False),
])
def test_keyword_boundaries(text: str, keyword: str, hit: bool) -> None:
  assert contains_keyword(text, keyword) is hit


def test_a_keyword_at_either_end_and_among_near_misses() -> None:
  assert contains_keyword("Marks Mark", "Mark") and contains_keyword("Mark Marks", "Mark")


# Spellings of one thing; each is a hit for each.
ALIKE = [
    ("José", "Jose\u0301", "JOSÉ", "\uff2aos\u00e9", "*José*", "Jo\u00adsé", "Jos\u200be\u0301", "<b>José</b>"),
    ("O'Brien", "O\u2019Brien", "O\u02bcBrien", "O\u00b4Brien", "O`Brien", "o\uff07brien"),
    ("Al-Kuwaiti", "Al\u2011Kuwaiti", "Al\u2013Kuwaiti", "AL\u2212KUWAITI", "al\uff0dkuwaiti", "`Al-Kuwaiti`"),
    ("Anthony Mark", "anthony\u00a0mark", "ANTHONY \u2009\n MARK", "**Anthony** Mark", "Anthony_Mark", "_Anthony Mark_",
     "Anthony<br/>Mark", "<span class='x'>Anthony</span> <i>Mark</i>", "Anthony\u3000Mark", "Anth\ufeffony Mark"),
    ('"Dune"', "\u201cDune\u201d", "\u00abDune\u00bb", "\u201eDUNE\u201c"),
    ("Straße", "STRASSE", "strasse"),
    ("fine", "\ufb01ne", "Fi\u200dne"),
    ("ガラス", "\uff76\uff9e\uff97\uff7d"),
    ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
    ("ΣΟΦΟΣ", "σοφος", "σοφοσ"),
    ("Mark, Jr.", "**Mark**, Jr.", "_Mark_, *Jr*.", "<b>Mark</b>, Jr.", "**Mark, Jr.**", "`Mark`, <i>Jr</i>.",
     "Mark™, Jr."),
    ("Xbox One", "Xbox™ One", "Xbox® One", "**Xbox**™ One", "Xbox\u2122One", "Xbox℠ <i>One</i>"),
    ("12.05.2020", "**12.05.2020**", "*12*.05.2020", "12.05<b>.2020</b>"),
    ("(1990)", "(*1990*)", "**(1990)**", "(<b>1990</b>)"),
]


@pytest.mark.parametrize("spellings", ALIKE, ids=lambda row: ascii(row[0]))
def test_one_thing_in_many_spellings(spellings: tuple[str, ...]) -> None:
  assert len({keyword_key(spelling) for spelling in spellings}) == 1
  for text in spellings:
    for keyword in spellings:
      assert contains_keyword(f"Is it {text}?", keyword), (text, keyword)
  key = keyword_key(spellings[0])
  if key[0].isalpha() and key.isascii():
    assert not any(contains_keyword(text, key) for text in (f"x{key}", f"{key}y", key[:-1], f"{key}\u0301"))


@pytest.mark.parametrize("text,keyword,hit", [
    # Writing without spaces: no boundary is asked for.
    ("他去了東京塔。", "東京", True), ("私はトーキョーに行く", "トーキョー", True),
    ("เขาไปกรุงเทพเมื่อวาน", "กรุงเทพ", True),
    ("ຂ້ອຍໄປວຽງຈັນແລ້ວ", "ວຽງຈັນ", True), ("ខ្ញុំទៅភ្នំពេញ", "ភ្នំពេញ", True), ("သူရန်ကုန်မှာ", "ရန်ကုန်", True),
    ("去Tokyo了", "Tokyo", True), ("去Tokyos了", "Tokyo", False), ("第1章", "1", True), ("第10章", "1", False),
    ("15月", "5月", False), ("๑๐", "๑", False),
    # A mark belongs to the letter before it.
    ("กิน", "ก", False), ("हिन्दी", "हिन", False), ("हिन्दी", "हिन्दी", True),
    # Korean particles follow a word; what stands before it makes another word.
    ("서울에서 왔다", "서울", True), ("대한국", "한국", False), ("Tokyo에서", "Tokyo", True), ("2020년", "2020", True),
    # Numbers are whole.
    ("1.5", "1", False), ("1.5", "5", False), ("1,000", "1", False), ("1,000", "000", False), ("It is 1.", "1", True),
    ("It is 1, or 5.", "1", True), ("1.5.", "1.5", True), ("11.5", "1.5", False), ("1.55", "1.5", False),
    ("1.5.2", "1.5", False), ("**1**.5", "1", False), ("1.**1990**", "1990", True),
    ("½", "1", False), ("5%", "5", True), ("$1,000", "1,000", True), ("page 5.x", "5", True),
    # But a date is made of several.
    ("12.05.2020", "2020", True), ("on 1.5.2020.", "2020", True), ("2020.05.12", "2020", True),
    ("1.5.2020", "1", False),
    ("12.05.2020", "12.05.2020", True), ("12.05.2020.", "12.05.2020", True), ("12.05.2020.1", "2020", False),
    ("12.05.2020.1", "12.05.2020", False), ("1.12.05.2020", "2020", False), ("2020.05.12.1", "2020", False),
    ("12.05.2020", "5.2020", False), ("12.05.20201", "2020", False), ("1.2020", "2020", False),
    ("112.05.2020", "2020", False),
    # What is raised is no part of the word before it.
    ("Mark¹ said", "Mark", True), ("Mark™", "Mark", True), ("Mark™", "Mark TM", False), ("10²", "102", False),
    # A tag is one that text has.
    ("vector<int>", "vector", True), ("a vector", "vector<int>", False), ("x<b>y</b>", "xy", False),
    ("2 <b and c> 3", "b and c", False),
    ("Price<br>$5", "$5", True), ("Mark<br>, Jr.", "Mark, Jr.", False),
])
def test_what_is_a_word_depends_on_the_writing(text: str, keyword: str, hit: bool) -> None:
  assert contains_keyword(text, keyword) is hit


def test_case_counts_where_the_question_says_so() -> None:
  assert contains_keyword("anthony mark", "Anthony Mark") and contains_keyword("US", "us")
  assert not contains_keyword("tell us", "US", case=True) and contains_keyword("the U\u00adS", "US", case=True)
  assert not contains_keyword("strasse", "Straße", case=True)


@pytest.mark.parametrize("text,keyword,marked", [
    ("Gary, **Anthony**  Mark.", "anthony mark", ["Anthony**  Mark"]),
    ("Mark, marks; MARK_Ma\u00adrk", "Mark", ["Mark", "MARK", "Ma\u00adrk"]),
    ("Jose\u0301!", "José", ["Jose\u0301"]), ("e\u0301\ufb01ne", "éfine", ["e\u0301\ufb01ne"]),
    ("東京東京", "東京", ["東京", "東京"]), ("a b a b a", "a b a", ["a b a", "a b a"]),
    ("<b>x</b> <i>x</i>", "x", ["x", "x"]), ("Straße", "STRASSE", ["Straße"])])
def test_hits_are_placed_in_the_original_text(text: str, keyword: str, marked: list[str]) -> None:
  assert [text[start:end] for start, end in find_keyword(text, keyword)] == marked


@pytest.mark.parametrize("text", [spelling for row in ALIKE for spelling in row], ids=ascii)
@pytest.mark.parametrize("before", ["", "e\u0301 \ufb01 <b>", "한 \u00ad", "ß_ 1,5 "], ids=ascii)
def test_the_place_of_a_hit_is_a_hit(text: str, before: str) -> None:
  whole = f"{before} ({text}) {before}"
  for start, end in (found := find_keyword(whole, text)):
    assert keyword_key(whole[start:end]) == keyword_key(text)
  assert found and before + " (" + text + ")" == whole[:len(before) + len(text) + 3]
  normal = normalize(whole)
  assert len(normal.spans) == len(normal.text) and normalize(normal.text).text == normal.text
  flat = [place for span in normal.spans for place in span]
  assert flat[0] >= 0 and flat[-1] <= len(whole) and [a for a, _ in normal.spans] == sorted(a for a, _ in normal.spans)


def test_plain_text_is_its_own_normal_form() -> None:
  """What `find_keyword` does not normalise: each character that counts as plain, beside each other one."""
  plain = [character for character in map(chr, range(0x250)) if PLAIN.fullmatch(character)]
  assert len(plain) == 91 and " " in plain and not set("*<_`") & set(plain)
  for first in plain:
    text = re.sub(" +", " ", "".join(first + second for second in plain))
    assert normalize(text, case=True).text == text and normalize(text).text == text.lower()
    assert normalize(text).spans == tuple((place, place + 1) for place in range(len(text)))
  assert find_keyword("Abc ab AB.", "AB") == [(4, 6), (7, 9)] and find_keyword("Ab ab", "ab", case=True) == [(3, 5)]


def test_every_character_composes_with_those_before_it_alone() -> None:
  """What is normalised piece by piece is what NFKC makes of the whole: no piece begins with what could compose."""
  for code in range(0xA0, sys.maxunicode):
    parts = unicodedata.decomposition(chr(code)).split()
    if len(parts) == 2 and not parts[0].startswith("<"):
      pair = chr(int(parts[0], 16)) + chr(int(parts[1], 16))
      assert normalize(pair, case=True).text == normalize(unicodedata.normalize("NFC", pair), case=True).text, hex(code)
  for first in ("\u1100", "가", "\uffa1", "カ", "\uff8a"):
    for code in (*range(0x1100, 0x1200), *range(0xFF66, 0xFFDD)):
      text = first + chr(code)
      assert normalize(text, case=True).text == unicodedata.normalize("NFKC", text), ascii(text)
