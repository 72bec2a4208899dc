"""`relearn <command>`: from a command line to an exit status."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from absl import flags
from ml_collections import config_flags

from relearn_jax.commands import COMMANDS
from relearn_jax.config_files import (
  check_overrides,
  config_path,
  expand_config,
  fields_of,
  last_values,
  load_config_file,
  moved_fields,
)
from relearn_jax.errors import InputError
from relearn_jax.interrupts import INTERRUPTED, PREEMPTED, Preempted, handle_interrupts
from relearn_jax.parallel import join
from relearn_jax.parallel.processes import is_first
from relearn_jax.process import CLOSED_PIPE, accept_any_terminal, disk_trouble, drop_output, flush_output, leave


def usage() -> str:
  """The list of commands."""
  lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
  return "\n".join([
      "relearn: finds out whether a language model has really forgotten.", "",
      "usage: relearn <command> [--flag=value ...]", "", *lines, "",
      "`relearn <command> --help` lists a command's flags."])


def command_help(name: str, values: flags.FlagValues, arguments: Sequence[str]) -> str:
  """A command's flags and, where a configuration file is given, its fields and their values."""
  lines = [f"relearn {name}: {COMMANDS[name].summary}", "", "flags:"]
  for flag in (values[name] for name in sorted(values)):
    default = "" if flag.default is None else f" (default: {flag.default})"
    lines.append(f"  --{flag.name}: {flag.help}{default}")
  if path := config_path(arguments):
    lines += ["", f"fields of {path}, set by --config.FIELD=VALUE:"]
    fields = fields_of(load_config_file(path))
    lines += [f"  {field} = {value!r}" for field, value in fields.items() if not dataclasses.is_dataclass(value)]
  return "\n".join(lines)


def run_command(name: str, arguments: Sequence[str]) -> str:
  """Runs a command with its arguments and returns what is printed at the end.

  Raises:
    InputError, flags.Error: the arguments, or what they name, are bad.
  """
  if not COMMANDS[name].spreads:
    return _run(name, arguments)
  own, rest = join.take_flags(arguments)
  with join.together(own, name, _interrupted(name)):
    text = _run(name, rest)
  return text if is_first() else ""


def _run(name: str, arguments: Sequence[str]) -> str:
  """Runs a command of this process, told apart from how it finds the others."""
  command, values = COMMANDS[name], flags.FlagValues()
  command.define(values)
  shows_help = bool({"--help", "-h", "--helpfull"} & set(arguments))
  if command.config:
    arguments = expand_config(arguments)
    if not shows_help and (path := config_path(arguments)):
      config = load_config_file(path)
      arguments = moved_fields(arguments, config)
      check_overrides(arguments, path, config)
      arguments = last_values(arguments, config)
  line = [f"relearn {name}", *arguments]
  if command.config:
    config_flags.DEFINE_config_file(
        "config", None, f"Experiment file, such as {command.config}; --config.some.field=value sets a field.",
        flag_values=values, sys_argv=line)
  if shows_help:
    if command.spreads:  # which are not among those that are parsed here
      join.define_flags(values)
      flags.adopt_module_key_flags(join, values)
    return command_help(name, values, arguments)
  if rest := values(line)[1:]:
    raise InputError(f"is not understood: {' '.join(rest)}", field="argument", mend="flags are --name=value")
  join.check_started_alike(values, name)
  try:
    return command.run(values)
  except (InputError, flags.Error, BrokenPipeError):
    raise
  except Exception as error:  # libraries wrap what the system says in kinds of their own
    if (trouble := disk_trouble(error, _places(values))) is None:
      raise
    raise trouble from None


def _places(values: flags.FlagValues) -> dict[str, str]:
  """Flag or setting -> a file or folder that the command writes, the most likely first."""
  from relearn_jax.parallel.start import cache_dir
  found = {f"--{name}": values[name].value for name in ("workdir", "output") if name in values}
  references = getattr(values["config"].value, "references", None) if "config" in values else None
  found |= {"references": references, "RELEARN_CACHE": str(cache_dir())}
  return {name: place for name, place in found.items() if place}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command and returns its exit status.

  After bad input, or trouble with a disk, it is 2, with one message; after an interrupt 130; after SIGTERM 75:
  what was trained is saved, and the same command is to be started again; where the output's reader has gone 141, as
  after SIGPIPE.

  Args:
    argv: the command's name and its arguments; by default those of this process, which then ends here where it was
      interrupted at work.
  """
  # transformers would advise to install torch, which nothing here needs.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  accept_any_terminal()
  name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
  if argv is None:
    handle_interrupts(_interrupted(name))
  try:
    status, text, stream = _result(name, arguments)
    try:
      print(text, file=stream)
      flush_output()
    except BrokenPipeError:
      raise
    except OSError as error:
      drop_output()
      print(f"relearn {name}: the output cannot be written ({error.strerror})", file=sys.stderr)
      status = 2
  except BrokenPipeError:
    status = CLOSED_PIPE
  if argv is None and status in (INTERRUPTED, PREEMPTED, CLOSED_PIPE):
    leave(status)
  drop_output()
  return status


def _result(name: str, arguments: Sequence[str]) -> tuple[int, str, TextIO]:
  """Exit status, what is printed, and where."""
  if name in ("", "--help", "-h", "help"):
    return 0 if name else 2, usage(), sys.stdout
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return 2, f"relearn: there is no command {name!r}{hint}\n\n{usage()}", sys.stderr
  try:
    return 0, run_command(name, arguments), sys.stdout
  except (InputError, flags.Error) as error:
    return 2, f"relearn {name}: {error}", sys.stderr
  except KeyboardInterrupt:
    return INTERRUPTED, f"\n{_interrupted(name)}", sys.stderr
  except Preempted:
    return PREEMPTED, f"\n{_interrupted(name)}", sys.stderr


def _interrupted(name: str) -> str:
  go_on = "; run the same command again to continue" if name in COMMANDS and COMMANDS[name].continues else ""
  return f"relearn {name}: interrupted{go_on}"


if __name__ == "__main__":
  sys.exit(main())
