"""Methods side by side: one table a variant, as JSON, Markdown, HTML and for the terminal."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from relearn_jax.report.tables import TextTable, markdown, number, percent, plain

HEAD = ("method", "original", "unlearned", "relearned", "control", "half back after", "unlearn steps",
        "retained text, unlearned", "verdict", "ms a step", "seconds")
LEGEND = (
    "Attack success in per cent and the log-probability of a token of the retained text in nats, each with its 95 % "
    "interval over seeds and prompts; the original and all settings of the attack are the same for all methods. "
    "“Control” is the never-trained model that went through the same, in the cell of its curves in which it is "
    "highest. “Half back after”: the first relearn step that was asked at which half of what unlearning took is back. "
    "“Unlearn steps”: of each seed, until attack success was at most what the configuration allows. “ms a step”: the "
    "median of an unlearning step of all runs; “seconds”: unlearning and attack with all their questions.")


def tables(rows: Sequence[dict[str, Any]]) -> list[TextTable]:
  """A table a variant, a row a method."""
  found = []
  for variant in rows[0]["variants"] if rows else ():
    lines = []
    for row in rows:
      v = row["variants"][variant]
      steps = ", ".join("never" if step is None else str(step) for step in v["unlearn_steps"])
      back = "–" if v["unlearned"] is None else "never" if v["half"] is None else f"{v['half']} steps"
      seconds = sum(value for stage, value in row["seconds"].items() if stage in ("unlearn", "relearn"))
      lines.append((row["name"], percent(v["original"]), percent(v["unlearned"]), percent(v["relearned"]),
                    percent(v["control"]), back, steps, number(v["retain"]), v["verdict"]["verdict"],
                    "–" if row["step_ms"] is None else f"{row['step_ms']:.0f}", f"{seconds:.0f}"))
    kept = next((row["variants"][variant]["retain_original"] for row in rows), None)
    found.append(TextTable(f"Variant {variant}; retained text of the original: {number(kept)}", HEAD, tuple(lines)))
  return found


def closing(workdir: pathlib.Path) -> str:
  """What the terminal shows at the end."""
  rows = json.loads((workdir / "comparison.json").read_text())
  return "\n\n".join(f"{table.caption}\n\n{plain(table)}" for table in tables(rows))


def render_again(workdir: pathlib.Path) -> None:
  """Renders a comparison from its comparison.json."""
  write_comparison(workdir, json.loads((workdir / "comparison.json").read_text()))


def write_comparison(workdir: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes comparison.json, comparison.md and comparison.html (last), each complete or not at all."""
  def write(name: str, text: str) -> None:
    temporary = workdir / (name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(workdir / name)
  shown = tables(rows)
  settings = [(row["name"], ". ".join([", ".join(f"{key} {value:g}" for key, value in row["settings"].items()),
                                       *row["ended"]])) for row in rows]
  write("comparison.json", json.dumps(rows, indent=1) + "\n")
  lines = ["# Unlearning methods side by side", "", LEGEND, ""]
  lines += [markdown(table) for table in shown] + ["Settings:", ""]
  write("comparison.md", "\n".join([*lines, *(f"- {name}: {text}" for name, text in settings)]) + "\n")
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("relearn_jax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  write("comparison.html", environment.get_template("comparison.html.jinja").render(
      tables=shown, legend=LEGEND, settings=settings))
