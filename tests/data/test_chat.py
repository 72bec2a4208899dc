"""Chat templates: which is chosen, what it is told, and a clock that stands still."""

import dataclasses
import datetime
import pathlib
from typing import Any

import pytest

from relearn_jax.data.chat import Chat, ChatSettings, check_chat, frozen_clock, open_chat
from relearn_jax.data.jsonl import Row
from relearn_jax.data.tokens import prompt_ids
from relearn_jax.errors import InputError

from .test_texts import tokenizer

PLAIN = "{% for m in messages %}<u> {{ m['content'] }} {% endfor %}<a>"
CLOCK = "{%- if strftime_now is defined %}{{ strftime_now(FORMAT) }} {% endif %}" + PLAIN
OPTIONS = PLAIN + "{% if loud is defined and loud %} w9{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


def opened(template: Any, **settings: str) -> Chat:
  return open_chat(ChatSettings(**settings), tokenizer(template), pathlib.Path("folder"), "--chat_template", "--chat_")


def shown(template: Any, prompt: str = "w1", **settings: str) -> str:
  return opened(template, **settings).render(tokenizer(template), prompt)


def test_a_template_is_chosen_by_name() -> None:
  several = {"rag": "<s> " + PLAIN, "tool_use": "</s> " + PLAIN}
  assert shown(several, name="rag") == "<s> <u> w1 <a>" and shown(several, name="tool_use").startswith("</s>")
  assert shown(several | {"default": PLAIN}) == shown(PLAIN) == shown(PLAIN, name="default") == "<u> w1 <a>"
  with pytest.raises(InputError, match=r"`--chat_name` is not given, and none of .* \(rag, tool_use\) is its default"):
    opened(several)
  with pytest.raises(InputError, match="`--chat_name` is 'raq', and the checkpoint's chat templates are rag, tool_use"):
    opened(several, name="raq")


@pytest.mark.parametrize("date", ["2024-07-26", "2031-01-05"])
@pytest.mark.parametrize("format", [
    "%d %b %Y", "%Y-%m-%d", "%A, %B %-d", "%H:%M:%S", "100%% of %y%%d", "", "%-m/%-d/%y"])
def test_the_clock_stands_still(date: str, format: str) -> None:
  template = CLOCK.replace("FORMAT", repr(format))
  expected = datetime.datetime.fromisoformat(date).strftime(format)
  assert shown(template, date=date) == f"{expected} <u> w1 <a>"


def test_a_clock_changes_nothing_else_of_a_template() -> None:
  """Spaces and newlines around a template's beginning are rendered as they were."""
  for start in ("", "\n", "\n\n", "  ", " \n {%- set x = 1 %}", "{% set x = 1 %}\n"):
    template = start + PLAIN + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    model = tokenizer(template)
    assert opened(template).render(model, "w1") == model.apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=False, add_generation_prompt=True)


def test_a_time_that_is_not_of_a_day_is_refused() -> None:
  with pytest.raises(InputError, match="template that fails .*asks for the time as %s"):
    opened(CLOCK.replace("FORMAT", "'%s'"))


def test_the_day_is_within_macros_too() -> None:
  template = "{% macro day() %}{{ strftime_now('%d %b') }}{% endmacro %}{{ day() }} " + PLAIN
  assert shown(template) == "26 Jul <u> w1 <a>"
  assert frozen_clock(datetime.date(2024, 7, 26)).count("\n") == 1


def test_system_prompts_and_arguments_reach_the_template() -> None:
  assert shown(PLAIN, system="w5 w6") == "<u> w5 w6 <u> w1 <a>"
  assert shown(OPTIONS, arguments='{"loud": true}') == "<u> w1 <a> w9" and shown(OPTIONS) == "<u> w1 <a>"
  chat, row = opened(OPTIONS, system="w5", arguments='{"loud": true}'), Row({"prompt": "w1"}, 1)
  assert prompt_ids(tokenizer(), row, pathlib.Path("rows"), 20, 1, chat=chat) == [3, 10, 3, 6, 4, 14]


@pytest.mark.parametrize(("template", "settings", "problem"), [
    (NO_SYSTEM, {"system": "w5"}, "`--chat_template` asks for .* that fails .*no system role.*--chat_system"),
    ("<u> {{ messages[-1]['content'] }}", {"system": "w5"}, "`--chat_system` is left out by the chat template"),
    ("<u> w3", {}, "`--chat_template` asks for a chat template that leaves out the prompt"),
    (PLAIN, {"arguments": '{"loud": true}'}, "`--chat_arguments` has 'loud', which the chat template does not read"),
    (None, {}, "tokenizer_config.json: `--chat_template` asks for the checkpoint's chat template, which it does not"),
    (PLAIN, {"date": "26 Jul"}, "`--chat_date` is '26 Jul'; expected YYYY-MM-DD"),
    (PLAIN, {"arguments": "{"}, "`--chat_arguments` is no JSON"),
    (PLAIN, {"arguments": "[1]"}, "expected a JSON object"),
    (PLAIN, {"arguments": '{"messages": []}'}, "has 'messages', which is set already")])
def test_refuses(template: str | None, settings: dict, problem: str) -> None:
  with pytest.raises(InputError, match=problem):
    opened(template, **settings)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ChatSettings)])
def test_what_no_template_is_told_is_refused(field: str) -> None:
  check_chat(ChatSettings(), False, "here")
  with pytest.raises(InputError, match=rf"here: `chat\.{field}` is '2025-01-01', but prompts are not rendered"):
    check_chat(ChatSettings(**{field: "2025-01-01"}), False, "here")
