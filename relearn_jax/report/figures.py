"""The figures, from the summary's cells alone. Same 0-1 scale everywhere, so that panels compare."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def of_worst_rate(summary: dict[str, Any]) -> dict[str, Any]:
  """The summary with the cells of one learning rate of the attack: the worst cell's, by variant."""
  rates = {variant: shown_rate(summary, variant) for variant in summary["verdicts"]}
  return summary | {"cells": [cell for cell in summary["cells"]
                              if cell["learning_rate"] in (None, rates[cell["variant"]])]}


def shown_rate(summary: dict[str, Any], variant: str) -> float | None:
  """The learning rate of a variant's worst cell; the first where there is none."""
  rates = sorted({cell["learning_rate"] for cell in pick(summary["cells"], variant=variant)
                  if cell["learning_rate"] is not None})
  worst = summary["verdicts"][variant]["learning_rate"]
  return worst if worst in rates else next(iter(rates), None)


def depths(cells: Cells, variant: str) -> list[int]:
  """The unlearn depths that were attacked."""
  return sorted({cell["depth"] for cell in pick(cells, variant=variant, arm="U", point="unlearned", metric="asr")})


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
    if metric == "asr":
      ax.set_ylim(-0.02, 1.02)
  figure = _panels(variants, draw, lambda v: f"variant {v}", ylabel, "relearning steps", 3.6)
  _legend(figure)
  return figure


def unlearn_curves(trajectory: Cells, cells: Cells, variants: Sequence[str]) -> Figure:
  """Attack success of U along its unlearning, from the memorised model at step 0."""
  def draw(ax: Axes, variant: str) -> None:
    start = pick(cells, variant=variant, arm="O", point="original", metric="asr")
    _line(ax, start + pick(trajectory, variant=variant, arm="U", metric="asr"), "unlearn_step", U_COLOURS[0],
          "unlearned (U)")
    ax.set_ylim(-0.02, 1.02)
  figure = _panels(variants, draw, lambda v: f"variant {v}", "attack success rate", "unlearning steps")
  _legend(figure)
  return figure


def heat_rows(summary: dict[str, Any], variant: str) -> list[tuple[str, list[dict[str, Any]]]]:
  """Rows of the heat map: the original, then each depth with the unlearn steps of its runs."""
  first = "0 (original)" if summary["trajectory"] else "original"
  cells, rows = summary["cells"], [(first, curve(summary["cells"], variant, "O", None, "asr"))]
  for depth in depths(cells, variant):
    steps = [at[depth] for at in summary["selection"].get(variant, {}).values() if len(at) > depth]
    span = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)}–{max(steps)}"
    name = f"{span} (depth {depth})" if summary["trajectory"] else "unlearned"
    rows.append((name, curve(cells, variant, "U", depth, "asr")))
  return rows


def heat_map(summary: dict[str, Any], variants: Sequence[str]) -> Figure:
  """Unlearn step x relearn step, U's attack success on a fixed 0-1 scale, a panel a variant."""
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
  figure.colorbar(image, ax=axes[:, 0].tolist(), label="attack success rate", shrink=0.8)
  return figure


def draw_all(summary: dict[str, Any], folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Draws every figure; returns name -> file."""
  folder.mkdir(parents=True, exist_ok=True)
  variants, cells = list(summary["verdicts"]), summary["cells"]
  figures = {
      "asr_vs_relearn_steps": relearn_curves(cells, variants, "asr", "attack success rate"),
      "logprob_vs_relearn_steps": relearn_curves(cells, variants, "logprob", "log-probability of the answer (nats)"),
      "heatmap": heat_map(summary, variants)}
  if summary["trajectory"]:  # checkpoints that somebody else made come without one
    figures["unlearning"] = unlearn_curves(summary["trajectory"], cells, variants)
  paths = {}
  for name, figure in figures.items():
    paths[name] = folder / f"{name}.png"
    figure.savefig(paths[name], dpi=130, metadata={"Software": None})
    plt.close(figure)
  return paths
