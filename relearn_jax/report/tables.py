"""The tables of a report as plain rows of text, the same for HTML, Markdown and the terminal."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from relearn_jax.metrics.choices import CHOICE_METRICS
from relearn_jax.metrics.scores import METRICS, PERPLEXITY
from relearn_jax.report.figures import attacks_of, curve, depths, last_step, pick, sentence_case, view, worst_point

METHODS_LEGEND = (
    "Scores in per cent, in each method's worst cell (the depth, the attack and the step with the largest excess over "
    "the control), before and after the attack, with 95 % intervals over seeds and questions. Control: the model "
    "without the secret that went through the same, in the cell of all its curves in which it is highest. Half back "
    "after: the first relearn step that was asked at which half of what unlearning took is back. "
    "Unlearn steps: of each seed. Retained text: nats a token, unlearned. Seconds: unlearning, attacks and interviews; "
    "the original's attacks count with the first method.")


@dataclasses.dataclass(frozen=True)
class TextTable:
  """A caption, column heads and rows of text."""

  caption: str
  head: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def percent(cell: Mapping[str, Any] | None) -> str:
  """A mean and its interval in per cent."""
  if cell is None:
    return "–"
  limits = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
  return f"{100 * cell['mean']:.1f} %{limits}"


def number(cell: Mapping[str, Any] | None) -> str:
  """A mean and its interval as numbers."""
  if cell is None:
    return "–"
  return f"{cell['mean']:.2f}" + ("" if cell["low"] is None else f" [{cell['low']:.2f}, {cell['high']:.2f}]")


def _title(summary: Mapping[str, Any]) -> str:
  return sentence_case(METRICS[summary["metric"]].title)


def _first(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
  return cells[0] if cells else None


def main_table(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> TextTable:
  """The paper's table with the control beside it: depth 0, last relearn step, 95 % intervals."""
  cells, step, rows, reference = summary["cells"], last_step(summary), [], facts.get("reference", {})
  for variant in summary["verdicts"]:
    get = lambda arm, point, depth, at, v=variant: _first(
        pick(cells, variant=v, arm=arm, point=point, depth=depth, relearn_step=at, metric=summary["metric"]))
    row = [variant, percent(get("O", "original", None, 0)), percent(get("U", "unlearned", 0, 0)),
           percent(get("U", "relearned", 0, step)), percent(get("N", "relearned", 0, step))]
    if reference:
      known = lambda key, v=variant: reference.get(key, {}).get(v)
      row.append(" → ".join("–" if (x := known(key)) is None else f"{100 * x:.0f} %"
                            for key in ("unlearned", "relearned")))
    rows.append(tuple(row))
  head = [facts.get("variant_name", "repetitions"), "original", "unlearned", "relearned",
          facts.get("control_name", "never-trained control")]
  if reference:
    head.append("published")
  where = " at unlearn depth 0" if summary["trajectory"] else ""
  return TextTable(f"{_title(summary)} (mean and 95 % interval over seeds and prompts){where}, before and after {step} "
                   "relearning steps", tuple(head), tuple(rows))


def seeds_table(summary: Mapping[str, Any]) -> TextTable:
  """Every seed beside the mean: the cells of the main table."""
  cells, step, rows = summary["cells"], last_step(summary), []
  for variant in summary["verdicts"]:
    for name, arm, point, depth, at in (("original", "O", "original", None, 0), ("unlearned", "U", "unlearned", 0, 0),
                                        ("relearned", "U", "relearned", 0, step),
                                        ("control", "N", "relearned", 0, step),
                                        ("original, attacked", "O", "relearned", None, step)):
      for cell in pick(cells, variant=variant, arm=arm, point=point, depth=depth, relearn_step=at,
                       metric=summary["metric"])[:1]:
        each = ", ".join(f"{seed}: {100 * mean:.0f}" for seed, mean
                         in zip(cell["seeds"], cell["seed_means"], strict=True))
        rows.append((variant, name, f"{100 * cell['mean']:.1f}", each))
  return TextTable(f"{_title(summary)} of every seed, per cent",
                   ("variant", "model", "mean", f"seed: {METRICS[summary['metric']].title}"), tuple(rows))


def attacks_table(summary: Mapping[str, Any], method: str) -> TextTable:
  """Every attack: what it did to U, N and O at its last step, depth 0."""
  rows, step = [], last_step(summary)
  for variant in summary["verdicts"][method]:
    for attack in attacks_of(dict(summary), variant):
      cells = pick(summary["cells"], variant=variant, metric=summary["metric"], relearn_step=step,
                   relearn_set=attack[0], adapter=attack[1], learning_rate=attack[2])
      get = lambda arm, depth, cells=cells: percent(_first(
          [cell for cell in pick(cells, arm=arm, depth=depth) if cell["method"] in (method, None)]))
      rows.append((variant, str(attack[0]), str(attack[1]), f"{attack[2]:g}", get("U", 0), get("N", 0),
                   get("O", None)))
  return TextTable(f"{_title(summary)} after {step} relearning steps of each attack, depth 0",
                   ("variant", "relearn set", "adapter", "learning rate", "relearned", "control", "original, attacked"),
                   tuple(rows))


def search_table(summary: Mapping[str, Any]) -> TextTable | None:
  """The strongest attack of each variant; None where none was searched."""
  rows = []
  for variant, one in summary["search"].items():
    if one["depth"] is None:
      rows.append((variant, one["note"], *("–",) * 6))
      continue
    what = (f"{one['relearn_set']}, {one['adapter']}, rate {one['learning_rate']:g}, depth {one['depth']}, step "
            f"{one['relearn_step']}")
    rows.append((variant, what, f"{one['allowed']} of {one['tried']}", f"{one['chosen_excess']:.2f}",
                 f"{one['excess']:.2f}", percent(one["unlearned"]), percent(one["control"]),
                 ", ".join(map(str, one["seeds"]))))
  return TextTable(
      "The strongest attack that keeps the bound on utility, chosen on one half of seeds and clusters of questions and "
      "reported on the other",
      ("variant", "attack", "allowed", "excess where chosen", "excess on the other half", "unlearned model", "control",
       "seeds of that half"), tuple(rows)) if rows else None


def methods_table(summary: Mapping[str, Any], variant: str) -> TextTable:
  """Methods side by side: a row each."""
  rows, metric = [], summary["metric"]
  for method in summary["methods"]:
    shown, verdict = view(dict(summary), method), summary["verdicts"][method][variant]
    cells, whole = shown["cells"], pick(summary["cells"], variant=variant, metric=metric)
    get = lambda arm, point, depth, at, cells=cells, what=metric: _first(
        pick(cells, variant=variant, arm=arm, point=point, depth=depth, relearn_step=at, metric=what))
    depth, step = worst_point(summary, verdict)
    original, unlearned = get("O", "original", None, 0), get("U", "unlearned", depth, 0)
    control = max((cell for cell in whole if cell["arm"] == "N" and cell["method"] in (method, None)),
                  key=lambda cell: cell["mean"], default=None)
    attack = shown["attacks"][variant]
    back = half(original, unlearned, curve(cells, variant, "U", depth, metric)[1:])
    ended = {str(run["seed"]) for run in summary["ended"] if run["arm"] == "U" and run["variant"] == variant
             and run["method"] in (method, None) and run["stage"].startswith(("memorize", "reinforce", "unlearn"))}
    steps = [str(at[depth]) if len(at) > depth else "not finite" if seed in ended else "never"
             for seed, at in summary["selection"][method][variant].items()]
    seconds = sum(value for stage, value in summary["seconds"].items()
                  if stage in (f"unlearn-{method}", f"reinforce-{method}") or stage.startswith(f"attack-{method}-"))
    rows.append((
        method, verdict["verdict"], percent(unlearned), percent(get("U", "relearned", depth, step)), percent(control),
        "–" if attack[2] is None else f"{attack[1]}, {attack[2]:g}, step {step}",
        "–" if unlearned is None else "never" if back is None else f"{back} steps",
        ", ".join(steps), number(get("U", "unlearned", depth, 0, what="retain_logprob")), f"{seconds:.0f}"))
  first, kept = (_first(pick(summary["cells"], variant=variant, arm="O", point="original", metric=what))
                 for what in (metric, "retain_logprob"))
  return TextTable(
      f"Variant {variant}; {METRICS[summary['metric']].title} of the original {percent(first)}, its retained text "
      f"{number(kept)}",
      ("method", "verdict", "unlearned", "relearned", "control", "worst attack", "half back after",
       "unlearn steps", "retained text", "seconds"), tuple(rows))


def choices_table(summary: Mapping[str, Any]) -> TextTable | None:
  """Accuracy on questions with options, by letter and in full, of the models of the main table; None without such."""
  step, rows = last_step(summary), []
  for method in summary["methods"]:
    shown = view(dict(summary), method)
    for variant in shown["verdicts"]:
      for metric, one in CHOICE_METRICS.items():
        get = lambda arm, point, depth, at, cells=shown["cells"], v=variant, m=metric: percent(_first(
            pick(cells, variant=v, arm=arm, point=point, depth=depth, relearn_step=at, metric=m)))
        rows.append((method, variant, one.title, get("O", "original", None, 0), get("U", "unlearned", 0, 0),
                     get("U", "relearned", 0, step), get("N", "unlearned", 0, 0), get("N", "relearned", 0, step)))
  there = any(cell["metric"] in CHOICE_METRICS for cell in summary["cells"])
  return TextTable(
      f"Questions with options: share whose right option is the likeliest, before and after {step} relearning "
      "steps; by letter, with the options in the prompt, and by the answers in full (mean log-probability of a token), "
      "without them. Guessing among four options gives 25 %",
      ("method", "variant", "by", "original", "unlearned", "relearned", "control, unlearned", "control"),
      tuple(rows)) if there else None


def scores_table(summary: Mapping[str, Any]) -> TextTable | None:
  """The scores beside the one that proves knowledge, in the cells of the main table; None where there are none."""
  cells, step, rows = summary["cells"], last_step(summary), []
  there = {cell["metric"] for cell in cells} - {summary["metric"]}
  for variant in summary["verdicts"]:
    for name, title in (*((name, metric.title) for name, metric in METRICS.items()),
                        (PERPLEXITY, "perplexity of generic text")):
      get = lambda arm, point, depth, at, v=variant, name=name: _first(
          pick(cells, variant=v, arm=arm, point=point, depth=depth, relearn_step=at, metric=name))
      if name in there:
        rows.append((variant, title, *(number(get(*place)) for place in (
            ("O", "original", None, 0), ("U", "unlearned", 0, 0), ("U", "relearned", 0, step), ("N", "unlearned", 0, 0),
            ("N", "relearned", 0, step)))))
  return TextTable(f"Other scores, at unlearn depth 0, before and after {step} relearning steps",
                   ("variant", "score", "original", "unlearned", "relearned", "control, unlearned",
                    "control, relearned"), tuple(rows)) if rows else None


def half(original: Mapping[str, Any] | None, unlearned: Mapping[str, Any] | None, relearned: Sequence[Mapping[str, Any]]
         ) -> int | None:
  """The first relearn step that was asked at which half of what unlearning took is back; None if it never is."""
  if original is None or unlearned is None or original["mean"] <= unlearned["mean"]:
    return None
  wanted = (original["mean"] + unlearned["mean"]) / 2
  return next((cell["relearn_step"] for cell in relearned if cell["mean"] >= wanted), None)


def excess_table(summary: Mapping[str, Any]) -> TextTable:
  """The worst cell of each variant, its excess over the control and its level above it, and the share recovered."""
  rows = []
  for variant, v in summary["verdicts"].items():
    if v["excess"] is None:
      rows.append((variant, *("–",) * 7))
      continue
    recovery = "–" if v["recovery"] is None else f"{100 * v['recovery']:.0f} %"
    both = lambda low, high: "–" if low is None or high is None else f"{low:.3f}, {high:.3f}"
    attack = f"{v['relearn_set']}, {v['adapter']}, rate {v['learning_rate']:g}"
    rows.append((variant, f"depth {v['depth']}, {attack}, step {v['relearn_step']}",
                 f"{v['excess']:.2f}", both(v["low"], v["high"]), f"{v['level']:.2f}",
                 both(v["level_low"], v["level_high"]),
                 f"{v['control_gain']:+.2f}", recovery))
  return TextTable("Excess = gain of the unlearned model − gain of the control; level = unlearned model − control, "
                   "both in the worst cell over depths, attacks and steps. Limits are one-sided, 95 % each: the "
                   "lower ones hold for all cells at once, the upper ones for the largest of the cells that count",
                   ("variant", "worst cell", "excess", "its limits", "level", "its limits", "control's gain",
                    "recovered of what was lost"), tuple(rows))


def utility_table(summary: Mapping[str, Any]) -> TextTable:
  """Mean token log-probability of the retained text."""
  cells, step, rows = summary["cells"], last_step(summary), []
  for variant in summary["verdicts"]:
    get = lambda arm, point, depth, at, v=variant: number(_first(
        pick(cells, variant=v, arm=arm, point=point, depth=depth, relearn_step=at, metric="retain_logprob")))
    rows.append((variant, get("O", "original", None, 0), get("U", "unlearned", 0, 0), get("U", "relearned", 0, step),
                 get("N", "unlearned", 0, 0)))
  return TextTable("Utility: mean log-probability of a token of the retained text (nats; 0 is perfect)",
                   ("variant", "original", "unlearned", f"relearned, step {step}", "control, unlearned"), tuple(rows))


def selection_table(summary: Mapping[str, Any]) -> TextTable:
  """The unlearn step of each depth, for every seed."""
  rows = tuple((variant, seed, ", ".join(map(str, steps)) or "never reached")
               for variant, seeds in summary["selection"].items() for seed, steps in seeds.items())
  return TextTable("Unlearn steps at which each run was attacked, by depth; its control is taken at the same steps",
                   ("variant", "seed", "steps (depth 0, 1, …)"), rows)


def curve_table(summary: Mapping[str, Any]) -> TextTable:
  """Every point of the attack-success curves, as numbers."""
  cells, rows = summary["cells"], []
  steps = sorted({cell["relearn_step"] for cell in cells})
  for variant in summary["verdicts"]:
    lines = [("O", None)] + [(arm, depth) for arm in "UN" for depth in depths(cells, variant)]
    for arm, depth in lines:
      points = {cell["relearn_step"]: cell for cell in curve(cells, variant, arm, depth, summary["metric"])}
      rows.append((variant, arm, "–" if depth is None else str(depth),
                   *(f"{points[s]['mean']:.3f}" if s in points else "–" for s in steps)))
  return TextTable(f"{_title(summary)}, mean after each number of relearning steps",
                   ("variant", "arm", "depth", *map(str, steps)), tuple(rows))


def markdown(table: TextTable) -> str:
  """A Markdown table under its caption."""
  cell = lambda text: text.replace("|", "\\|").replace("\n", " ")
  lines = [table.caption + ":", "", "| " + " | ".join(map(cell, table.head)) + " |", "|" + " --- |" * len(table.head)]
  return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]) + "\n"


def plain(table: TextTable) -> str:
  """A table for the terminal, columns aligned."""
  rows = [table.head, *table.rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
  line = lambda row: "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
  return "\n".join([line(table.head), "  ".join("─" * width for width in widths), *map(line, table.rows)])


def closing(summary: Mapping[str, Any], facts: Mapping[str, Any], width: int) -> str:
  """What the terminal shows at the end: the main table and the verdicts, in lines of at most `width`.

  Args:
    summary: of the audit.
    facts: what the rows do not hold; published figures to show beside ours, where there are any.
    width: columns; a table that is wider is left to the terminal.
  """
  wrap = lambda text, indent="": textwrap.fill(text, width, subsequent_indent=indent)
  methods = summary["methods"]
  if len(methods) > 1:
    found = [methods_table(summary, variant) for variant in summary["verdicts"][methods[0]]]
    return "\n\n".join("\n".join([wrap(table.caption + ":"), "", plain(table)]) for table in found)
  shown = view(dict(summary), methods[0])
  verdicts = [wrap(f"  {variant}: {v['verdict']}. {v['reason']}", " " * 5) for variant, v in shown["verdicts"].items()]
  table = main_table(shown, facts)
  return "\n".join([wrap(table.caption + ":"), "", plain(table), "", "Verdict by variant:", *verdicts])
