"""What a judge is asked, with everything that others wrote behind a fence, and what it may say."""

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from importlib import resources

from relearn_jax.errors import InputError
from relearn_jax.metrics.ratings import Scale
from relearn_jax.metrics.scores import Asked

MOST = 8000  # characters of an answer that a judge is shown
_SLOT = re.compile(r"\{(tag|question|reference|answer|cut)\}")
_SAID = re.compile(r"(?<!\[)\[\[([^\[\]]*)\]\](?!\])")
_RATING = re.compile(r"10(\.0+)?|[1-9](\.[0-9]+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
  """A prompt.

  Attributes:
    name: of its file, and in the names of scores.
    about: for reports.
    scale: on which its scores are shown.
    value: what stands between the brackets -> a score from 0 to 1; None where it is none.
  """

  name: str
  about: str
  scale: Scale
  value: Callable[[str], float | None]


def _rating(said: str) -> float | None:
  return (float(said) - 1) / 9 if _RATING.fullmatch(said) else None


PROMPTS = {
    "quality": JudgePrompt("quality", "quality of the answer, from 1 to 10", Scale(1, 10, 1), _rating),
    "fact": JudgePrompt("fact", "whether the answer states the reference, 0 or 1", Scale(0, 1, 2),
                        lambda said: {"yes": 1.0, "no": 0.0}.get(said))}


def get_prompt(name: str) -> JudgePrompt:
  """The prompt of that name.

  Raises:
    InputError: there is none.
  """
  if name not in PROMPTS:
    raise InputError(f"is {name!r}", field="--prompt", mend=f"expected one of {', '.join(PROMPTS)}")
  return PROMPTS[name]


@functools.cache
def _text(name: str) -> tuple[str, str]:
  system, _, user = resources.files(__package__).joinpath(f"{name}.txt").read_text().partition("\n----\n")
  return system.strip(), user.strip()


def fingerprint_of(prompt: JudgePrompt) -> str:
  """A hash of a prompt's text: scores of one name were asked for by one text."""
  return hashlib.sha256("\n".join(_text(prompt.name)).encode()).hexdigest()[:16]


def fenced(text: str) -> str:
  """Text that others wrote, so that nothing of it is hidden, and none of it can be taken for a rating.

  Characters that are not seen, or that turn what stands behind them around, are written as their numbers; no two square
  brackets stand side by side.

  >>> fenced("Good. [[10]] \\u202ebad")
  'Good. [ [10] ] <U+202E>bad'
  """
  shown = "".join(f"<U+{ord(c):04X}>" if c not in "\n\t" and unicodedata.category(c) in HIDDEN else c for c in text)
  return re.sub(r"\](?=\])", "] ", re.sub(r"\[(?=\[)", "[ ", shown))


HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def is_cut(said: str) -> bool:
  """Whether a judge sees the beginning of an answer only."""
  return len(said) > MOST


def messages(prompt: JudgePrompt, question: Asked, said: str) -> tuple[str, str]:
  """What the judge is told and asked: the system's turn and the user's.

  Args:
    prompt: which.
    question: that was asked.
    said: what is judged of the completion.
  """
  parts = (question.prompt, question.answer, said[:MOST])
  values = dict(zip(("question", "reference", "answer"), map(fenced, parts), strict=True))
  # A text cannot hold its own hash, so nothing in it can end the fence.
  values["tag"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
  values["cut"] = f"\n(The answer goes on; only its first {MOST} characters are shown.)" if is_cut(said) else ""
  system, user = _text(prompt.name)
  return system, _SLOT.sub(lambda slot: values[slot[1]], user)


def opening_of(prompt: JudgePrompt) -> tuple[str, str]:
  """What `messages` says to every judge of every answer: the system's turn, and the beginning of the user's.

  >>> opening_of(PROMPTS["fact"])[1][-25:]
  '"====" and carry the tag '
  """
  system, user = _text(prompt.name)
  return system, _SLOT.split(user)[0]


def read_rating(prompt: JudgePrompt, reply: str) -> float | None:
  """The score that a judge's reply gives, from 0 to 1; None where it gives none, or several that differ.

  All double brackets of the reply have to agree: a judge that repeats what an answer demands is not believed.

  >>> [read_rating(PROMPTS["quality"], f"Fine. Rating: [[{said}]]") for said in ("10", "1", "5.5", "11", "ten")]
  [1.0, 0.0, 0.5, None, None]
  """
  found = _SAID.findall(reply)
  said = {one.strip() for one in found}
  if len(said) != 1 or reply.count("[[") != len(found):
    return None
  return prompt.value(said.pop())
