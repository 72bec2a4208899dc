"""Writing a report's files from stored rows: summary.json, figures, report.html, report.md."""

import base64
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from relearn_jax.audit.rows import read_rows
from relearn_jax.audit.summary import summarize
from relearn_jax.metrics.keyword import find_keyword
from relearn_jax.report import figures, leakage, tables

CAPTIONS = {
    "asr_vs_relearn_steps": "Attack success against relearning steps, a line for each unlearn depth, with 95 % "
                            "intervals.",
    "heatmap": "Attack success of the unlearned model by unlearning and relearning steps, on a fixed scale from 0 "
               "to 1.",
    "logprob_vs_relearn_steps": "Log-probability of the answer after the prompt, against relearning steps.",
    "unlearning": "Attack success along unlearning, before any attack."}

STORY = ("A model memorised a secret, unlearned it, and was then finetuned on text in which the secret never occurs. "
         "If the secret comes back, more than it does in a model that never knew it and went through the same, it had "
         "only been suppressed.")


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)


def highlight(completion: str, begun: str, keywords: Sequence[str], case: bool = False) -> markupsafe.Markup:
  """A completion as safe HTML, every hit in it marked.

  Everything is escaped: a model's words are never markup.

  Args:
    completion: follows `begun` as it is.
    begun: a keyword may begin in it, but counts and is marked only where it ends in the completion.
    keywords, case: of the question.
  """
  found = [(max(start - len(begun), 0), end - len(begun)) for keyword in keywords
           for start, end in find_keyword(begun + completion, keyword, case=case) if end > len(begun)]
  shown, place = markupsafe.Markup(), 0
  for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
    start = max(start, place)
    start += len(completion[start:end]) - len(completion[start:end].lstrip())  # where it begins in the prompt
    if start < end:
      shown += markupsafe.escape(completion[place:start])
      shown += markupsafe.Markup("<mark>{}</mark>").format(completion[start:end])
      place = end
  return shown + markupsafe.escape(completion[place:])


def flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
  """A nested configuration as dotted fields."""
  if isinstance(values, dict):
    return [row for key, value in values.items() for row in flat(value, f"{prefix}{key}.")]
  return [(prefix[:-1], json.dumps(values))]


def headline(summary: dict[str, Any]) -> str:
  """What was found, in a sentence."""
  words: dict[str, list[str]] = {}
  for variant, verdict in summary["verdicts"].items():
    words.setdefault(verdict["verdict"], []).append(variant)
  return "; ".join(f"{word} for {'variant' if len(which) == 1 else 'variants'} {', '.join(which)}"
                   for word, which in words.items())


def context(whole: dict[str, Any], facts: dict[str, Any], images: dict[str, pathlib.Path]) -> dict[str, Any]:
  """Everything the templates show; tables and figures are of the worst learning rate of the attack."""
  summary = figures.of_worst_rate(whole)
  reference = facts.get("reference", {})
  encode = lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
  return {
      "summary": summary, "headline": headline(summary), "reference": reference,
      "story": facts.get("story", STORY), "main": tables.main_table(summary, facts),
      "excess": tables.excess_table(summary), "by_seed": tables.seeds_table(summary),
      "rates": tables.rates_table(whole),
      "utility": tables.utility_table(summary), "selection": tables.selection_table(summary),
      "curves": tables.curve_table(summary), "step": tables.last_step(summary),
      "figures": [(name, CAPTIONS[name], encode(path)) for name, path in images.items()],
      "examples": facts.get("examples", []), "relearn_text": facts.get("relearn_text", {}),
      "provenance": facts.get("provenance", ""), "config": flat(facts.get("config", {})),
      "settings": facts.get("settings", {}), "leakage": leakage.gather(summary["leakage"]),
      "leakage_sentence": leakage.sentence(leakage.gather(summary["leakage"]))}


def markdown(shown: dict[str, Any]) -> str:
  """report.md; completions stand in code spans, with what could end one replaced."""
  summary = shown["summary"]
  code = lambda text: "`" + " ".join(text.split()).replace("`", "'") + "`"
  lines = [f"# Relearning audit: {summary['case']}, {summary['method']}", "", f"**{shown['headline']}**", "",
           "## Verdicts", ""]
  for variant, v in summary["verdicts"].items():
    lines += [f"- **{variant}: {v['verdict']}**. {v['reason']} {' '.join(v['notes'])}".rstrip()]
    lines += [f"  - does not count: {cell}" for cell in v["not_counted"]]
  for title, name in (("Results", "main"), ("Every seed", "by_seed"), ("Excess over the control", "excess"),
                      ("Learning rates of the attack", "rates"), ("Curves", "curves"),
                      ("Utility", "utility"), ("Selection", "selection")):
    lines += ["", f"## {title}", "", tables.markdown(shown[name])]
  lines += ["## Figures", ""] + [f"![{caption}](figures/{name}.png)" for name, caption, _ in shown["figures"]]
  lines += ["", "## Leakage check", "", leakage.sentence(shown["leakage"]), ""]
  lines += leakage.markdown_lines(shown["leakage"], code)
  lines += ["", "## Examples", ""]
  for row in shown["examples"]:
    lines += [f"- variant {row['variant']}, {row['question']}: {code(row['prompt'])}"]
    lines += [f"  - {name}: {code(text)}" for name, text in row["completions"].items()]
  lines += ["", "## Provenance", ""]
  for name in ("versions", "fingerprints", "seconds"):
    lines += [f"- {name}: " + ", ".join(f"{key} {value}" for key, value in summary[name].items())]
  lines += [f"- {note}" for note in summary["notes"]]
  return "\n".join(lines) + "\n"


def report_from_rows(workdir: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], dict[str, Any]]:
  """Renders everything from `results.parquet`, without a model.

  Returns:
    The path of report.html (written last), the summary, and the facts.

  Raises:
    InputError: `results.parquet` is missing or damaged.
  """
  rows, facts = read_rows(workdir / "results.parquet")
  summary = summarize(rows, facts)
  write(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
  images = figures.draw_all(figures.of_worst_rate(summary), workdir / "figures")
  shown = context(summary, facts, images)
  write(workdir / "report.md", markdown(shown))
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("relearn_jax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  environment.globals["highlight"] = highlight
  write(workdir / "report.html", environment.get_template("page.html.jinja").render(shown))
  return workdir / "report.html", summary, facts
