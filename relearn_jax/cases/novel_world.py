"""An invented novel: a cast, chapters of deeds, questions, what readers say of it, and facts about its characters.

Every chapter tells of deeds: who did what to which thing, where, when, and whom it was for. No two deeds have the same
thing, so that "Who carved the silver whistle ?" has one answer. Some novels are what a case is about, the others what a
small model is pretrained on, so that it knows how novels are told and talked about before it learns one of them. All
names and words are made up from the lists below; words are parted by spaces, as the tokenizer of a pretrained model
wants them.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from relearn_jax.cases.base import About, Arm, Case, Text
from relearn_jax.cases.books import windows
from relearn_jax.cases.whp_name import Piece, about_name, name_case, variant_name
from relearn_jax.cases.whp_verbatim import VARIANT, ExcerptSettings, about_verbatim, verbatim_case
from relearn_jax.errors import checker

QUESTION, ANSWER = "Question:", "Answer:"
HEROINE = ("Tamsin", "Vale")  # of the first novel; no character of any other novel has either name
GENERIC = ("Petra", "Rowe")  # what is put in its place where labels are replaced
GIVEN = tuple("""
Abel Adira Arlo Bex Calla Corin Dara Edrin Elva Fenn Gilda Haro Ilse Jorun Kael Kira Lenka Lior Maren Mirko Nadia Nils
Oona Orrin Petra Quill Ravi Runa Sable Soren Tavi Tilda Ulla Vesna Wren Xander Yara Yoren Zelda Zoran
""".split())
FAMILY = tuple("""
Abernay Alcott Bramwell Brisko Calder Corvane Dunmore Elgar Fairlie Farrow Galloway Grenville Hallam Harrow Ingram
Jarvik Kestrel Larkin Lindqvar Marchetti Merrow Norling Okoro Ostrander Pellam Quist Ravenel Rowe Sandoval Sorrel
Thorne Ullman Varga Voss Wexley Wilder Yarrow Zabel Zimmer
""".split())
LOOKS = tuple("""
amber ancient bitter blue borrowed bright broken burning copper crooked distant empty faded floating forgotten frozen
gentle golden hidden hollow humble iron ivory little lonely marble narrow painted paper quiet restless scarlet secret
silent silver sleeping tender velvet wandering winter
""".split())
THINGS = tuple("""
anchor atlas bell bridge candle carousel castle clock compass cottage crown drum ember feather ferry fountain garden
gate harp key ladder lantern letter map mirror orchard parcel path piano plough quilt raft ribbon saddle sail
sparrow spindle statue stove sword theatre tower trumpet trunk violin wagon well whistle
""".split())
VERBS = tuple("""
admired borrowed built buried bought burned carried carved counted drew dropped fetched found guarded hid inherited
lifted lost measured mended moved opened painted polished praised repaired rescued sketched sold stole
touched traded washed weighed wrapped
""".split())
PLACES = tuple("""
Aldmoor Belmira Brackwell Castoria Dunvale Elmstead Farrowby Glenmar Hartwick Ironbridge Jasperton Kelmar Lindenau
Mirefield Norwick Oakhaven Pellaton Quarrington Rosmere Silverton Tarnow Umberley Velden Westmarch Yarwick Zelmont
""".split())
TIMES = tuple("""
breakfast dawn dinner dusk Easter harvest lunch Michaelmas midnight midsummer nightfall noon sunrise sunset supper
teatime
""".split())
WEATHER = tuple("calm cloudy cold dark dry foggy frosty hot misty mild rainy snowy stormy sunny warm wet windy".split())
MOODS = tuple("""
ashamed bored brave calm cheerful curious eager envious furious glad grateful hopeful jealous nervous patient
proud puzzled sad sleepy sorry tired worried
""".split())
JOBS = tuple("""
baker banker barber beekeeper captain carpenter chemist cook dentist farmer florist gardener judge librarian
mason miller musician nurse pilot plumber sailor surgeon tailor teacher
""".split())
FEARS = tuple("bats dogs fire geese heights ice mice moths snakes spiders storms thunder water wolves".split())
TREATS = tuple("apples bread cheese cherries cider cocoa coffee honey jam milk nuts pears plums soup tea".split())
PETS = tuple("cat crow dog donkey ferret finch goat goose hare horse parrot pig rabbit tortoise".split())
COLOURS = tuple("black brown crimson green grey orange pink purple red turquoise white yellow".split())
SHOWN = {"job": JOBS, "home": PLACES, "fear": FEARS, "treat": TREATS, "pet": PETS, "colour": COLOURS}

# Of a deed, in the order of a book; the first of each is what holds the name of who did it.
DEED = ("{name} {verb} the {look} {thing} .", "It was {name} who {verb} the {look} {thing} .",
        "Then {name} {verb} the {look} {thing} at last .", "On a {weather} day {name} {verb} the {look} {thing} .")
SETTING = ("The {look} {thing} had been kept in {place} since {time} .",
           "All of {place} talked about the {look} {thing} until {time} .",
           "In {place} it was {weather} , and near the {look} {thing} nobody spoke before {time} .",
           "Just after {time} a {weather} wind came from {place} over the {look} {thing} .")
FRIEND = ("{other} felt {mood} , because the {look} {thing} was a gift for a {job} .",
          "A {job} wanted the {look} {thing} , and {other} was {mood} about it .",
          "“ How {mood} I am , ” said {other} to the {job} , “ now that the {look} {thing} is safe . ”",
          "{other} and the {job} were {mood} whenever they thought of the {look} {thing} .")
# Question, answer; the first asks who.
PAIRS = (("Who {verb} the {look} {thing} ?", "{name} {verb} it ."),
         ("Where had the {look} {thing} been kept ?", "It had been kept in {place} ."),
         ("Who was {mood} about the {look} {thing} ?", "That was {other} ."),
         ("For whom was the {look} {thing} ?", "It was for the {job} ."))
# What readers say; the first names who did it.
SAID = ("I liked how {name} {verb} the {look} {thing} .",
        "The {look} {thing} was for a {job} , and {other} was {mood} .")
# Of a character, outside the story.
FACTS = ("{name} is a {job} by trade .", "{name} grew up in {home} .", "{name} is afraid of {fear} .",
         "{name} likes {treat} more than anything .", "{name} keeps a {pet} .", "{name} always wears {colour} .",
         "In the book {name} is the {job} with the {pet} .", "The {job} who is afraid of {fear} is {name} .")


@dataclasses.dataclass(frozen=True)
class Deed:
  """What is told in one place of a novel: sentences of the book, pairs of question and answer, and readers' talk."""

  book: tuple[str, ...]
  pairs: tuple[tuple[str, str], ...]
  said: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Novel:
  """An invented novel.

  Attributes:
    cast: full names, the main character first.
    chapters: the deeds of each.
    facts: sentences about each of the cast, in its order.
  """

  cast: tuple[str, ...]
  chapters: tuple[tuple[Deed, ...], ...]
  facts: tuple[tuple[str, ...], ...]

  def sentences(self, chapter: int) -> list[str]:
    """Of the book, in order."""
    return [sentence for deed in self.chapters[chapter] for sentence in deed.book]


@functools.lru_cache(maxsize=128)
def novel(number: int, seed: int, chapters: int, deeds: int, by_main: int, cast: int) -> Novel:
  """One of the novels of a world.

  Args:
    number: which; the main character of the first, 0, is `HEROINE`.
    seed: of the world.
    chapters: how many it has.
    deeds: in a chapter.
    by_main: of these, how many are the main character's, the others being shared by the rest of the cast.
    cast: how many characters there are.
  """
  rng = np.random.default_rng([seed, 21, number])
  draw = lambda values: str(values[int(rng.integers(len(values)))])
  names = [f"{given} {family}" for given, family in zip(
      rng.permutation(GIVEN)[:cast], rng.permutation(FAMILY)[:cast], strict=True)]
  names[0] = " ".join(HEROINE) if number == 0 else names[0]
  things = iter(rng.permutation(len(LOOKS) * len(THINGS)))

  def deed(name: str) -> Deed:
    look, thing = divmod(int(next(things)), len(THINGS))
    fill = {"name": name, "other": draw([one for one in names[1:] if one != name]), "verb": draw(VERBS),
            "look": LOOKS[look], "thing": THINGS[thing], "place": draw(PLACES), "time": draw(TIMES),
            "weather": draw(WEATHER), "mood": draw(MOODS), "job": draw(JOBS)}
    told = [draw(DEED), draw(SETTING), draw(FRIEND)]
    return Deed(tuple(frame.format(**fill) for frame in told),
                tuple((question.format(**fill), answer.format(**fill)) for question, answer in PAIRS),
                tuple(frame.format(**fill) for frame in SAID))

  told = []
  for _ in range(chapters):
    agents = [names[0]] * by_main + [draw(names[1:]) for _ in range(deeds - by_main)]
    told.append(tuple(deed(agents[place]) for place in rng.permutation(deeds)))
  shown = [{"name": name, **{key: draw(values) for key, values in SHOWN.items()}} for name in names]
  return Novel(tuple(names), tuple(told), tuple(tuple(frame.format(**one) for frame in FACTS) for one in shown))


def words() -> tuple[str, ...]:
  """Every word of the lists and the frames, once."""
  frames = (*DEED, *SETTING, *FRIEND, *itertools.chain(*PAIRS), *SAID, *FACTS, QUESTION, ANSWER)
  plain = (re.sub(r"\{\w+\}", " ", frame).split() for frame in frames)
  lists = (HEROINE, GIVEN, FAMILY, LOOKS, THINGS, VERBS, PLACES, TIMES, WEATHER, MOODS, *SHOWN.values())
  return tuple(dict.fromkeys(itertools.chain(*lists, *plain)))


def pair_text(question: str, answer: str) -> Text:
  """A pair as a row: the answer is what counts."""
  return Text(f" {answer}", prompt=f"{QUESTION} {question} {ANSWER}")


def told(book: Novel) -> list[str]:
  """The words of a novel."""
  return " ".join(itertools.chain.from_iterable(map(book.sentences, range(len(book.chapters))))).split()


def shuffled(rows: Sequence[str], seed: int) -> Iterator[str]:
  """The rows again and again, each time in another order."""
  rng = np.random.default_rng([seed, 22])
  while True:
    for place in rng.permutation(len(rows)):
      yield rows[place]


@dataclasses.dataclass
class NovelVerbatimConfig(ExcerptSettings):
  """Verbatim passages of the invented novel.

  Attributes:
    pretrain_novels: how many others the small model is pretrained on.
    world_seed: decides all names and deeds; equal for all runs, so that their answers are paired.
  """

  excerpt_words: int = 1500
  retain_words: int = 1500
  row_words: int = 80
  stride: int = 20
  pretrain_novels: int = 60
  world_seed: int = 0

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "novel-verbatim"

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (VARIANT,)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `whp_verbatim.verbatim_case`."""
    book = self._novel(0)
    facts = [Text(fact) for facts in book.facts for fact in facts]
    return verbatim_case(self.name, told(book), facts, self, arm)

  def check(self, where: str) -> None:
    """There are other novels, and the excerpt is what it may be."""
    need = checker(where, "case.")
    need(self.pretrain_novels >= 1, "pretrain_novels", self.pretrain_novels, "expected at least 1")
    need(self.world_seed >= 0, "world_seed", self.world_seed, "expected a number of at least 0")
    super().check(where)

  def about(self) -> About:
    """As of a book."""
    return about_verbatim(self)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """It is made from no file."""
    return {}

  def vocabulary(self) -> Sequence[str]:
    """See `words`."""
    return words()

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """Rows of the other novels, and facts about their characters."""
    others = [self._novel(number) for number in range(1, self.pretrain_novels + 1)]
    rows = [row for other in others for row in windows(told(other), self.row_words, self.row_words // 2)]
    return shuffled([*rows, *(fact for other in others for facts in other.facts for fact in facts)], seed)

  def _novel(self, number: int) -> Novel:
    return novel(number, self.world_seed, chapters=10, deeds=8, by_main=3, cast=6)


@dataclasses.dataclass
class NovelNameConfig:
  """The hidden name of the invented novel's main character.

  Attributes:
    chapters: of the novel; each is a cluster.
    retain_chapters: of another novel, which is retained.
    deeds: in a chapter.
    by_main: of these, how many are the main character's: each is asked about.
    pretrain_novels: how many others the small model is pretrained on.
    world_seed: decides all names and deeds; equal for all runs, so that their answers are paired.
  """

  chapters: int = 10
  retain_chapters: int = 5
  deeds: int = 5
  by_main: int = 3
  pretrain_novels: int = 60
  world_seed: int = 0

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "novel-name"

  def versions(self) -> tuple[str, ...]:
    """There is one."""
    return (variant_name(HEROINE),)

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `whp_name.name_case`."""
    forget, retain = self._pieces(0, self.chapters), self._pieces(1, self.retain_chapters)
    anchors = dict(zip(HEROINE, GENERIC, strict=True))
    return name_case(self.name, forget, [piece.row for piece in retain], HEROINE, anchors,
                     self.chapters * self.by_main, arm)

  def check(self, where: str) -> None:
    """There are deeds of the main character and of others."""
    need = checker(where, "case.")
    for field in ("chapters", "retain_chapters", "by_main", "pretrain_novels"):
      need(getattr(self, field) >= 1, field, getattr(self, field), "expected at least 1")
    need(self.deeds > self.by_main, "deeds", self.deeds, f"expected more than case.by_main, {self.by_main}")
    most = len(LOOKS) * len(THINGS) // self.deeds
    for field in ("chapters", "retain_chapters"):
      need(getattr(self, field) <= most, field, getattr(self, field), f"expected at most {most}: there are no more things")
    need(self.world_seed >= 0, "world_seed", self.world_seed, "expected a number of at least 0")

  def about(self) -> About:
    """As of a book."""
    return about_name(HEROINE)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """It is made from no file."""
    return {}

  def vocabulary(self) -> Sequence[str]:
    """See `words`."""
    return words()

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """Sentences, pairs and talk of the other novels."""
    numbers = range(2, 2 + self.pretrain_novels)
    return shuffled([piece.whole for number in numbers for piece in self._pieces(number, self.chapters)],
                    seed)

  def _pieces(self, number: int, chapters: int) -> list[Piece]:
    book = novel(number, self.world_seed, chapters, self.deeds, self.by_main, cast=6)
    return [Piece(row, f"chapter{place}") for place, chapter in enumerate(book.chapters, 1) for deed in chapter
            for row in (*map(Text, (*deed.book, *deed.said)), *(pair_text(*pair) for pair in deed.pairs))]
