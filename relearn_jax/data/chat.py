"""Prompts as a checkpoint's chat template renders them: which template, what it is told, and of which day."""

import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from relearn_jax.errors import InputError

DATE = "2024-07-26"  # what Llama 3's own template says where it has no clock
DIRECTIVES = "aAbBcCdDeFgGhHIjmMnpPrRStTuUVwWxXyY"
PROBE = "probe"


@dataclasses.dataclass
class ChatSettings:
  """What a chat template is told besides the prompt; read where `chat_template` is set.

  Attributes:
    name: of the template, where the checkpoint has several; its default one if empty.
    system: the system's turn before the user's; none if empty.
    date: that a template which asks for today's is told (YYYY-MM-DD, at midnight), so that prompts stay the same.
    arguments: JSON object of what else the template reads, such as {"enable_thinking": false}.
  """

  name: str = ""
  system: str = ""
  date: str = DATE
  arguments: str = ""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A chat template with all that it is told but the prompt.

  Attributes:
    template: its text, with a clock that stands still.
    turns: before the user's.
    arguments: by name.
  """

  template: str
  turns: tuple[Mapping[str, str], ...] = ()
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def render(self, tokenizer: Any, prompt: str) -> str:
    """A prompt as the user's turn, up to where the model's own turn begins; transformers renders in a sandbox."""
    turns = [*map(dict, self.turns), {"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False,
                                             add_generation_prompt=True, **self.arguments))


def check_chat(settings: ChatSettings, used: bool, where: Any, prefix: str = "chat.") -> None:
  """Refuses what no template can be told, and what none is told; `prefix` stands before the fields in messages.

  Raises:
    InputError: naming the field.
  """
  fail = lambda field, problem, mend: InputError(problem, file=where, field=prefix + field, mend=mend)
  if not used:
    for field in dataclasses.fields(settings):
      if (value := getattr(settings, field.name)) != field.default:
        raise fail(field.name, f"is {value!r}, but prompts are not rendered by a chat template",
                   "set chat_template, or leave it out")
  try:
    datetime.date.fromisoformat(settings.date)
  except ValueError:
    raise fail("date", f"is {settings.date!r}", "expected YYYY-MM-DD") from None
  try:
    arguments = json.loads(settings.arguments or "{}")
  except ValueError as error:
    raise fail("arguments", f"is no JSON ({error})", "expected a JSON object") from None
  if not isinstance(arguments, dict):
    raise fail("arguments", f"is {settings.arguments!r}", "expected a JSON object")
  if taken := arguments.keys() & {"messages", "tools", "documents", "conversation", "chat_template", "tokenize",
                                  "add_generation_prompt", "strftime_now"}:
    raise fail("arguments", f"has {min(taken)!r}, which is set already", "leave it out")


def open_chat(settings: ChatSettings, tokenizer: Any, folder: pathlib.Path, field: str, prefix: str = "chat.") -> Chat:
  """The checkpoint's template with what it is told, tried on a word.

  Args:
    settings: what it is told.
    tokenizer: of the checkpoint.
    folder: that holds its files, for messages.
    field: what asks for a template, for messages.
    prefix: stands before the settings' names in messages.

  Raises:
    InputError: a setting is invalid, there is no such template, it fails, or it leaves out the prompt or something
      else that it is told.
  """
  check_chat(settings, True, None, prefix)
  template = _choose(settings, tokenizer, folder, field, prefix)
  if "strftime_now" in template:
    template = frozen_clock(datetime.date.fromisoformat(settings.date)) + template
  turns = ({"role": "system", "content": settings.system},) if settings.system else ()
  chat = Chat(template, turns, json.loads(settings.arguments or "{}"))

  def fail(name: str, problem: str, mend: str) -> InputError:
    return InputError(problem, file=folder, field=name, mend=mend)
  for name in chat.arguments:
    if not re.search(rf"\b{re.escape(name)}\b", template):
      raise fail(f"{prefix}arguments", f"has {name!r}, which the chat template does not read", "leave it out")
  try:
    shown = chat.render(tokenizer, PROBE)
    plain = Chat(template, (), chat.arguments).render(tokenizer, PROBE) if turns else ""
  except Exception as error:  # a template raises what it wants
    raise fail(field, f"asks for a chat template that fails ({type(error).__name__}: {str(error)[:200]})",
               f"give what it needs by {prefix}system or {prefix}arguments, or leave out what it refuses") from None
  if PROBE not in shown:
    raise fail(field, "asks for a chat template that leaves out the prompt", f"choose another by {prefix}name")
  if turns and shown == plain:
    raise fail(f"{prefix}system", "is left out by the chat template", "leave it out, or write it into the prompts")
  return chat


def _choose(settings: ChatSettings, tokenizer: Any, folder: pathlib.Path, field: str, prefix: str) -> str:
  """The text of the template that is named."""
  found = getattr(tokenizer, "chat_template", None)
  if not found:
    raise InputError("asks for the checkpoint's chat template, which it does not have",
                     file=folder / "tokenizer_config.json", field=field,
                     mend="leave it out, and write prompts in the form that the model was trained on")
  templates = found if isinstance(found, dict) else {"default": found}
  name = settings.name or "default"
  if name not in templates:
    raise InputError(f"is {name!r}, and the checkpoint's chat templates are {', '.join(sorted(templates))}"
                     if settings.name else f"is not given, and none of the checkpoint's chat templates "
                     f"({', '.join(sorted(templates))}) is its default", file=folder, field=f"{prefix}name",
                     mend="name one of them")
  return str(templates[name])


def frozen_clock(date: datetime.date) -> str:
  """Jinja that stands in front of a template and replaces its clock: `strftime_now(format)` at midnight of `date`."""
  midnight = datetime.datetime.combine(date, datetime.time())
  # A doubled per cent sign begins no directive, and comes back as one.
  text = r"format | replace('%%', '\x00')"
  for letter in DIRECTIVES:
    for directive in (f"%-{letter}", f"%{letter}"):
      text += f" | replace('{directive}', {json.dumps(midnight.strftime(directive))})"
  refuse = "{% if '%' in text %}{{ raise_exception('asks for the time as ' ~ format) }}{% endif %}"
  shown = r"{{ text | replace('\x00', '%') }}"
  # The newline belongs to the tag before it: what follows is rendered as if it stood alone.
  return f"{{% macro strftime_now(format) %}}{{% set text = {text} %}}{refuse}{shown}{{% endmacro %}}\n"
