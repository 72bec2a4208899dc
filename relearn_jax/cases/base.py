"""The contract of a case: plain text, split into what is learned, forgotten, attacked and asked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Text:
  """One row of a corpus.

  Attributes:
    text: what is trained on; every token counts in the loss.
    prompt: what stands in front of it and does not count.
    complete: whether the text ends here. A text that was cut gets no end-of-sequence token, since
      training on one would teach the model to stop where the cut happens to be.
  """

  text: str
  complete: bool = True
  prompt: str = ""


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
  """

  id: str
  prompt: str
  answer: str
  keywords: tuple[str, ...]
  cluster: str
  case: bool = False
  stop: tuple[str, ...] = ()


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
