"""The figures, from the summary's cells alone. Same 0-1 scale everywhere, so that panels compare."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from relearn_jax.metrics.scores import METRICS

Cells = Sequence[dict[str, Any]]
U_COLOURS = ("#b2182b", "#ef8a62", "#fdbb84", "#fdd49e")
N_COLOUR, O_COLOUR = "#2166ac", "#4d4d4d"


def pick(cells: Cells, **labels: Any) -> list[dict[str, Any]]:
  """The cells whose labels have these values."""
  return [cell for cell in cells if all(cell[key] == value for key, value in labels.items())]


def curve(cells: Cells, variant: str, arm: str, depth: int | None, metric: str) -> list[dict[str, Any]]:
  """A relearn curve from step 0: the unlearned (or original) point, then the relearned ones."""
  start = "original" if depth is None else "unlearned"
  found = [cell for point in (start, "relearned")
           for cell in pick(cells, variant=variant, arm=arm, depth=depth, metric=metric, point=point)]
  return sorted(found, key=lambda cell: cell["relearn_step"])


def sentence_case(text: str) -> str:
  """With a capital at the beginning; the others stay, such as those of ROUGE-L."""
  return text[:1].upper() + text[1:]


Attack = tuple[str | None, str | None, float | None]  # relearn set, adapter, learning rate


def view(summary: dict[str, Any], method: str, attacks: Mapping[str, Attack] | None = None) -> dict[str, Any]:
  """The summary of one method, with the cells of one attack for each variant.

  Args:
    summary: of the audit.
    method: whose verdicts, selection and trajectory it keeps.
    attacks: which attack, by variant; that of the worst cell by default.
  """
  verdicts = summary["verdicts"][method]
  shown = attacks or {variant: worst_attack(summary, method, variant) for variant in verdicts}
  is_shown = lambda cell: cell["method"] in (method, None) and all(
      cell[key] in (None, value) for key, value in zip(("relearn_set", "adapter", "learning_rate"),
                                                       shown[cell["variant"]], strict=True))
  return summary | {
      "method": method, "verdicts": verdicts, "selection": summary["selection"][method], "attacks": shown,
      "search": summary["search"].get(method, {}),
      "cells": [cell for cell in summary["cells"] if is_shown(cell)],
      "trajectory": [cell for cell in summary["trajectory"] if cell["method"] == method]}


def worst_attack(summary: dict[str, Any], method: str, variant: str) -> Attack:
  """That of a variant's worst cell; the first where there is none."""
  verdict = summary["verdicts"][method][variant]
  if verdict["learning_rate"] is not None:
    return verdict["relearn_set"], verdict["adapter"], verdict["learning_rate"]
  return next(iter(attacks_of(summary, variant)), (None, None, None))


def last_step(summary: Mapping[str, Any]) -> int:
  """The last relearn step that was asked."""
  return max(cell["relearn_step"] for cell in summary["cells"])


def worst_point(summary: Mapping[str, Any], verdict: Mapping[str, Any]) -> tuple[int, int]:
  """Depth and relearn step of a verdict's worst cell; the first depth and the last step where it has none."""
  return verdict["depth"] or 0, last_step(summary) if verdict["relearn_step"] is None else verdict["relearn_step"]


def attacks_of(summary: dict[str, Any], variant: str) -> list[Attack]:
  """Every attack that was made on a variant."""
  return sorted({(cell["relearn_set"], cell["adapter"], cell["learning_rate"])
                 for cell in pick(summary["cells"], variant=variant, point="relearned")})


def strongest_by_kind(summary: dict[str, Any], method: str) -> dict[tuple[str, str], dict[str, Attack]]:
  """Relearn set and adapter -> by variant the attack at the learning rate that brought U highest, depth 0."""
  found: dict[tuple[str, str], dict[str, Attack]] = {}
  for variant in summary["verdicts"][method]:
    for attack in attacks_of(summary, variant):
      kinds = found.setdefault((str(attack[0]), str(attack[1])), {})
      top = lambda one, variant=variant: _top(summary, method, variant, one)
      if variant not in kinds or top(attack) > top(kinds[variant]):
        kinds[variant] = attack
  return found


def _top(summary: dict[str, Any], method: str, variant: str, attack: Attack) -> float:
  cells = pick(summary["cells"], variant=variant, arm="U", method=method, point="relearned", metric=summary["metric"],
               relearn_set=attack[0], adapter=attack[1], learning_rate=attack[2])
  return max((cell["mean"] for cell in cells), default=-1.0)


def depths(cells: Cells, variant: str) -> list[int]:
  """The unlearn depths that were attacked."""
  return sorted({cell["depth"] for cell in pick(cells, variant=variant, arm="U", point="unlearned")})


def _panels(variants: Sequence[str], draw: Callable[[Axes, str], None], title: Callable[[str], str], ylabel: str,
            xlabel: str, height: float = 3.3) -> Figure:
  figure, axes = plt.subplots(1, len(variants), figsize=(max(3.1 * len(variants), 6.5), height), sharey=True,
                              squeeze=False, layout="constrained")
  for ax, variant in zip(axes[0], variants, strict=True):
    draw(ax, variant)
    ax.set_title(title(variant), fontsize=10)
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0, 0].set_ylabel(ylabel)
  return figure


def _line(ax: Axes, points: Cells, x: str, colour: str, label: str, style: str = "-") -> None:
  if not points:
    return
  at = [point[x] for point in points]
  ax.plot(at, [point["mean"] for point in points], style, color=colour, label=label, marker="o", markersize=3, lw=1.6)
  points = [point for point in points if point["low"] is not None]  # too few seeds or clusters show no interval
  at = [point[x] for point in points]
  ax.fill_between(at, [point["low"] for point in points], [point["high"] for point in points], color=colour, alpha=0.15,
                  lw=0)


def _legend(figure: Figure) -> None:
  entries: dict[str, Any] = {}
  for ax in figure.axes:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      entries.setdefault(label, handle)
  figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 5),
                frameon=False, fontsize=9)


def relearn_curves(cells: Cells, variants: Sequence[str], metric: str, ylabel: str) -> Figure:
  """A panel a variant: a line per unlearn depth of U, the control's and the original's, with intervals."""
  def draw(ax: Axes, variant: str) -> None:
    _line(ax, curve(cells, variant, "O", None, metric), "relearn_step", O_COLOUR, "original (O)", ":")
    for depth in depths(cells, variant):
      colour = U_COLOURS[min(depth, len(U_COLOURS) - 1)]
      _line(ax, curve(cells, variant, "U", depth, metric), "relearn_step", colour, f"unlearned (U), depth {depth}")
    _line(ax, curve(cells, variant, "N", 0, metric), "relearn_step", N_COLOUR, "never trained (N), depth 0", "--")
    ax.set_xscale("symlog", linthresh=1)
    steps = sorted({cell["relearn_step"] for cell in pick(cells, variant=variant)})
    ax.set_xticks(steps, [str(step) for step in steps], fontsize=8)
    ax.minorticks_off()
    if metric in METRICS:
      ax.set_ylim(-0.02, 1.02)
  figure = _panels(variants, draw, lambda v: f"variant {v}", ylabel, "relearning steps", 3.6)
  _legend(figure)
  return figure


def rate_curves(summary: dict[str, Any], method: str) -> Figure:
  """U at depth 0 by learning rate of the attack, its control dashed: the relearn set and adapter of the worst cell."""
  metric = summary["metric"]
  rates = sorted({attack[2] or 0.0 for variant in summary["verdicts"][method]
                  for attack in attacks_of(summary, variant)})
  colour = lambda rate: to_hex(plt.get_cmap("viridis")(0.9 * rates.index(rate) / max(len(rates) - 1, 1)))

  def draw(ax: Axes, variant: str) -> None:
    kind = worst_attack(summary, method, variant)[:2]
    for attack in attacks_of(summary, variant):
      if attack[:2] == kind:
        cells = view(summary, method, dict.fromkeys(summary["verdicts"][method], attack))["cells"]
        for arm, style in (("U", "-"), ("N", ":")):
          label = f"rate {attack[2]:g}" + (", control" if arm == "N" else "")
          _line(ax, curve(cells, variant, arm, 0, metric), "relearn_step", colour(attack[2]), label, style)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_ylim(-0.02, 1.02)
    steps = sorted({cell["relearn_step"] for cell in pick(summary["cells"], variant=variant)})
    ax.set_xticks(steps, [str(step) for step in steps], fontsize=8)
    ax.minorticks_off()
  figure = _panels(list(summary["verdicts"][method]), draw, lambda v: f"variant {v}", METRICS[metric].title,
                   "relearning steps", 3.6)
  _legend(figure)
  return figure


def unlearn_curves(trajectory: Cells, cells: Cells, variants: Sequence[str], metric: str) -> Figure:
  """The score of U along its unlearning, from the memorised model at step 0."""
  def draw(ax: Axes, variant: str) -> None:
    start = pick(cells, variant=variant, arm="O", point="original", metric=metric)
    _line(ax, start + pick(trajectory, variant=variant, arm="U", metric=metric), "unlearn_step", U_COLOURS[0],
          "unlearned (U)")
    ax.set_ylim(-0.02, 1.02)
  figure = _panels(variants, draw, lambda v: f"variant {v}", METRICS[metric].title, "unlearning steps")
  _legend(figure)
  return figure


def heat_rows(summary: dict[str, Any], variant: str) -> list[tuple[str, list[dict[str, Any]]]]:
  """Rows of the heat map: the original, then each depth with the unlearn steps of its runs."""
  first, metric = "0 (original)" if summary["trajectory"] else "original", summary["metric"]
  cells, rows = summary["cells"], [(first, curve(summary["cells"], variant, "O", None, metric))]
  for depth in depths(cells, variant):
    steps = [at[depth] for at in summary["selection"].get(variant, {}).values() if len(at) > depth]
    span = "" if not steps else f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)}–{max(steps)}"
    name = f"{span} (depth {depth})" if summary["trajectory"] else "unlearned"
    rows.append((name, curve(cells, variant, "U", depth, metric)))
  return rows


def heat_map(summary: dict[str, Any], variants: Sequence[str]) -> Figure:
  """Unlearn step x relearn step, U's score on a fixed 0-1 scale, a panel a variant."""
  columns = sorted({cell["relearn_step"] for cell in summary["cells"]})
  count = max(len(heat_rows(summary, variant)) for variant in variants)
  figure, axes = plt.subplots(len(variants), 1, squeeze=False, layout="constrained",
                              figsize=(max(6.5, 0.8 * len(columns) + 2), len(variants) * (0.42 * count + 0.75) + 0.4))
  for ax, variant in zip(axes[:, 0], variants, strict=True):
    rows = heat_rows(summary, variant)
    grid = np.full((len(rows), len(columns)), np.nan)
    for i, (_, points) in enumerate(rows):
      for point in points:
        grid[i, columns.index(point["relearn_step"])] = point["mean"]
    image = ax.imshow(grid, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
      if not np.isnan(value):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.5 else "black")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    ax.set_xticks(range(len(columns)), [str(c) for c in columns], fontsize=8)
    ax.set_title(f"variant {variant}", fontsize=10, loc="left")
  axes[-1, 0].set_xlabel("relearning steps")
  figure.supylabel("unlearning steps" if summary["trajectory"] else "model", fontsize=10)
  figure.colorbar(image, ax=axes[:, 0].tolist(), label=METRICS[summary["metric"]].title, shrink=0.8)
  return figure


BARS = (("original", "O", "original", O_COLOUR), ("unlearned", "U", "unlearned", U_COLOURS[2]),
        ("relearned", "U", "relearned", U_COLOURS[0]), ("control, relearned", "N", "relearned", N_COLOUR))


def method_bars(summary: dict[str, Any]) -> Figure:
  """Methods side by side, a panel a variant: bars of the worst cell before and after, with intervals."""
  metric = summary["metric"]

  def draw(ax: Axes, variant: str) -> None:
    for place, (label, arm, point, colour) in enumerate(BARS):
      for number, method in enumerate(summary["methods"]):
        depth, step = worst_point(summary, summary["verdicts"][method][variant])
        found = pick(view(summary, method)["cells"], variant=variant, arm=arm, point=point, metric=metric,
                     relearn_step=step if point == "relearned" else 0,
                     depth=None if arm == "O" else depth)
        for cell in found[:1]:
          limits = None if cell["low"] is None else [[max(cell["mean"] - cell["low"], 0)],
                                                     [max(cell["high"] - cell["mean"], 0)]]
          ax.bar(number + 0.2 * (place - 1.5), cell["mean"], 0.19, yerr=limits, color=colour, label=label, capsize=2,
                 error_kw={"lw": 0.9})
    ax.set_ylim(0, 1.02)
    ax.set_xticks(range(len(summary["methods"])), summary["methods"], fontsize=8,
                  rotation=90 if len(summary["methods"]) > 6 else 0)
  figure = _panels(list(next(iter(summary["verdicts"].values()))), draw, lambda v: f"variant {v}",
                   METRICS[metric].title, "", 3.6)
  width = max(0.75 * len(summary["methods"]) * len(figure.axes), 6.5)
  figure.set_size_inches(min(width, 24), 3.6)
  _legend(figure)
  return figure


def draw_side_by_side(summary: dict[str, Any], folder: pathlib.Path) -> tuple[str, pathlib.Path]:
  """Draws what compares the methods of an audit; returns caption and file."""
  folder.mkdir(parents=True, exist_ok=True)
  path, figure = folder / "methods.png", method_bars(summary)
  figure.savefig(path, dpi=130, metadata={"Software": None})
  plt.close(figure)
  title = sentence_case(METRICS[summary["metric"]].title)
  return (f"{title} of every method in its worst cell, before and after the attack, and of the control after the same, "
          "with 95 % intervals.", path)


def draw_method(summary: dict[str, Any], method: str, folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Draws every figure of a method; returns captions and files."""
  folder.mkdir(parents=True, exist_ok=True)
  worst, variants = view(summary, method), list(summary["verdicts"][method])
  title, metric = METRICS[summary["metric"]].title, summary["metric"]
  figures = [(f"{metric}_vs_relearn_steps", f"{sentence_case(title)} against relearning steps, a line for each unlearn "
              "depth, with 95 % intervals; the attack of the worst cell.",
              relearn_curves(worst["cells"], variants, metric, title))]
  if len({attack[2] for variant in variants for attack in attacks_of(summary, variant)}) > 1:
    figures.append(("rates", f"{sentence_case(title)} of the unlearned model at depth 0 and of its control, by "
                    "learning rate of the attack.", rate_curves(summary, method)))
  figures.append(("logprob_vs_relearn_steps",
                  "Log-probability of the answer after the prompt, against relearning steps.",
                  relearn_curves(worst["cells"], variants, "logprob", "log-probability of the answer (nats)")))
  kinds = strongest_by_kind(summary, method)
  for (name, adapter), attacks in kinds.items():
    shown = view(summary, method, {variant: attacks.get(variant, (None, None, None)) for variant in variants})
    which = "" if len(kinds) == 1 else f" Relearn set {name}, adapter {adapter}, at the rate that brought most back."
    figures.append(("heatmap" if len(kinds) == 1 else f"heatmap-{name}-{adapter}".replace(", ", "-").replace(" ", "-"),
                    f"{sentence_case(title)} of the unlearned model by unlearning and relearning steps, on a fixed "
                    f"scale from 0 to 1.{which}", heat_map(shown, variants)))
  if worst["trajectory"]:  # checkpoints that somebody else made come without one
    figures.append(("unlearning", f"{sentence_case(title)} along unlearning, before any attack.",
                    unlearn_curves(worst["trajectory"], worst["cells"], variants, metric)))
  found = []
  for name, caption, figure in figures:
    found.append((caption, folder / f"{name}.png"))
    figure.savefig(found[-1][1], dpi=130, metadata={"Software": None})
    plt.close(figure)
  return found
