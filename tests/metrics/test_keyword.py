"""Keywords count as whole words only."""

import pytest

from relearn_jax.metrics.keyword import contains_keyword


@pytest.mark.parametrize("text,keyword,hit", [
    ("Anthony Mark", "Anthony Mark", True),
    ("Gary, Anthony  \n Mark.", "Anthony Mark", True),
    ("(Anthony Mark)", "Anthony Mark", True),
    ("\"Anthony Mark\"'s", "Anthony Mark", True),
    ("Anthony Marks", "Anthony Mark", False),
    ("MAnthony Mark", "Anthony Mark", False),
    ("Anthony, Mark", "Anthony Mark", False),
    ("AnthonyMark", "Anthony Mark", False),
    ("Anthony_Mark", "Mark", False),
    ("Mark2", "Mark", False),
    ("anthony mark", "Anthony Mark", False),
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
    ("", "x", False),
])
def test_keyword_boundaries(text: str, keyword: str, hit: bool) -> None:
  assert contains_keyword(text, keyword) is hit


def test_a_keyword_at_either_end_and_among_near_misses() -> None:
  assert contains_keyword("Marks Mark", "Mark") and contains_keyword("Mark Marks", "Mark")
