"""What a plan says of a grid as a whole: cells per hour, bytes between devices, bytes on disk."""

import math

from relearn_jax.plan.audit_plan import merged
from relearn_jax.plan.devices import Device
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.exchange import exchange
from relearn_jax.plan.plan_text import say_time, short_name, table
from relearn_jax.plan.price import Stages
from relearn_jax.plan.schedule import makespan
from relearn_jax.plan.work import Mesh


def say_bytes(size: float) -> str:
  """Bytes in decimal units."""
  for unit, letter in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if size >= unit:
      return f"{size / unit:.3g} {letter}"
  return f"{size:.0f}"


def _rate(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def scale_lines(found: Stages, device: Device, mesh: Mesh, commands: int) -> list[str]:
  """The lines of a plan on its grid.

  Args:
    found: what is planned.
    device: one of those that share the work of a command.
    mesh: sizes of its axes.
    commands: that share the grid, each on as many devices as the mesh has.
  """
  return [*_exchange(found, device, mesh), *_cells(found, device, mesh, commands), *_disk(found, commands)]


def _exchange(found: Stages, device: Device, mesh: Mesh) -> list[str]:
  number = math.prod(mesh.values())
  if math.prod(size for axis, size in mesh.items() if axis != "runs") == 1:
    return ["", "between devices: nothing, each has whole runs"] if number > 1 else []
  head = ("bytes sent", "gathers", "gradients", "data", "tensor", "a step", "alone", "all steps")
  rows: list[tuple[str, ...]] = [head]
  for work in merged(found.works):
    sent = exchange(work, mesh, device.room)
    rows.append((short_name(work), *map(say_bytes, sent), say_bytes(sum(sent)), say_time(sent.seconds(device)),
                 say_bytes(sum(sent) * work.steps * number)))
  return ["", f"between devices, of one in a step (all steps: of all {number}); alone: the time at "
          f"{device.link / 1e9:.0f} GB/s, if nothing hides it", "", *table(rows)]


def _cells(found: Stages, device: Device, mesh: Mesh, commands: int) -> list[str]:
  """How long the grid takes, with all exchange hidden and with none."""
  if found.grid is None:
    return []
  grid, said = found.grid, []
  alone = [work.steps * estimate(work, mesh, device.room).seconds(device) for work in found.works]
  waits = [work.steps * exchange(work, mesh, device.room).seconds(device) for work in found.works]
  for seconds, how in ((alone, ""), ([a + b for a, b in zip(alone, waits, strict=True)], " if no exchange is hidden")):
    if sum(seconds) and (not how or sum(waits)):
      takes = makespan(grid.stages, grid.stage_seconds(seconds), commands)
      said.append(f"{_rate(grid.cells / takes * 3600)} an hour, {say_time(takes)}{how}")
  where = f"{'one command' if commands == 1 else f'{commands} commands'} on {math.prod(mesh.values())} x {device.name}"
  attacks = sum(bool(one.cells) for one in grid.stages)
  return ["", f"{grid.cells} cells in {attacks} attacks, {where}{' each' if commands > 1 else ''}: {'; '.join(said)}"]


def _disk(found: Stages, commands: int) -> list[str]:
  if found.disk is None:
    return []
  kept, left, state, export = map(say_bytes, found.disk)
  each = " for each command" if commands > 1 else ""
  return ["", f"on disk: kept weights {kept} at most, {left} at the end; a state to go on from {state}{each}, twice "
          f"that while one is written; an export of a run {export}"]
