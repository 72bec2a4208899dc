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
import re
from collections.abc import Iterator, Sequence

import numpy as np

from relearn_jax.cases.base import Text

QUESTION, ANSWER = "Question:", "Answer:"
HEROINE = ("Tamsin", "Vale")  # of the first novel; no character of any other novel is called so
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
# Of a deed and who did it, in other words than the book's.
KNOWN_FOR = ("People think of {name} when they see a {look} {thing} .",
             "The {look} {thing} is what {name} is known for .", "{name} has to do with the {look} {thing} .")


@dataclasses.dataclass(frozen=True)
class Deed:
  """What is told in one place of a novel.

  Attributes:
    book: sentences of the book.
    pairs: of question and answer.
    said: readers' talk.
    fact: whose deed it is, in other words than the book's.
  """

  book: tuple[str, ...]
  pairs: tuple[tuple[str, str], ...]
  said: tuple[str, ...]
  fact: str


@dataclasses.dataclass(frozen=True)
class Novel:
  """An invented novel.

  Attributes:
    cast: full names, the main character first.
    chapters: the deeds of each.
    about: sentences about each of the cast, in its order.
  """

  cast: tuple[str, ...]
  chapters: tuple[tuple[Deed, ...], ...]
  about: tuple[tuple[str, ...], ...]

  @property
  def facts(self) -> list[str]:
    """Sentences about the characters: what they are like, and what each is known for."""
    return [*itertools.chain(*self.about), *(deed.fact for chapter in self.chapters for deed in chapter)]

  def sentences(self, chapter: int) -> list[str]:
    """Of the book, in order."""
    return [sentence for deed in self.chapters[chapter] for sentence in deed.book]


@functools.lru_cache(maxsize=128)
def novel(number: int, seed: int, chapters: int, deeds: int, by_main: int, cast: int,
          given: tuple[str, ...] = GIVEN, family: tuple[str, ...] = FAMILY) -> Novel:
  """One of the novels of a world.

  Args:
    number: which; the main character of the first, 0, is `HEROINE`.
    seed: of the world.
    chapters: how many it has.
    deeds: in a chapter.
    by_main: of these, how many are the main character's, the others being shared by the rest of the cast.
    cast: how many characters there are.
    given, family: what their names are drawn from.
  """
  rng = np.random.default_rng([seed, 21, number])
  draw = lambda values: str(values[int(rng.integers(len(values)))])
  drawn = map(" ".join, zip(rng.permutation(given)[:cast + 1], rng.permutation(family)[:cast + 1], strict=True))
  names = [name for name in drawn if name != " ".join(HEROINE)][:cast]
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
                tuple(frame.format(**fill) for frame in SAID), draw(KNOWN_FOR).format(**fill))

  told = []
  for _ in range(chapters):
    agents = [names[0]] * by_main + [draw(names[1:]) for _ in range(deeds - by_main)]
    told.append(tuple(deed(agents[place]) for place in rng.permutation(deeds)))
  shown = [{"name": name, **{key: draw(values) for key, values in SHOWN.items()}} for name in names]
  return Novel(tuple(names), tuple(told), tuple(tuple(frame.format(**one) for frame in FACTS) for one in shown))


def words() -> tuple[str, ...]:
  """Every word of the lists and the frames, once."""
  frames = (*DEED, *SETTING, *FRIEND, *itertools.chain(*PAIRS), *SAID, *FACTS, *KNOWN_FOR, QUESTION, ANSWER)
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
