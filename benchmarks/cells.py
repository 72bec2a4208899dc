"""Prints the main figures of finished audits as a Markdown table: `python benchmarks/cells.py WORKDIR ...`."""

import argparse
import json
import pathlib
from typing import Any


def percent(cell: dict[str, Any] | None) -> str:
  """A mean with its interval."""
  if cell is None:
    return "–"
  return f"{100 * cell['mean']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def rows(workdir: pathlib.Path) -> list[list[str]]:
  """A row a variant: attack success of original, unlearned and relearned at depth 0, the control at its worst."""
  summary = json.loads((workdir / "summary.json").read_text())
  asr = [cell for cell in summary["cells"] if cell["metric"] == "asr"]
  last = max(cell["relearn_step"] for cell in asr)
  found = []
  for variant, verdict in summary["verdicts"].items():
    here = [cell for cell in asr if cell["variant"] == variant]
    get = lambda arm, point, depth, step, here=here: percent(next(
        (c for c in here if (c["arm"], c["point"], c["depth"], c["relearn_step"]) == (arm, point, depth, step)), None))
    control = max((cell for cell in here if cell["arm"] == "N"), key=lambda cell: cell["mean"])
    steps = [str(at[0]) if at else "none" for at in summary["selection"][variant].values()]
    found.append([workdir.name, variant, get("O", "original", None, 0), get("U", "unlearned", 0, 0),
                  get("U", "relearned", 0, last), percent(control), ", ".join(steps), verdict["verdict"]])
  return found


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir", type=pathlib.Path, nargs="+")
  head = ["audit", "pair", "original", "unlearned", "relearned", "control, highest of all its cells",
          "unlearn step of each seed", "verdict"]
  print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
  for workdir in parser.parse_args().workdir:
    for row in rows(workdir):
      print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
  main()
