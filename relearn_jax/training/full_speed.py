"""How fast a stage could be trained: what its model FLOPs utilization (MFU) is a share of."""

import jax.numpy as jnp

from relearn_jax.models.adapters import linear_layers
from relearn_jax.models.model import Model, Params, flatten
from relearn_jax.plan.bench_file import kind_name
from relearn_jax.plan.devices import DEVICES
from relearn_jax.plan.estimate import flops_per_token
from relearn_jax.plan.work import Work


def full_speed(model: Model, trained: Params, is_adapter: bool, length: int, kind: str, devices: int) -> float | None:
  """Real tokens per second at which devices would reach their peak: their bf16 FLOP/s / model FLOPs of a token.

  The FLOPs are those of `plan.estimate.flops_per_token`, with attention as in the longest rows. One forward and
  backward pass is counted, whatever a defence or a frozen model makes besides, and nothing of what remat computes
  again. So tokens / seconds / this is `mfu_real` of `relearn bench`, of the maker's peak.

  Args:
    model: what is computed.
    trained: its parameters, or adapters, `[runs, ...]`.
    is_adapter: whether it is adapters that are trained, and the rest is frozen.
    length: of the longest rows, padded, in tokens.
    kind: of a device, as JAX calls it.
    devices: their number.

  Returns:
    None where the peak is not known: of devices that are not in `plan.devices.DEVICES`, of CPUs, and in float32, which
    accelerators multiply at several rates.
  """
  name = kind_name(kind)
  if name in (None, "cpu") or model.dtype != jnp.bfloat16:
    return None
  assert name is not None
  adapter = {}
  if is_adapter:
    layers = linear_layers(model)
    parts = {path.removesuffix("/a"): leaf for path, leaf in flatten(trained).items() if path.endswith("/a")}
    adapter = {"adapter": "lora", "lora_rank": next(iter(parts.values())).shape[-2],
               "lora_targets": tuple(sorted({layers[path] for path in parts}))}
  return DEVICES[name].flops * devices / flops_per_token(Work("", "train", model.config, length=length, **adapter))
