"""Devices to plan for, with the figures of their makers."""

import dataclasses
import difflib

from relearn_jax.errors import InputError
from relearn_jax.generation.gather import SHARE

GIB = 2**30
MIB = 2**20
USABLE = 0.95  # share of a device's memory that is planned with; the rest is the runtime's and fragmentation


@dataclasses.dataclass(frozen=True)
class Device:
  """One accelerator chip, or a host's cores.

  Attributes:
    name: key of `DEVICES`.
    memory_bytes: all of its memory, as its driver shows it; 0 where only the machine's owner knows.
    flops: peak of dense bf16 products, per second.
    flops_fp32: peak of products in full fp32 precision, per second.
    bandwidth: of its memory, bytes per second.
    mfu: share of the peak that training is assumed to reach; a guess until it is measured.
    source: where the figures are from.
    link: of its interconnect with others of one host or slice, bytes per second in one direction.
    decoding: share of the bandwidth that decoding is assumed to reach; 1 until it is measured.
    measured: what a plan says of these figures where they were measured; empty: they were not.
  """

  name: str
  memory_bytes: int
  flops: float
  flops_fp32: float
  bandwidth: float
  mfu: float
  source: str
  link: float = 0.0
  decoding: float = 1.0
  measured: str = ""

  @property
  def usable_bytes(self) -> int:
    """Memory to plan with, bytes."""
    return int(self.memory_bytes * USABLE)

  @property
  def room(self) -> float:
    """Bytes of it that copies of weights for decoding may take; see `generation.gather`."""
    return self.usable_bytes / SHARE


# NVIDIA's sheets give bf16 with sparsity; dense is half of it. Their full-fp32 rate is that of the ordinary
# cores: `jax.default_matmul_precision("highest")`. At the default precision fp32 products use TF32 and are faster.
# TPUs have no fp32 product: "highest" makes it of 6 bf16 passes (jax.lax.Precision).
# The assumed shares are below what fused-attention trainers report (0.4 to 0.5 on A100 and H100), since attention here
# writes its scores to memory and optimizer steps are not hidden.
# Of interconnects the makers state both directions together; half of it is one.
DEVICES: dict[str, Device] = {device.name: device for device in (
    # H200 data sheet: SXM 141 GB HBM3e, 4.8 TB/s, bf16 1,979 TFLOP/s with sparsity, fp32 67 TFLOP/s,
    # NVLink 900 GB/s; nvidia-smi shows 143,771 MiB.
    Device("h200", 143_771 * MIB, 989.5e12, 67e12, 4.8e12, 0.35, "NVIDIA H200 data sheet; memory of nvidia-smi",
           450e9),
    # H100 data sheet: SXM 80 GB HBM3, 3.35 TB/s, the same compute; nvidia-smi shows 81,559 MiB.
    Device("h100", 81_559 * MIB, 989.5e12, 67e12, 3.35e12, 0.35, "NVIDIA H100 SXM data sheet; memory of nvidia-smi",
           450e9),
    # A100 data sheet: SXM 80 GB HBM2e, 2,039 GB/s, bf16 312 TFLOP/s dense, fp32 19.5, NVLink 600 GB/s;
    # nvidia-smi shows 81,920 MiB.
    Device("a100", 81_920 * MIB, 312e12, 19.5e12, 2.039e12, 0.4, "NVIDIA A100 SXM data sheet; memory of nvidia-smi",
           300e9),
    # cloud.google.com/tpu/docs/v5p: a chip has 95 GiB, 2,765 GB/s, 459 TFLOP/s bf16, interconnect 1,200 GB/s.
    Device("v5p", 95 * GIB, 459e12, 459e12 / 6, 2.765e12, 0.4, "Google Cloud TPU v5p documentation, per chip",
           600e9),
    # cloud.google.com/tpu/docs/v6e: a chip has 32 GB, 1,640 GB/s (1,600 in some versions), 918 TFLOP/s
    # bf16, interconnect 800 GB/s.
    Device("v6e", 32 * GIB, 918e12, 918e12 / 6, 1.64e12, 0.35, "Google Cloud TPU v6e documentation, per chip",
           400e9),
    # Per core: 2 AVX2 units x 8 fp32 numbers x multiply and add x 2.5 GHz; bf16 is computed in fp32. A rough
    # figure, wrong by a factor of 2 or 3 either way; bandwidth likewise, for a server's core among others at work.
    Device("cpu", 0, 80e9, 80e9, 8e9, 0.3, "rough figure of an AVX2 server core, not of a data sheet"),
)}


def get_device(name: str, *, memory_bytes: int | None = None, cores: int = 1, field: str = "device",
               memory_field: str = "memory_bytes") -> Device:
  """The device called `name`.

  Args:
    name: a key of `DEVICES`.
    memory_bytes: replaces the table's; needed for "cpu".
    cores: of "cpu".
    field, memory_field: what messages call the name and the memory.

  Raises:
    InputError: an unknown name (the nearest are listed), or a host whose memory is not given.
  """
  if name.lower() not in DEVICES:
    near = difflib.get_close_matches(name.lower(), DEVICES, 2, 0.3)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise InputError(f"is {name!r}, which is no device in the table{hint}", field=field,
                     mend=f"expected one of {', '.join(DEVICES)}")
  device = DEVICES[name.lower()]
  if memory_bytes is not None:
    device = dataclasses.replace(device, memory_bytes=memory_bytes)
  if cores < 1:
    raise InputError(f"is {cores}", field="--num_devices", mend="expected at least 1")
  if device.memory_bytes <= 0:
    raise InputError(f"is {name!r}, whose memory is not known", field=field, mend=f"give {memory_field}")
  if device.name == "cpu":
    device = dataclasses.replace(device, flops=device.flops * cores, flops_fp32=device.flops_fp32 * cores,
                                 bandwidth=device.bandwidth * cores)
  return device
