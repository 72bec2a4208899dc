"""`relearn status`: how far the commands are that work in an audit's workdir, from its files alone."""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.parallel.leases import SUFFIX, is_dead, read_lease

FOLDER, PLAN, DONE, FAILED = "stages", "plan.json", ".done.json", ".failed.json"
COMMAND = "command-"  # what the key of the lease begins with that a command has as long as it is there


def status(workdir: pathlib.Path) -> str:
  """A line for the whole audit, and a table of its stages.

  Raises:
    InputError: there is no audit, or it has not come to its first stage.
  """
  folder = workdir / FOLDER
  if not (folder / PLAN).exists():
    raise InputError("has no plan of an audit", file=workdir, field="--workdir",
                     mend="give the folder of an audit that has been started")
  plan = json.loads((folder / PLAN).read_text())
  leases = [one for path in folder.glob(f"*{SUFFIX}") if (one := read_lease(path))]
  by_stage = {about["what"]: (about, touched) for about, touched in leases if not is_dead(about)}
  commands = sum(about["key"].startswith(COMMAND) for about, _ in leases if not is_dead(about))
  rows = [(stage, *_state(workdir, stage, by_stage)) for stage in plan]
  if (workdir / "results.parquet").exists():
    head = f"All of {len(plan)} stages are done, and the results are written."
  else:
    counts = [f"{number} {word}" for word in ("done", "running", "begun", "failed", "left")
              if (number := sum(state == word for _, state, *_ in rows))]
    head = f"Of {len(plan)} stages: {', '.join(counts)}. {_left(rows, commands)}"
  table = ["| stage | runs | steps | | |", "|" + " --- |" * 5]
  table += [f"| {stage['name']} | {len(stage['runs'])} | {stage['steps']} | {state} | {more} |"
            for stage, state, more, _ in rows]
  return "\n".join([head, "", *table])


def _state(workdir: pathlib.Path, stage: dict[str, Any], leases: dict[str, Any]) -> tuple[str, str, float | None]:
  """A word for a stage, more about it, and the seconds that it took."""
  name, runs = stage["name"], set(stage["runs"])
  done, failed = (_read(workdir / FOLDER / f"{name}{suffix}") for suffix in (DONE, FAILED))
  if done and runs <= set(done["runs"]):
    return "done", f"{done['seconds']:g} s, {done['host']}", done["seconds"]
  if name in leases:
    about, touched = leases[name]
    ago = max(0.0, time.time() - touched / 1e9)
    who = f"{about['host']}, process {about['pid']}; last sign of life {ago:.0f} s ago"
    return "running", f"for {_in_words(time.time() - about['since'])} ({who})", None
  if failed:
    return "failed", f"{failed['host']}: {failed['error'].splitlines()[0]}", None
  return ("begun" if (workdir / "checkpoints" / name).exists() else "left"), "", None


def _left(rows: Sequence[tuple[dict[str, Any], str, str, float | None]], commands: int) -> str:
  """About how long it takes, by what stages of the same kind took: seconds a step and run."""
  units = lambda stage: stage["steps"] * len(stage["runs"])
  total = 0.0
  for kind in dict.fromkeys(stage["kind"] for stage, state, *_ in rows if state != "done"):
    known = [(units(stage), seconds) for stage, state, _, seconds in rows if stage["kind"] == kind and state == "done"
             and seconds]
    if not known:
      return f"No stage of kind {kind!r} is done yet, so the time left is not known."
    rate = sum(seconds for _, seconds in known) / sum(unit for unit, _ in known)
    total += rate * sum(units(stage) for stage, state, *_ in rows if stage["kind"] == kind and state != "done")
  who = "1 command" if commands <= 1 else f"{commands} commands"
  return f"About {_in_words(total / max(1, commands))} are left with {who} at work."


def _in_words(seconds: float) -> str:
  """For example "40 s", "12 min" or "3.5 h"."""
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
  return found
