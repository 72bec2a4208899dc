"""The plan as plain text, at most 120 characters wide."""

import math
import textwrap
from collections.abc import Sequence

from relearn_jax.plan.advise import advise
from relearn_jax.plan.devices import GIB, USABLE, Device
from relearn_jax.plan.work import Estimate, Mesh, Work

WIDTH = 120
_COLUMNS = ("stage", "params", "trained", "weights", "optimizer", "activ.", "cache", "total", "fits", "GFLOP/step",
            "time/step", "time")


def _number(value: int) -> str:
  for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
    if value >= size:
      return f"{value / size:.2f} {letter}"
  return str(value)


def say_time(seconds: float) -> str:
  """Seconds in the unit that suits them."""
  for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def short_name(work: Work) -> str:
  """A stage's name in at most 20 characters."""
  return work.name if len(work.name) <= 20 else f"{work.name[:17]}..."


def table(rows: Sequence[Sequence[str]]) -> list[str]:
  """The lines of a table, whose first row is its head: the first column to the left, the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  line = lambda row: "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
  return [line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])]


def _row(work: Work, needed: Estimate, device: Device) -> tuple[str, ...]:
  gib = lambda size: f"{size / GIB:.2f}"
  seconds = needed.seconds(device)
  return (short_name(work), _number(needed.num_params), _number(needed.num_trained),
          gib(needed.weights + needed.compute), gib(needed.gradients + needed.optimizer + needed.update),
          gib(needed.activations + max(needed.layer, needed.logits)),
          gib(needed.cache + needed.reference + needed.data), gib(needed.total),
          "yes" if needed.total <= device.usable_bytes else "no",
          f"{needed.flops / 1e9:.4g}" if needed.flops < 1e13 else f"{needed.flops / 1e9:.0f}",
          say_time(seconds), say_time(work.steps * seconds))


def render(stages: Sequence[tuple[Work, Estimate]], device: Device, mesh: Mesh, *, scale: Sequence[str] = (),
           measured: Sequence[str] = (), assumed: Sequence[str] = ()) -> str:
  """A table with a row a stage, advice for those that do not fit, and what was assumed.

  Args:
    stages: what is planned, with its estimates.
    device: one of those that share the work.
    mesh: sizes of its axes.
    scale: lines that follow the stages: `scale_text.scale_lines`.
    measured: what was read from files, a line each.
    assumed: what could not be, likewise.
  """
  rows = [_COLUMNS, *(_row(work, needed, device) for work, needed in stages)]
  number = math.prod(mesh.values())
  over = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
  lines = [f"{number} x {device.name}{f' ({over})' if over else ''}, {device.usable_bytes / GIB:.1f} GiB usable each; "
           "memory in GiB per device, at its peak", "", *table(rows)]
  total = sum(work.steps * needed.seconds(device) for work, needed in stages)
  lines += ["", f"all stages: {say_time(total)}", *scale]
  advice = [text for work, needed in stages for text in advise(work, mesh, device, needed)]
  if advice:
    lines += ["", *advice]
  if measured:
    lines += ["", "read:", *(f"- {text}" for text in measured)]
  lines += ["", "assumed:", *(f"- {text}" for text in assumed), *_assumptions(stages, device)]
  return "\n".join(part for text in lines for part in (
      textwrap.wrap(text, WIDTH, subsequent_indent="    " if text[:1] in " -" else "") or [""]))


def _assumptions(stages: Sequence[tuple[Work, Estimate]], device: Device) -> list[str]:
  precisions = {work.compute_bytes for work, _ in stages}
  peaks = [f"{rate / 1e12:.4g} TFLOP/s {name}" for size, rate, name in
           ((2, device.flops, "bf16"), (4, device.flops_fp32, "fp32")) if size in precisions]
  guess = (f"{' and '.join(peaks)} at its peak, of which {device.mfu:.0%} are reached (a guess, not a measurement: see "
           f"--bench); {device.bandwidth / 1e9:.0f} GB/s; from: {device.source}")
  return [
      f"- {device.name}: {device.measured or guess}",
      f"- {USABLE:.0%} of a device's memory can be used; on GPUs JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION "
      "says otherwise",
      "- weights: with copies in compute precision; optimizer: with fp32 gradients, and copies of what is trained that "
      "a method or a defence holds; activ.: with the layer or the logits at work; cache: keys and values, or what is "
      "kept of frozen models, and token rows",
      "- GFLOP/step: 6 per parameter and token in training (4 where frozen), 2 forward, causal attention; padding "
      "counts, and so does what remat computes again; of a defence's passes all are counted",
      *(["- on CPU the runs of a device are computed one after the other: less memory than is said here"]
        if device.name == "cpu" else []),
      "- not counted: traffic of activations, what devices wait for each other's bytes unless it is said, compilation, "
      "loading and writing to disk; every completion is as long as it may be",
  ]
