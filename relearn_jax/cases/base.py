"""The contract of a case: plain text, split into what is learned, forgotten, attacked and asked."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
Arm = Literal["U", "N"]  # the unlearned model's case, and the control's, which lacks the secret


def spread_evenly(rows: Sequence[T], number: int) -> list[T]:
  """`number` of the rows, evenly spread; all of them where there are no more, or the number is 0."""
  return list(rows) if not 0 < number < len(rows) else [rows[i * len(rows) // number] for i in range(number)]


@dataclasses.dataclass(frozen=True)
class Text:
  """One row of a corpus.

  Attributes:
    text: what is trained on; every token counts in the loss.
    prompt: what stands in front of it and does not count.
    complete: whether the text ends here. A text that was cut gets no end-of-sequence token, since
      training on one would teach the model to stop where the cut happens to be.
    line: of the file that it was read from; 0: it comes from none.
  """

  text: str
  complete: bool = True
  prompt: str = ""
  line: int = 0


@dataclasses.dataclass(frozen=True)
class RelearnSet:
  """Text that an attacker finetunes on, and where it comes from.

  Attributes:
    lines: of each row, its line in the file that it was read from; empty where it comes from none.
  """

  name: str
  rows: tuple[Text, ...]
  provenance: str
  lines: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
  """A probe: `answer` is what a model that knows says after `prompt`, `keywords` prove a hit.

  Attributes:
    case: a keyword is a hit in upper and lower case as it is written only.
    stop: a completion ends before the first of these strings.
    line: of the file that it was read from; 0: it comes from none.
  """

  id: str
  prompt: str
  answer: str
  keywords: tuple[str, ...]
  cluster: str
  case: bool = False
  stop: tuple[str, ...] = ()
  line: int = 0


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
  """A question with options, of which a model is asked how likely each is: nothing is generated.

  Attributes:
    prompt: the question without its options, in front of each option as an answer.
    listed: the question with its options, in front of each option's letter.
    options: as answers.
    correct: place of the right one.
    line: of the file that it was read from; 0: it comes from none.
  """

  id: str
  prompt: str
  listed: str
  options: tuple[str, ...]
  correct: int
  cluster: str
  line: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
  """What one run memorises, must forget, may keep, is attacked with and is asked.

  Attributes:
    name: the case, as it stands in every row of the results.
    variant: which version of it (for the names: how often the pair is repeated).
    memorize: everything that is learned before unlearning.
    forget: the part that unlearning removes (D_u).
    retain: the part that it should keep.
    relearn_sets: what the attacker may finetune on.
    questions: what is asked; equal for all runs, so that answers are paired.
    secrets: strings that no relearn set may hold, besides the questions' keywords and answers.
    refusals: for each forget row, its prompt and an answer that says nothing.
    alternates: for each forget row, the same with something plausible in place of the secret.
    anchors: terms of the forget rows -> generic terms that may stand in their place.
    metric: what proves knowledge; a key of `metrics.scores.METRICS`.
    begins_in_prompt: a keyword may begin in the prompt, as long as it ends in the completion.
    choices: what is asked with options besides; equal for all runs.
    files: corpus or "questions" -> the file that it was read from, for messages.
  """

  name: str
  variant: str
  memorize: tuple[Text, ...]
  forget: tuple[Text, ...]
  retain: tuple[Text, ...]
  relearn_sets: tuple[RelearnSet, ...]
  questions: tuple[Question, ...]
  secrets: tuple[str, ...] = ()
  refusals: tuple[Text, ...] = ()
  alternates: tuple[Text, ...] = ()
  anchors: tuple[tuple[str, str], ...] = ()
  metric: str = "asr"
  begins_in_prompt: bool = False
  choices: tuple[ChoiceQuestion, ...] = ()
  files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

  def rows(self, name: str) -> tuple[Text, ...]:
    """The rows of a data set, by the name that objectives and stages have for it."""
    own = {"memorize": self.memorize, "forget": self.forget, "relabelled": self.forget, "retain": self.retain,
           "idk": self.refusals, "alternate": self.alternates}
    return own[name] if name in own else self.relearn_set(name).rows

  def relearn_set(self, name: str) -> RelearnSet:
    """The relearn set of that name."""
    return next(one for one in self.relearn_sets if one.name == name)

  def origin(self, name: str) -> pathlib.Path:
    """Where a data set comes from, for messages: its file, or the case."""
    return self.files.get("forget" if name == "relabelled" else name, pathlib.Path(self.name))


@dataclasses.dataclass(frozen=True)
class About:
  """What a report says of a case beside its numbers.

  Attributes:
    variant: what a variant is, as the head of a column.
    story: what was done and what it would mean, in sentences; "" where the report's own will do.
    published: figures of a paper, by "unlearned" and "relearned" and then by variant, and their source as "text".
  """

  variant: str
  story: str = ""
  published: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class CaseConfig(Protocol):
  """What a case is told, and how it is made: the one thing that an audit knows of it.

  A case from which models are pretrained has a `vocabulary` (its words) and `pretraining_texts` besides.
  """

  name: str

  def versions(self) -> tuple[str, ...]:
    """The names of its variants, in the order in which they are shown."""

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """The case of one variant and seed; that of arm "N" lacks the secret.

    Raises:
      InputError: a row or a question of a file is wrong.
    """

  def check(self, where: str) -> None:
    """Refuses settings of which no case can be made, before a file is read.

    Raises:
      InputError: naming the file `where`, the field and what was expected.
    """

  def about(self) -> About:
    """What a report says of it."""

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """Field -> file, of every file that decides what the case is; of a source that is none, a digest of its rows."""

  def vocabulary(self) -> Sequence[str]:
    """The words of a model that is pretrained for the case."""

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """Endless texts to pretrain it on."""
