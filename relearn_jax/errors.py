"""The one exception for input that a person can mend."""


class InputError(ValueError):
  """Bad input, found before any device work: what is wrong, where, and how to mend it.

  Args:
    problem: what is wrong, as the end of a sentence whose subject is the field or the file.
    file: path of the offending file, if any.
    field: configuration key, JSON field or tensor name, if any.
    line: line number in the file, counted from 1, if any.
    mend: what to do about it, as an imperative or as "expected ...".
  """

  def __init__(self, problem: str, *, file: object = None, field: str | None = None,
               line: int | None = None, mend: str | None = None):
    self.problem, self.file, self.field, self.line, self.mend = problem, file, field, line, mend
    where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
    what = problem if field is None else f"`{field}` {problem}"
    super().__init__(where + what + ("" if mend is None else f"; {mend}"))
