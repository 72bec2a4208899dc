"""The leakage check as a report shows it: every relearn text once, whoever is attacked with it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
  """A line of a relearn set and what was found in it, by whom it is used, and in which spelling."""

  where: str
  line: int
  text: str
  found: str
  how: str


@dataclasses.dataclass(frozen=True)
class Checked:
  """The check of all relearn sets of an audit.

  Attributes:
    num_sets, num_lines: different texts, and their lines.
    num_failed: texts with findings that are certain, or possible and not allowed.
    certain, unread, allowed: findings: certain ones; possible ones that were not allowed, and that were.
    closest: how much of a question stands in the line that comes closest to one, and which; "": not measured.
  """

  num_sets: int
  num_lines: int
  num_failed: int
  certain: tuple[Finding, ...]
  unread: tuple[Finding, ...]
  allowed: tuple[Finding, ...]
  closest: str = ""


def gather(rows: Sequence[Mapping[str, Any]]) -> Checked:
  """The check of all relearn sets, from its facts."""
  texts: dict[Any, list[Mapping[str, Any]]] = {}
  for row in rows:
    texts.setdefault(row.get("digest") or (row["relearn_set"], row["variant"], row["seed"]), []).append(row)
  hits = [pair for same in texts.values() for pair in _once(same, "hits")]
  return Checked(
      len(texts), sum(same[0]["num_lines"] for same in texts.values()),
      sum(not all(row["passed"] for row in same) for same in texts.values()),
      tuple(_finding(where, hit) for where, hit in hits if hit.get("certain", True)),
      tuple(_finding(where, hit) for where, hit in hits if not hit.get("certain", True)),
      tuple(_finding(where, hit) for same in texts.values() for where, hit in _once(same, "possible")),
      _closest(rows))


def _closest(rows: Sequence[Mapping[str, Any]]) -> str:
  near = max((row for row in rows if row.get("overlap")), key=lambda row: row["overlap"]["share"], default=None)
  if near is None:
    return ""
  share, question, line = (near["overlap"][name] for name in ("share", "question", "line"))
  return (f"{100 * share:.0f} % of the words that say what the question and its answer are about ({question}, "
          f"line {line} of {near['relearn_set']})")


def _once(same: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, Mapping[str, Any]]]:
  """The findings in one text, each once, with who uses it."""
  found = {(hit["line"], hit["found"]): hit for row in same for hit in row.get(kind, [])}
  return [(_users(same), hit) for hit in found.values()]


def _users(same: Sequence[Mapping[str, Any]]) -> str:
  seeds: dict[tuple[str, str], list[str]] = {}
  for row in same:
    held = seeds.setdefault((row["relearn_set"], row["variant"]), [])
    if row["seed"] is not None and str(row["seed"]) not in held:
      held.append(str(row["seed"]))
  say = lambda numbers: f", seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" if numbers else ""
  return "; ".join(f"{name} (variant {variant}{say(numbers)})" if name != variant else name + say(numbers)
                   for (name, variant), numbers in seeds.items())


def _finding(where: str, hit: Mapping[str, Any]) -> Finding:
  how = hit.get("how", "as it is")
  return Finding(where, hit["line"], hit["text"], hit["found"], "" if how == "as it is" else how)


def sentence(checked: Checked) -> str:
  """What was checked, and the outcome."""
  if not checked.num_sets:
    return "No relearn set was checked."
  sets = "1 relearn set" if checked.num_sets == 1 else f"{checked.num_sets} different relearn sets"
  lines = "1 line" if checked.num_lines == 1 else f"{checked.num_lines} lines"
  outcome = "nothing that is asked about" if not checked.num_failed else f"{checked.num_failed} with findings"
  return f"{sets}, {lines}: {outcome}."


def markdown_lines(checked: Checked, code: Any) -> Iterable[str]:
  """The findings as items of a list; `code` makes a code span of a text."""
  for title, findings in (("asked about", checked.certain), ("possible, not allowed", checked.unread),
                          ("possible, allowed", checked.allowed)):
    for one in findings:
      yield (f"- {title}: {one.where}, line {one.line}: {code(one.found)}{f' ({one.how})' if one.how else ''} in "
             f"{code(one.text)}")
