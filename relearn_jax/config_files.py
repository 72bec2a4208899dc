"""Configuration files: Python files whose `get_config()` returns a dataclass, and the flags that set its fields."""

import dataclasses
import difflib
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from relearn_jax.errors import InputError

# Fields, of whatever configuration, that name a file or a folder.
PATHS = frozenset({"model", "forget", "retain", "refusals", "alternates", "anchors", "references", "unlearned",
                   "original", "control", "start", "relearn", "questions", "memorize"})


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
  """Dotted names of a nested dataclass's fields, with their values."""
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    found[prefix + field.name] = value
    if dataclasses.is_dataclass(value):
      found |= fields_of(value, f"{prefix}{field.name}.")
  return found


def load_config_file(path: str) -> Any:
  """What `get_config()` of FILE, or `get_config(argument)` of FILE:argument, returns; `InputError` if nothing does."""
  file, colon, argument = path.partition(".py:")
  file += ".py" if colon else ""
  if not pathlib.Path(file).is_file():
    raise InputError("does not exist", file=file, field="--config", mend="give a file such as configs/names.py")
  spec = importlib.util.spec_from_file_location("relearn_config", file)
  if spec is None or spec.loader is None:
    raise InputError("is no Python file", file=path, field="--config", mend="give a file such as configs/names.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument) if colon else module.get_config()
  except InputError:
    raise
  except Exception as error:
    raise InputError(f"cannot be read ({type(error).__name__}: {error})", file=path, field="--config",
                     mend="it must define get_config()") from error
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise InputError(f"returns {type(config).__name__}", file=path, field="get_config", mend="expected a dataclass")
  return config


# Fields, and groups of fields (with a dot), of audits as they were called before; see CHANGELOG.md.
MOVED = {
    "unlearned": "arms.unlearned", "original": "arms.original", "control": "arms.control", "dtype": "arms.dtype",
    "name": "case.name", "forget": "case.forget", "retain": "case.retain", "relearn": "case.relearn",
    "questions": "case.questions", "chat_template": "ask.chat_template", "chat.": "ask.chat.",
    "interview.": "ask.", "evaluate.runs_per_call": "ask.runs_at_once", "evaluate.": "ask.", "relearn.": "attack.",
    "attack.adapter.kind": "attack.adapters", "attack.adapter.": "attack.lora.", "base.couples": "case.couples",
    "base.attachment": "case.attachment", "base.max_names": "case.max_names", "base.": "arms.pretrain.",
    "case.seeds": "seeds", "unlearn.max_asr": "unlearn.max_score", "methods": "unlearn.methods",
    "methods.": "unlearn.settings.", "defences.": "unlearn.defences."}


def moved_fields(arguments: Sequence[str], config: Any) -> list[str]:
  """The command line, with fields of an audit by their present names where they are given by those they had before."""
  known = fields_of(config)
  found = []
  for argument in arguments:
    name, equals, value = argument.partition("=")
    field = name.lstrip("-").removeprefix("config.")
    if name.startswith("-") and name.lstrip("-") != field and field not in known:
      for plain in (field, field.removeprefix("audit.")):
        if (now := _moved(plain, "case.forget" in known)) in known:
          argument = f"--config.{now}{equals}{value}"
          break
    found.append(argument)
  return found


def _moved(field: str, is_loaded: bool) -> str:
  """The present name of a field; its own where it has not moved."""
  if field == "method":
    return "arms.method" if is_loaded else "unlearn.methods"
  if field in MOVED:
    return MOVED[field]
  group = max((old for old in MOVED if old.endswith(".") and field.startswith(old)), key=len, default="")
  return MOVED[group] + field.removeprefix(group) if group else field


def check_overrides(arguments: Sequence[str], path: str, config: Any) -> None:
  """Refuses `--config.some.field` where there is no such field, naming the nearest ones."""
  known = fields_of(config)
  for argument in arguments:
    name = argument.lstrip("-").split("=")[0]
    if not name.startswith("config."):
      continue
    field = name.removeprefix("config.")
    if field not in known:
      near = difflib.get_close_matches(field, known, 3, 0.5)
      raise InputError("is no field of the configuration" + (f" (nearest: {', '.join(near)})" if near else ""),
                       file=path, field=field, mend=f"`relearn COMMAND --config={path} --help` lists them")
    if dataclasses.is_dataclass(known[field]):
      raise InputError("is a group of fields", file=path, field=field, mend="set one of its fields")


def config_path(arguments: Sequence[str]) -> str | None:
  """The file that `--config` names on a command line, if any.

  >>> config_path(["--config=configs/names.py", "--config.method=npo"])
  'configs/names.py'
  """
  for index, argument in enumerate(arguments):
    name, _, value = argument.lstrip("-").partition("=")
    if name == "config":
      return value or (arguments[index + 1] if index + 1 < len(arguments) else None)
  return None


def expand_paths(config: Any) -> None:
  """Puts the home folder in the place of the `~` at the start of each path in a configuration."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      expand_paths(value)
    elif field.name in PATHS and isinstance(value, str):
      setattr(config, field.name, os.path.expanduser(value))
    elif field.name in PATHS and isinstance(value, tuple):
      setattr(config, field.name, tuple(map(os.path.expanduser, value)))


def expand_config(arguments: Sequence[str]) -> list[str]:
  """The command line, with the home folder in the place of the `~` at the start of what `--config` names.

  >>> expand_config(["--config=configs/names.py", "--config.method=npo"])
  ['--config=configs/names.py', '--config.method=npo']
  """
  found = list(arguments)
  for index, argument in enumerate(arguments):
    name, equals, value = argument.partition("=")
    if name.lstrip("-") == "config" and name != "config":
      if equals:
        found[index] = f"{name}={os.path.expanduser(value)}"
      elif index + 1 < len(found):
        found[index + 1] = os.path.expanduser(found[index + 1])
  return found


def last_values(arguments: Sequence[str], config: Any) -> list[str]:
  """The command line, in which of a tuple that is set several times the last value counts, as it does of a number.

  The flags' own parser would string the tuples together.

  Args:
    arguments: of the command.
    config: what its configuration file returns.
  """
  tuples = {field for field, value in fields_of(config).items() if isinstance(value, tuple)}
  kept, seen = list(arguments), set[str]()
  for index in reversed(range(len(arguments))):
    name, equals, _ = arguments[index].partition("=")
    field = name.lstrip("-").removeprefix("config.")
    if name.lstrip("-") == field or not name.startswith("-") or field not in tuples:
      continue
    if field in seen:
      del kept[index:index + (1 if equals else 2)]
    seen.add(field)
  return kept
