"""Prints the main figures of finished audits as a Markdown table: `python benchmarks/cells.py WORKDIR ...`."""

import argparse
import json
import pathlib
from typing import Any


def percent(cell: dict[str, Any] | None) -> str:
  """A mean with its interval, where there is one."""
  if cell is None:
    return "–"
  limits = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
  return f"{100 * cell['mean']:.1f} %{limits}"


def rows(workdir: pathlib.Path) -> list[list[str]]:
  """A row a method and variant: the scores of original, unlearned and relearned at depth 0, the control at its worst.

  Of several attacks the first one's.
  """
  summary = json.loads((workdir / "summary.json").read_text())
  scored = [cell for cell in summary["cells"] if cell["metric"] == summary["metric"]]
  last = max(cell["relearn_step"] for cell in scored)
  found = []
  for method, variant in ((method, variant) for method, by in summary["verdicts"].items() for variant in by):
    # The original, and a control that was given, were unlearned by none.
    here = [cell for cell in scored if cell["variant"] == variant and cell["method"] in (method, None)]
    get = lambda arm, point, depth, step, here=here: percent(next(
        (c for c in here if (c["arm"], c["point"], c["depth"], c["relearn_step"]) == (arm, point, depth, step)), None))
    control = max((cell for cell in here if cell["arm"] == "N"), key=lambda cell: cell["mean"], default=None)
    steps = [str(at[0]) if at else "none" for at in summary["selection"][method][variant].values()]
    found.append([workdir.name, method, variant, get("O", "original", None, 0), get("U", "unlearned", 0, 0),
                  get("U", "relearned", 0, last), percent(control), ", ".join(steps),
                  summary["verdicts"][method][variant]["verdict"]])
  return found


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir", type=pathlib.Path, nargs="+")
  head = ["audit", "method", "pair", "original", "unlearned", "relearned", "control, highest of all its cells",
          "unlearn step of each seed", "verdict"]
  print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
  for workdir in parser.parse_args().workdir:
    for row in rows(workdir):
      print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
  main()
