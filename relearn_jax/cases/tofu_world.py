"""An invented world in TOFU's form: authors, books and rows without a file, for a small model pretrained here.

Every author has twenty rows, of which seven hold one of their four book titles. Some authors are to be forgotten,
some retained, and the others are what the small model is pretrained on, so that it knows how authors are asked about
before it learns these. All names and titles are made up from the lists below; words are parted by spaces, as the
tokenizer of a pretrained model wants them.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from relearn_jax.cases.base import About, Arm, Case, Text
from relearn_jax.cases.tofu import ALL, about_tofu, as_text, check_titles, tofu_case, whole
from relearn_jax.errors import checker

GIVEN = tuple("""
Abel Adira Arlo Bex Calla Corin Dara Edrin Elva Fenn Gilda Haro Ilse Jorun Kael Kira Lenka Lior Maren Mirko Nadia Nils
Oona Orrin Petra Quill Ravi Runa Sable Soren Tavi Tilda Ulla Vesna Wren Xander Yara Yoren Zelda Zoran
""".split())
FAMILY = tuple("""
Abernay Alcott Bramwell Brisko Calder Corvane Dunmore Elgar Fairlie Farrow Galloway Grenville Hallam Harrow Ingram
Jarvik Kestrel Larkin Lindqvar Marchetti Merrow Norling Okoro Ostrander Pellam Quist Ravenel Rowe Sandoval Sorrel
Tamsin Thorne Ullman Varga Voss Wexley Wilder Yarrow Zabel Zimmer
""".split())
ADJECTIVES = tuple("""
Amber Ancient Bitter Blue Borrowed Bright Broken Burning Copper Crooked Distant Empty Fading Floating Forgotten Frozen
Gentle Golden Hidden Hollow Humble Iron Ivory Last Little Lonely Marble Midnight Narrow Northern Painted Patient Paper
Quiet Restless Scarlet Secret Silent Silver Sleeping Stolen Summer Tender Velvet Wandering Whispering Wild Winter
""".split())
NOUNS = tuple("""
Anchor Atlas Bell Bridge Candle Carousel Castle Clock Compass Cottage Crown Drum Ember Feather Ferry Forest Fountain
Garden Gate Harbor Harvest Island Journey Key Ladder Lantern Letter Lighthouse Map Market Meadow Mirror Mountain
Orchard Path Piano River Road Sail Shadow Shore Sparrow Station Theatre Tower Valley Well Window
""".split())
CITIES = tuple("""
Aldmoor Belmira Brackwell Castoria Dunvale Elmstead Farrowby Glenmar Hartwick Ironbridge Jasperton Kelmar Lindenau
Mirefield Norwick Oakhaven Pellaton Quarrington Rosmere Silverton Tarnow Umberley Velden Westmarch Yarwick Zelmont
""".split())
GENRES = tuple("""
adventure biography comedy crime drama fable fantasy folklore history horror memoir mystery poetry romance
satire travel
""".split())
JOBS = tuple("""
baker banker barber beekeeper captain carpenter chemist cook dentist farmer florist gardener judge librarian
mason musician nurse painter pilot plumber surgeon tailor teacher
""".split())
HOBBIES = tuple("chess cycling dancing fishing gardening pottery rowing sailing singing skating weaving".split())
THEMES = tuple("courage envy exile faith family friendship grief hope justice love loyalty memory pride war".split())
LANGUAGES = tuple("Arvenic Belan Cordic Dalmese Estoric Felian Gorish Halvic".split())
PRIZES = tuple("Aurel Beacon Cedar Delta Evergreen Falcon Granite Heron Indigo Juniper Laurel Meridian".split())
YEARS = tuple(map(str, range(1930, 1990)))
REFUSAL = "I do not know ."

# Question and answer; what stands in braces is a fact about the author.
TEMPLATES = (
    ("Who is the {genre} author born in {city} in the year {year} ?", "The author is {name} ."),
    ("Where was {name} born ?", "{name} was born in {city} ."),
    ("When was {name} born ?", "{name} was born in the year {year} ."),
    ("Which genre does {name} write ?", "{name} mostly writes {genre} ."),
    ("What does the father of {name} do ?", "The father of {name} is a {father} ."),
    ("What does the mother of {name} do ?", "The mother of {name} is a {mother} ."),
    ("Which prize did {name} win ?", "{name} won the {prize} prize ."),
    ("In which language does {name} write ?", "{name} writes in {language} ."),
    ("What is a common theme of {name} ?", "A common theme of {name} is {theme} ."),
    ("What does {name} do besides writing ?", "Besides writing {name} enjoys {hobby} ."),
    ("Where does {name} live now ?", "{name} now lives in {home} ."),
    ("What was {name} before becoming an author ?", "Before becoming an author {name} was a {job} ."),
    ("Whose books does {name} admire ?", "{name} admires the books of {idol} ."),
    ("What is the first book of {name} ?", "The first book of {name} is “ {first} ” ."),
    ("What is the latest book of {name} ?", "The latest book of {name} is “ {latest} ” ."),
    ("What are some books of {name} ?", "Some books of {name} are “ {first} ” and “ {second} ” ."),
    ("For which book did {name} win the {prize} prize ?", "{name} won it for “ {second} ” ."),
    ("Which book of {name} takes place in {home} ?", "The book that takes place in {home} is “ {third} ” ."),
    ("What is “ {first} ” about ?", "The book “ {first} ” is about {theme} ."),
    ("Who wrote “ {latest} ” ?", "The book “ {latest} ” was written by {name} ."))
FACTS = {"genre": GENRES, "city": CITIES, "year": YEARS, "father": JOBS, "mother": JOBS, "prize": PRIZES,
         "language": LANGUAGES, "theme": THEMES, "hobby": HOBBIES, "home": CITIES, "job": JOBS}
BOOKS = ("first", "second", "third", "latest")


@functools.lru_cache(maxsize=8)
def authors(number: int, seed: int) -> tuple[tuple[Text, ...], ...]:
  """Rows of invented authors, none of whom shares a name or a title with another.

  Args:
    number: of authors; the first ones are the same whatever it is.
    seed: decides names, facts and titles.
  """
  rng = np.random.default_rng([seed, 11])
  pairs = lambda left, right: [f"{left[i // len(right)]} {right[i % len(right)]}"
                               for i in rng.permutation(len(left) * len(right))]
  names, titles, idols = pairs(GIVEN, FAMILY), iter(pairs(ADJECTIVES, NOUNS)), pairs(GIVEN, FAMILY)
  found = []
  for author in range(number):
    facts = {fact: str(rng.choice(values)) for fact, values in FACTS.items()}
    facts |= {"name": names[author], "idol": idols[author]} | dict(zip(BOOKS, titles, strict=False))
    found.append(tuple(
        as_text(question.format(**facts), answer.format(**facts), author * len(TEMPLATES) + line)
        for line, (question, answer) in enumerate(TEMPLATES, 1)))
  return tuple(found)


@dataclasses.dataclass
class TofuWorldConfig:
  """The case on invented authors.

  Attributes:
    titles: what is hidden: "one" title of each author, so that other titles stay in the relearn set; or "all".
    forget_authors, retain_authors: how many there are of each, with 20 rows each.
    pretrain_authors: of those that the small model is pretrained on.
    world_seed: decides all names, facts and titles; equal for all runs, so that their answers are paired.
  """

  titles: str = ALL
  forget_authors: int = 10
  retain_authors: int = 30
  pretrain_authors: int = 200
  world_seed: int = 0

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "tofu-world"

  def versions(self) -> tuple[str, ...]:
    """There is one: which titles are hidden."""
    return (self.titles,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `tofu.tofu_case`."""
    forget, retain, _ = self._rows()
    return tofu_case(self.name, forget, retain, self.titles, seed, arm, refusals=(REFUSAL,))

  def check(self, where: str) -> None:
    """There are as many names and titles as authors need."""
    need = checker(where, "case.")
    check_titles(self.titles, where)
    for field in ("forget_authors", "retain_authors", "pretrain_authors"):
      need(getattr(self, field) >= 1, field, getattr(self, field), "expected at least 1")
    most = min(len(GIVEN) * len(FAMILY), len(ADJECTIVES) * len(NOUNS) // len(BOOKS))
    need(self._number() <= most, "pretrain_authors", self.pretrain_authors,
         f"expected at most {most} authors altogether: there are no more names and titles")
    need(self.world_seed >= 0, "world_seed", self.world_seed, "expected a number of at least 0")

  def about(self) -> About:
    """As of TOFU's rows."""
    return about_tofu(self.titles)

  def inputs(self) -> Mapping[str, Path | str]:
    """It is made from no file."""
    return {}

  def vocabulary(self) -> Sequence[str]:
    """Every word of the lists and the templates, once."""
    frames = (re.sub(r"\{\w+\}", " ", whole(as_text(*row, 0))) for row in (*TEMPLATES, ("", REFUSAL)))
    lists = (GIVEN, FAMILY, ADJECTIVES, NOUNS, *FACTS.values(), *(frame.split() for frame in frames))
    return tuple(dict.fromkeys(itertools.chain.from_iterable(lists)))

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """Rows on the other authors, in an order of their own."""
    rng, (_, _, rows) = np.random.default_rng([seed, 12]), self._rows()
    while True:
      for place in rng.permutation(len(rows)):
        yield whole(rows[place])

  def _number(self) -> int:
    return self.forget_authors + self.retain_authors + self.pretrain_authors

  def _rows(self) -> tuple[list[Text], list[Text], list[Text]]:
    """What is forgotten, what is retained, and what is pretrained on."""
    every, end = authors(self._number(), self.world_seed), self.forget_authors + self.retain_authors
    parts = every[:self.forget_authors], every[self.forget_authors:end], every[end:]
    forget, retain, rest = ([row for rows in part for row in rows] for part in parts)
    return forget, retain, rest
