"""The one exception for input that a person can mend."""

from collections.abc import Callable
from typing import Any


class InputError(ValueError):
  """Bad input, found before any device work: what is wrong, where, and how to mend it.

  Args:
    problem: what is wrong, as the end of a sentence whose subject is the field or the file.
    file: path of the offending file, if any.
    field: configuration key, JSON field or tensor name, if any.
    line: line number in the file, counted from 1, if any.
    mend: what to do about it, as an imperative or as "expected ...".

  >>> print(InputError("is 0", file="names.py", field="steps", mend="expected at least 1"))
  names.py: `steps` is 0; expected at least 1
  """

  def __init__(self, problem: str, *, file: object = None, field: str | None = None,
               line: int | None = None, mend: str | None = None):
    self.problem, self.file, self.field, self.line, self.mend = problem, file, field, line, mend
    where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
    what = problem if field is None else f"`{field}` {problem}"
    super().__init__(where + what + ("" if mend is None else f"; {mend}"))


def checker(where: object, prefix: str = "") -> Callable[[bool, str, Any, str], None]:
  """A function (ok, field, value, mend) that raises `InputError` unless `ok`; `prefix` stands before the fields."""
  def need(ok: bool, field: str, value: Any, mend: str) -> None:
    if not ok:
      raise InputError(f"is {value!r}", file=where, field=prefix + field, mend=mend)
  return need
