"""Prints the main figures of finished audits as Markdown: `python benchmarks/cells.py [--all] WORKDIR ...`.

With `--all`, for every method and attack a table of every model (with the unlearn steps of its seeds) by relearn step.
With `--scores`, the other scores too: those at the first depth, before the attack and after its last step.
"""

import argparse
import json
import pathlib
from typing import Any

ATTACK = ("relearn_set", "adapter", "learning_rate")
SCORES = ("rouge_l_recall", "answer_probability", "exact_memorization", "extraction_strength", "perplexity")


def percent(cell: dict[str, Any] | None) -> str:
  """A mean with its interval, where there is one."""
  if cell is None:
    return "–"
  limits = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
  return f"{100 * cell['mean']:.1f} %{limits}"


def rows(workdir: pathlib.Path) -> list[list[str]]:
  """A row a method and variant: original, unlearned and relearned in the worst cell, the control at its highest."""
  summary = json.loads((workdir / "summary.json").read_text())
  scored = [cell for cell in summary["cells"] if cell["metric"] == summary["metric"]]
  last = max(cell["relearn_step"] for cell in scored)
  found = []
  for method, variant in ((method, variant) for method, by in summary["verdicts"].items() for variant in by):
    # The original, and a control that was given, were unlearned by none.
    here = [cell for cell in scored if cell["variant"] == variant and cell["method"] in (method, None)]
    verdict = summary["verdicts"][method][variant]
    depth, step = verdict["depth"] or 0, last if verdict["relearn_step"] is None else verdict["relearn_step"]
    attack = [verdict[key] for key in ATTACK]
    get = lambda arm, point, depth, step, here=here, attack=attack: percent(next(
        (c for c in here if (c["arm"], c["point"], c["depth"], c["relearn_step"]) == (arm, point, depth, step)
         and (not step or attack == [None] * 3 or [c[key] for key in ATTACK] == attack)), None))
    worst = f"{', '.join(f'{part:g}' if isinstance(part, float) else str(part) for part in attack)}, step {step}"
    control = max((cell for cell in here if cell["arm"] == "N"), key=lambda cell: cell["mean"], default=None)
    steps = [str(at[0]) if at else "none" for at in summary["selection"][method][variant].values()]
    found.append([workdir.name, method, variant, get("O", "original", None, 0), get("U", "unlearned", depth, 0),
                  get("U", "relearned", depth, step), worst, percent(control), ", ".join(steps), verdict["verdict"]])
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


def other_scores(workdir: pathlib.Path) -> list[str]:
  """A table a method, as lines: the other scores at the first depth, under each attack's last step."""
  summary = json.loads((workdir / "summary.json").read_text())
  last, lines = max(cell["relearn_step"] for cell in summary["cells"]), []
  there = [name for name in SCORES if any(cell["metric"] == name for cell in summary["cells"])]
  for method, variant in ((method, variant) for method, by in summary["verdicts"].items() for variant in by):
    cells = [cell for cell in summary["cells"] if cell["variant"] == variant and cell["method"] in (method, None)
             and cell["depth"] in (0, None) and cell["relearn_step"] in (0, last)]
    models = sorted({(cell["arm"], cell["relearn_step"], *(cell[key] or "" for key in ATTACK)) for cell in cells
                     if cell["metric"] in there}, key=lambda model: ("OUN".index(model[0]), *map(str, model[1:])))
    lines += ["", f"{method}, {variant}:", "", "| model | " + " | ".join(there) + " |",
              "| --- " * (len(there) + 1) + "|"]
    for arm, step, *attack in models:
      means = {cell["metric"]: f"{cell['mean']:.3f}" for cell in cells if (
          cell["arm"], cell["relearn_step"], *(cell[key] or "" for key in ATTACK)) == (arm, step, *attack)}
      name = f"{arm}, {', '.join(map(str, attack))}, step {step}" if step else arm
      lines.append(f"| {name} | " + " | ".join(means.get(metric, "–") for metric in there) + " |")
  return lines


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--scores", action="store_true")
  parser.add_argument("workdir", type=pathlib.Path, nargs="+")
  flags = parser.parse_args()
  head = ["audit", "method", "pair", "original", "unlearned", "relearned", "worst cell",
          "control, highest of all its cells", "unlearn step of each seed", "verdict"]
  print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
  for workdir in flags.workdir:
    for row in rows(workdir):
      print("| " + " | ".join(row) + " |")
  for line in (line for workdir in flags.workdir if flags.all for line in heat_maps(workdir)):
    print(line)
  for line in (line for workdir in flags.workdir if flags.scores for line in other_scores(workdir)):
    print(line)


if __name__ == "__main__":
  main()
