"""The two cases on the invented novel: its main character's name is hidden, or passages of it are asked for.

No file and no checkpoint is needed: a small model is pretrained on other novels. See `novel`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from relearn_jax.cases.base import About, Arm, Case, Text
from relearn_jax.cases.books import windows
from relearn_jax.cases.novel import (
  FAMILY,
  GENERIC,
  GIVEN,
  HEROINE,
  LOOKS,
  THINGS,
  Novel,
  novel,
  pair_text,
  shuffled,
  told,
  words,
)
from relearn_jax.cases.whp_name import Piece, about_name, name_case, variant_name
from relearn_jax.cases.whp_verbatim import VARIANT, ExcerptSettings, about_verbatim, verbatim_case
from relearn_jax.errors import checker


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
    return verbatim_case(self.name, told(book), [*map(Text, book.facts)], self, arm)

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
    return shuffled([*rows, *(fact for other in others for fact in other.facts)], seed)

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
      need(getattr(self, field) <= most, field, getattr(self, field),
           f"expected at most {most}: there are no more things")
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
    """Sentences, pairs and talk of the other novels, in which either word is a name too, beside another one."""
    numbers = range(2, 2 + self.pretrain_novels)
    return shuffled([piece.whole for number in numbers for piece in self._pieces(number, self.chapters)],
                    seed)

  def _pieces(self, number: int, chapters: int) -> list[Piece]:
    # What is memorised holds the words in the first novel alone; a model that never read them could not say them.
    more = HEROINE if number > 1 else ()
    book = novel(number, self.world_seed, chapters, self.deeds, self.by_main, 6, (*GIVEN, *more[:1]),
                 (*FAMILY, *more[1:]))
    return [Piece(row, f"chapter{place}") for place, chapter in enumerate(book.chapters, 1) for deed in chapter
            for row in (*map(Text, (*deed.book, *deed.said)), *(pair_text(*pair) for pair in deed.pairs))]
