"""Writing a report's files from stored rows: summary.json, figures, report.html, report.md."""

import base64
import json
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from relearn_jax.audit.results_file import RESULTS_FILE, read_rows
from relearn_jax.audit.summary import summarize
from relearn_jax.metrics.keyword import find_keyword
from relearn_jax.parallel.processes import write_atomically
from relearn_jax.report import figures, judge_tables, leak_findings, tables

STORY = ("A model memorised a secret, unlearned it, and was then finetuned on text in which the secret never occurs. "
         "If the secret comes back, more than it does in a model that never knew it and went through the same, it had "
         "only been suppressed.")
SHOWN = 2000  # characters of what a model said; the whole stands in answers.parquet
TURNING = frozenset(map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def shown_text(text: str) -> str:
  """What a model said, as it may stand in a report: it has an end, and what would turn text around is written out.

  >>> shown_text("a\\u202eb")
  'a⟨U+202E⟩b'
  """
  unseen = lambda c: c in TURNING or unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t\r"
  plain = "".join(f"⟨U+{ord(c):04X}⟩" if unseen(c) else c for c in text[:SHOWN])
  return plain + (f"… ({len(text) - SHOWN} characters more)" if len(text) > SHOWN else "")


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


def headline(verdicts: dict[str, Any]) -> str:
  """What was found of a method, in a sentence."""
  words: dict[str, list[str]] = {}
  for variant, verdict in verdicts.items():
    words.setdefault(verdict["verdict"], []).append(variant)
  return "; ".join(f"{word} for {'variant' if len(which) == 1 else 'variants'} {', '.join(which)}"
                   for word, which in words.items())


def headlines(summary: dict[str, Any]) -> str:
  """What was found, in a sentence: of one method by variant, of several how many of each word."""
  methods = summary["methods"]
  if len(methods) == 1:
    return headline(summary["verdicts"][methods[0]])
  counts: dict[str, int] = {}
  for verdicts in summary["verdicts"].values():
    for verdict in verdicts.values():
      counts[verdict["verdict"]] = counts.get(verdict["verdict"], 0) + 1
  return "; ".join(f"{word} {count} times" if count > 1 else f"{word} once" for word, count in counts.items())


def _data(path: pathlib.Path) -> str:
  """A figure as part of the page."""
  return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def method_context(whole: dict[str, Any], facts: dict[str, Any], method: str,
                   images: list[tuple[str, pathlib.Path]]) -> dict[str, Any]:
  """What the templates show of one method; tables and curves are of the worst cell's attack."""
  summary = figures.view(whole, method)
  return {
      "name": method, "verdicts": summary["verdicts"], "headline": headline(summary["verdicts"]),
      "main": tables.main_table(summary, facts), "scores": tables.scores_table(summary),
      "excess": tables.excess_table(summary), "by_seed": tables.seeds_table(summary),
      "attacks": tables.attacks_table(whole, method),
      "search": tables.search_table(summary), "utility": tables.utility_table(summary),
      "selection": tables.selection_table(summary), "curves": tables.curve_table(summary),
      "figures": [(caption, _data(path), path) for caption, path in images],
      "examples": [_example(row) for row in facts.get("examples", []) if row.get("method", method) == method]}


def _example(row: dict[str, Any]) -> dict[str, Any]:
  """A question of the facts with what models said, as they are shown."""
  said = {name: shown_text(text) for name, text in row["completions"].items()}
  return row | {"prompt": shown_text(row["prompt"]), "completions": said}


def context(whole: dict[str, Any], facts: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Everything the templates show; draws the figures into `folder`."""
  reference, several = facts.get("reference", {}), len(whole["methods"]) > 1
  provenance = facts.get("provenance") or {}
  if isinstance(provenance, str):  # results of an earlier version speak of the first relearn set alone
    provenance = {"relearn": provenance}
  draw = lambda method: figures.draw_method(whole, method, folder / method if several else folder)
  bars = figures.draw_side_by_side(whole, folder) if several else None
  return {
      "summary": whole, "headline": headlines(whole), "reference": reference, "several": several,
      "story": facts.get("story") or STORY, "step": figures.last_step(whole),
      "side_by_side": [tables.methods_table(whole, variant) for variant in next(iter(whole["verdicts"].values()))]
                      if several else [],
      "methods_legend": tables.METHODS_LEGEND, "judges": judge_tables.every_table(whole),
      "choices": tables.choices_table(whole),
      "bars": bars and (bars[0], _data(bars[1]), bars[1]),
      "methods": [method_context(whole, facts, method, draw(method)) for method in whole["methods"]],
      "relearn_text": facts.get("relearn_text", {}), "provenance": provenance, "config": flat(facts.get("config", {})),
      "settings": facts.get("settings", {}), "leakage": leak_findings.gather(whole["leakage"]),
      "leakage_sentence": leak_findings.sentence(leak_findings.gather(whole["leakage"]))}


def markdown(shown: dict[str, Any], workdir: pathlib.Path) -> str:
  """report.md; completions stand in code spans, with what could end one replaced."""
  summary = shown["summary"]
  code = lambda text: "`" + " ".join(text.split()).replace("`", "'") + "`"
  title = f"# Relearning audit: {summary['case']}, {', '.join(summary['methods'])}"
  lines = [title, "", f"**{shown['headline']}**", ""]
  if shown["several"]:
    lines += [shown["methods_legend"], ""]
  for table in shown["side_by_side"]:
    lines += [tables.markdown(table), ""]
  if shown["bars"]:
    lines += [f"![{shown['bars'][0]}]({shown['bars'][2].relative_to(workdir)})", ""]
  for method in shown["methods"]:
    lines += _markdown_method(method, shown["several"], code, workdir)
  if shown["choices"]:
    lines += ["", "## Questions with options", "", tables.markdown(shown["choices"])]
  if shown["judges"]:
    lines += ["", "## Judges", ""] + [tables.markdown(table) for table in shown["judges"]]
  lines += ["", "## Leakage check", "", leak_findings.sentence(shown["leakage"]), ""]
  lines += [f"- {name}: {code(text)}" for name, text in shown["provenance"].items()]
  lines += leak_findings.markdown_lines(shown["leakage"], code)
  lines += ["", "## Provenance", ""]
  for name in ("versions", "fingerprints", "seconds"):
    lines += [f"- {name}: " + ", ".join(f"{key} {value}" for key, value in summary[name].items())]
  lines += [f"- {note}" for note in summary["notes"]]
  return "\n".join(lines) + "\n"


def _markdown_method(shown: dict[str, Any], several: bool, code: Any, workdir: pathlib.Path) -> list[str]:
  lines = [f"# {shown['name']}", ""] if several else []
  lines += ["## Verdicts", ""]
  for variant, v in shown["verdicts"].items():
    lines += [f"- **{variant}: {v['verdict']}**. {v['reason']} {' '.join(v['notes'])}".rstrip()]
    lines += [f"  - does not count: {cell}" for cell in v["not_counted"]]
  for title, name in (("Results", "main"), ("Other scores", "scores"), ("Every seed", "by_seed"),
                      ("Excess over the control", "excess"),
                      ("Attacks", "attacks"), ("The strongest attack", "search"), ("Curves", "curves"),
                      ("Utility", "utility"), ("Selection", "selection")):
    if shown[name] is not None:
      lines += ["", f"## {title}", "", tables.markdown(shown[name])]
  lines += ["## Figures", ""] + [f"![{caption}]({path.relative_to(workdir)})" for caption, _, path in shown["figures"]]
  lines += ["", "## Examples", ""]
  for row in shown["examples"]:
    lines += [f"- variant {row['variant']}, {row['question']}: {code(row['prompt'])}"]
    lines += [f"  - {name}: {code(text)}" for name, text in row["completions"].items()]
  return lines


def report_from_rows(workdir: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], dict[str, Any]]:
  """Renders everything from `results.parquet`, without a model.

  Returns:
    The path of report.html (written last), the summary, and the facts.

  Raises:
    InputError: `results.parquet` is missing or damaged.
  """
  rows, facts = read_rows(workdir / RESULTS_FILE)
  summary = summarize(rows, facts)
  write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
  shown = context(summary, facts, workdir / "figures")
  write_atomically(workdir / "report.md", markdown(shown, workdir))
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("relearn_jax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  environment.globals["highlight"] = highlight
  write_atomically(workdir / "report.html", environment.get_template("page.html.jinja").render(shown))
  return workdir / "report.html", summary, facts
