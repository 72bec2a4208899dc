"""What would make a stage fit that does not: settings tried by estimating again."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from relearn_jax.plan.devices import GIB, Device
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.work import Estimate, Mesh, Work

MAX_DEVICES = 64  # that would be asked for


class Suggestion(NamedTuple):
  """Settings that differ from the stage's, and the stage with them."""

  settings: dict[str, Any]
  work: Work
  mesh: dict[str, int]
  estimate: Estimate


def _knobs(work: Work, mesh: Mesh, device: Device) -> dict[str, list[Any]]:
  """Field -> values to try, the mildest first; fields in the order in which they are tried."""
  def doubled(start: int, limit: int) -> list[int]:
    return [start << i for i in range(1, 32) if start << i <= limit]
  knobs: dict[str, list[Any]] = {}
  if work.kind == "train":
    stronger = {"none": ["attn", "full"], "dots": ["attn", "full"], "attn": ["full"], "full": []}
    knobs["remat"] = stronger[work.remat]
    knobs["num_microbatches"] = doubled(work.num_microbatches, work.rows)
  elif work.kind in ("generate", "score"):
    knobs["rows"] = [work.rows >> i for i in range(1, 32) if work.rows >> i]
  if device.name != "cpu":
    others = math.prod(size for axis, size in mesh.items() if axis != "fsdp")
    knobs["fsdp"] = doubled(mesh.get("fsdp", 1), MAX_DEVICES // others)
  if work.groups:
    knobs["runs_at_once"] = [work.runs >> i for i in range(1, 32) if work.runs >> i]
  if work.kind == "train" and work.adapter == "full":
    knobs["adapter"] = ["lora"]
  return {field: values for field, values in knobs.items() if values}


def _tried(work: Work, mesh: Mesh, device: Device, knobs: Mapping[str, list[Any]], fields: Sequence[str]
           ) -> Iterator[Suggestion]:
  for values in itertools.product(*(knobs[field] for field in fields)):
    settings = dict(zip(fields, values, strict=True))
    names = {"runs_at_once": "runs"}
    changed = dataclasses.replace(work, **{names.get(k, k): v for k, v in settings.items() if k != "fsdp"})
    laid = dict(mesh) | {k: v for k, v in settings.items() if k == "fsdp"}
    yield Suggestion(settings, changed, laid, estimate(changed, laid, device.room))


def suggest(work: Work, mesh: Mesh, device: Device) -> tuple[list[Suggestion], Suggestion | None]:
  """The fewest settings that make a stage fit: for each set of that size, the mildest values that do.

  Returns:
    What fits; and, where nothing does, the smallest of all that was tried.
  """
  knobs = _knobs(work, mesh, device)
  smallest: Suggestion | None = None
  for size in range(1, len(knobs) + 1):
    found = []
    for fields in itertools.combinations(knobs, size):
      for tried in _tried(work, mesh, device, knobs, fields):
        if tried.estimate.total <= device.usable_bytes:
          found.append(tried)
          break
        if smallest is None or tried.estimate.total < smallest.estimate.total:
          smallest = tried
    if found:
      return found, None
  return [], smallest


def advise(work: Work, mesh: Mesh, device: Device, needed: Estimate) -> list[str]:
  """What would make a stage fit that does not, a line each; nothing where it fits."""
  usable = device.usable_bytes
  if needed.total <= usable:
    return []
  say = lambda s: ", ".join(f"{field}={value}" for field, value in s.settings.items())
  lines = [f"{work.name} needs {needed.total / GIB:.1f} GiB of {usable / GIB:.1f} GiB usable on {device.name}"]
  found, smallest = suggest(work, mesh, device)
  for fits in found:
    devices = f" on {math.prod(fits.mesh.values())} devices" if "fsdp" in fits.settings else ""
    lines.append(f"  fits with {say(fits)}: {fits.estimate.total / GIB:.1f} GiB{devices}")
  if not found:
    least = needed.total if smallest is None else min(needed.total, smallest.estimate.total)
    how = f" the least, with {say(smallest)}," if smallest is not None and least < needed.total else " it"
    lines.append(f"  nothing that was tried makes it fit:{how} takes {least / GIB:.1f} GiB, "
                 f"{(least - usable) / GIB:.1f} GiB too many")
  return lines
