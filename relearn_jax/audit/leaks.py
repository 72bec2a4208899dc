"""A relearn set that holds what is asked about stops an audit, before any device work."""

import pathlib
from typing import Any

from relearn_jax.cases.base import Case
from relearn_jax.cases.leakage import Leakage, check_case
from relearn_jax.cases.spelling import AS_IT_IS
from relearn_jax.errors import InputError

MAX_LISTED = 20  # possible leaks in a message


def refuse_leaks(case: Case, where: Any, allow_leakage: bool, allowed_lines: tuple[int, ...], which: str = "") -> None:
  """`InputError` for a relearn set that holds what is asked about, unless that is allowed.

  Args:
    case: whose relearn sets are checked.
    where: the configuration's file, named where a set comes from no file.
    allow_leakage: go on in any case.
    allowed_lines: in which possible findings are allowed.
    which: of several cases, for messages.
  """
  checked = check_case(case, allowed_lines)
  for found in checked:
    if not allow_leakage and not found.passed:
      raise _leak(found, case.files.get(found.relearn_set), where, which)
  there = {hit.line for found in checked for hit in (*found.possible, *found.hits)}
  if idle := sorted(set(allowed_lines) - there):
    raise InputError(f"names line {idle[0]}, in which nothing is found", file=where, field="allowed_lines",
                     mend="remove it: lines that were read have changed, or are other ones")


def _leak(found: Leakage, file: pathlib.Path | None, where: Any, which: str) -> InputError:
  """What is said of a relearn set that did not pass: the first certain finding, or all lines of possible ones."""
  hit = next((hit for hit in found.hits if hit.certain), found.hits[0])
  how = "" if hit.how == AS_IT_IS else f" ({hit.how})"
  text = f"line {hit.line} of relearn set {found.relearn_set!r}{which} contains {hit.found!r}{how}"
  place: dict[str, Any] = {"file": file or where, "field": "case.relearn" if file else "case"}
  flag = "pass --allow_leakage (the verdict will be INCONCLUSIVE)"
  if hit.certain:
    return InputError(f"{text}, which is asked about", mend=f"remove it, or {flag}", **place)
  others = [f"line {hit.line} {hit.found!r}" for hit in found.hits[1:]]
  more = "" if not others else "; so do " + ", ".join(others[:MAX_LISTED]) + (
      f" and {len(others) - MAX_LISTED} more" if len(others) > MAX_LISTED else "")
  return InputError(
      f"{text}, which may give away what is asked about{more}", mend=f"read the lines; remove what tells, name the "
      f"others in allowed_lines, such as ({hit.line},), or {flag}", **place)
