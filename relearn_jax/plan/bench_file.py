"""What `relearn bench` found of a device, for a plan of it in place of a sheet's peak and a guess."""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.plan.devices import Device

SCHEMA = 1  # of the JSON file
FIELD = "--bench"
_MEND = "give a JSON file that this version's `relearn bench` wrote"
# Name in the table of devices -> what JAX calls such a device, in part.
KINDS = {"h200": ("h200",), "h100": ("h100",), "a100": ("a100",), "v5p": ("tpu v5p", "tpu v5"),
         "v6e": ("tpu v6e", "tpu v6 lite"), "cpu": ("cpu",)}
_NOT = ("v5 lite", "v5e")  # smaller than v5p, and not in the table


def read_bench(path: pathlib.Path) -> list[dict[str, Any]]:
  """The benchmarks of a file: one, or a list of them.

  Raises:
    InputError: it is not what `relearn bench` writes.
  """
  try:
    values = json.loads(path.read_text())
  except OSError as error:
    raise InputError(f"cannot be read ({error.strerror})", file=path, field=FIELD, mend=_MEND) from None
  except ValueError:
    raise InputError("is no JSON", file=path, field=FIELD, mend=_MEND) from None
  found = values if isinstance(values, list) else [values]
  for one in found:
    has = isinstance(one, dict) and one.get("schema_version") == SCHEMA
    if not has or not {"device", "rates", "date"} <= one.keys():
      raise InputError("is no benchmark of this version", file=path, field=FIELD, mend=_MEND)
  if not found:
    raise InputError("is empty", file=path, field=FIELD, mend=_MEND)
  return found


def kind_name(kind: str) -> str | None:
  """Name in the table of devices of what JAX calls `kind`; None where it has no such device.

  >>> kind_name("NVIDIA H100 80GB HBM3"), kind_name("TPU v6 lite"), kind_name("NVIDIA L4")
  ('h100', 'v6e', None)
  """
  lower = kind.lower()
  if any(part in lower for part in _NOT):
    return None
  return next((name for name, parts in KINDS.items() if any(part in lower for part in parts)), None)


def measured_device(device: Device, path: pathlib.Path, *, cores: int, compute_bytes: set[int]) -> Device:
  """The device with rates and shares as they were measured.

  Peak and bandwidth become the measured rates; `mfu` the median share that the file's training steps reach of the one
  (with what remat computes again), `decoding` that which its decoding steps reach of the other. In a file without
  training steps `mfu` stays the table's guess, in one without decoding the whole bandwidth counts.

  Args:
    device: of the table.
    path: what `relearn bench --output` wrote.
    cores: of "cpu", whose rates are those of all cores that were measured.
    compute_bytes: of the numbers that the planned stages multiply.

  Raises:
    InputError: it is no such file, is of another kind of device or number of cores, or another precision.
  """
  try:
    return _measured(device, path, read_bench(path), cores, compute_bytes)
  except (KeyError, TypeError, statistics.StatisticsError) as error:
    raise InputError(f"lacks what a benchmark has ({error})", file=path, field=FIELD, mend=_MEND) from None


def _measured(device: Device, path: pathlib.Path, every: list[dict[str, Any]], cores: int, compute_bytes: set[int]
              ) -> Device:
  where, rates = every[0]["device"], every[0]["rates"]
  if others := [one for one in every if one["device"]["kind"] != where["kind"]]:
    raise InputError(f"is of {where['kind']} and of {others[0]['device']['kind']}", file=path, field=FIELD,
                     mend="give a file of one kind of device")
  if (name := kind_name(where["kind"])) != device.name:
    told = f"give --device={name}, or" if name else "give"
    raise InputError(f"was measured on {where['kind']!r}, and the plan is for {device.name}", file=path, field=FIELD,
                     mend=f"{told} a file that was measured on {device.name}")
  if name == "cpu" and where["cores"] != cores:
    raise InputError(f"was measured on {where['cores']} cores, and the plan is for {cores}", file=path, field=FIELD,
                     mend=f"give --num_devices={where['cores']}")
  size = {"float32": 4, "bfloat16": 2}[rates["dtype"]]
  if compute_bytes != {size}:
    other = "bfloat16" if size == 4 else "float32"
    raise InputError(f"was measured in {rates['dtype']}, and the plan multiplies in {other}", file=path, field=FIELD,
                     mend=f"measure with --dtype={other}")
  shares = [row["compute_share"] for one in every for row in one.get("train", ())]
  decoding = [row["bandwidth_share"]["median"] for one in every for row in one.get("decode", ())]
  peak, bandwidth = (rates[key] / rates["num_devices"] for key in ("matmul_flops", "bandwidth_bytes"))
  mfu = statistics.median(shares) if shares else device.mfu
  share = statistics.median(decoding) if decoding else 1.0
  said = [f"of which {mfu:.0%} are reached in training ({len(shares)} kinds of steps)" if shares
          else f"of which {mfu:.0%} are reached (a guess: no training was measured)",
          f"{bandwidth / 1e9:.0f} GB/s, of which {share:.0%} are reached in decoding ({len(decoding)} batch sizes)"
          if decoding else f"{bandwidth / 1e9:.0f} GB/s (all of it: no decoding was measured)"]
  text = (f"{peak / 1e12:.4g} TFLOP/s {rates['dtype']}, {said[0]}; {said[1]}; measured on {where['kind']} on "
          f"{every[0]['date'][:10]}, from: {path}")
  return dataclasses.replace(device, flops=peak, flops_fp32=peak, bandwidth=bandwidth, mfu=mfu, decoding=share,
                             measured=text)
