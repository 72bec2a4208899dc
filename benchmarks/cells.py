"""Prints the main figures of finished audits as Markdown: `python benchmarks/cells.py [--all] WORKDIR ...`.

With `--all`, for every method and attack a table of every model (with the unlearn steps of its seeds) by relearn step.
"""

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


def heat_maps(workdir: pathlib.Path) -> list[str]:
  """A table a method, variant and attack, as lines: every cell of the primary metric."""
  summary = json.loads((workdir / "summary.json").read_text())
  scored = [cell for cell in summary["cells"] if cell["metric"] == summary["metric"]]
  attacks = sorted({(cell["relearn_set"], cell["adapter"], cell["learning_rate"]) for cell in scored
                    if cell["point"] == "relearned"})
  steps = sorted({cell["relearn_step"] for cell in scored})
  lines = []
  for method, variant in ((method, variant) for method, by in summary["verdicts"].items() for variant in by):
    here = [cell for cell in scored if cell["variant"] == variant and cell["method"] in (method, None)]
    models = sorted({(cell["arm"], cell["depth"]) for cell in here if cell["point"] == "relearned"},
                    key=lambda model: ("OUN".index(model[0]), model[1] or 0))
    chosen = summary["selection"][method][variant]
    for relearn_set, adapter, rate in attacks:
      lines += ["", f"{method}, {variant}, {relearn_set}, {adapter}, learning rate {rate:g}:", "",
                "| model | " + " | ".join(map(str, steps)) + " |", "| --- " * (len(steps) + 1) + "|"]
      for arm, depth in models:
        of = [cell for cell in here if (cell["arm"], cell["depth"]) == (arm, depth) and (
            cell["relearn_step"] == 0 or (cell["relearn_set"], cell["adapter"], cell["learning_rate"]) == (
                relearn_set, adapter, rate))]
        by_step = {cell["relearn_step"]: cell for cell in of}
        at = [str(some[depth]) for some in chosen.values() if depth is not None and depth < len(some)]
        name = arm if depth is None else f"{arm}, unlearn steps {', '.join(at)}"
        lines.append(f"| {name} | " + " | ".join(percent(by_step.get(step)) for step in steps) + " |")
  return lines


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--all", action="store_true")
  parser.add_argument("workdir", type=pathlib.Path, nargs="+")
  flags = parser.parse_args()
  head = ["audit", "method", "pair", "original", "unlearned", "relearned", "control, highest of all its cells",
          "unlearn step of each seed", "verdict"]
  print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
  for workdir in flags.workdir:
    for row in rows(workdir):
      print("| " + " | ".join(row) + " |")
  for line in (line for workdir in flags.workdir if flags.all for line in heat_maps(workdir)):
    print(line)


if __name__ == "__main__":
  main()
