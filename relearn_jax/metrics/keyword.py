"""Keyword hits: does a text contain a phrase as whole words?"""

import functools
import re


@functools.lru_cache(maxsize=4096)
def _pattern(keyword: str) -> re.Pattern[str]:
  words = r"\s+".join(re.escape(word) for word in keyword.split())
  # Not `\b`: a keyword may itself begin or end with a character that is no word character.
  return re.compile(rf"(?<!\w){words}(?!\w)")


def contains_keyword(text: str, keyword: str) -> bool:
  """Whether `keyword` stands in `text` as whole words, with any white space between its words.

  >>> contains_keyword("Gary, Anthony  Mark.", "Anthony Mark")
  True
  >>> contains_keyword("Anthony Marks", "Anthony Mark")
  False
  """
  return bool(keyword.split()) and _pattern(keyword).search(text) is not None
