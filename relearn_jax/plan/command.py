"""`relearn plan`: what a configuration's stages would need on a device, before anything is launched."""

import pathlib
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.parallel.mesh import check_divides, fill_mesh, parse_mesh
from relearn_jax.plan.audit_plan import Size, merged
from relearn_jax.plan.bench_file import measured_device
from relearn_jax.plan.devices import GIB, get_device
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.plan_text import render
from relearn_jax.plan.price import DEFAULT, stages
from relearn_jax.plan.scale_text import scale_lines


def plan(config: Any, where: str, *, device: str, num_devices: int, mesh: str, memory_gib: float | None = None,
         default: Size = DEFAULT, bench: str | None = None, commands: int = 1) -> str:
  """The plan of a configuration, as text; no device is touched.

  Args:
    config: of any command.
    where: the file it came from, for messages.
    device: kind of device; see `devices.DEVICES`.
    num_devices: their number; of "cpu", cores, which are one device.
    mesh: sizes of the axes over them, such as "fsdp:-1".
    memory_gib: of a device, where it is not the table's; needed for "cpu".
    default: of data sets whose files are not given; of a row, no more tokens count than it has.
    bench: file of `relearn bench`, whose rates and shares take the place of the table's.
    commands: that share the grid by --claim, each on `num_devices`.

  Raises:
    InputError: a setting that the command would refuse, an unknown device or model, a mesh that does
      not fit, or a benchmark of something else.
  """
  for name, value in {**default._asdict(), "num_commands": commands}.items():
    if value < 1:
      raise InputError(f"is {value}", field=f"--{name}", mend="expected at least 1")
  default = default._replace(counted=min(default.counted, default.length))
  kind = get_device(device, memory_bytes=None if memory_gib is None else int(memory_gib * GIB), cores=num_devices,
                    field="--device", memory_field="--memory_gib")
  found = stages(config, where, on_cpu=kind.name == "cpu", default=default)
  if bench is not None:
    kind = measured_device(kind, pathlib.Path(bench), cores=num_devices,
                           compute_bytes={work.compute_bytes for work in found.works})
  laid = fill_mesh(parse_mesh(mesh), 1 if kind.name == "cpu" else num_devices)
  check_divides(laid, found.works[0].config)
  estimates = [(work, estimate(work, laid, kind.room)) for work in merged(found.works)]
  if found.grid is None and commands > 1:
    raise InputError(f"is {commands}", field="--num_commands", mend="leave it out: only an audit's commands share work")
  scale = scale_lines(found, kind, laid, commands)
  return render(estimates, kind, laid, scale=scale, measured=found.measured, assumed=found.assumed)
