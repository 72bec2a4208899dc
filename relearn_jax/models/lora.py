"""Low-rank adapters (Hu et al., 2021): made, merged, and in and out as PEFT folders.

An adapter is a tree `{"layers": {"attn": {"q": {"a": [layers, rank, in], "b": [layers, out, rank]}}}}`
that lies under "lora" beside the base's parameters; the base is frozen and never changed. What a layer
adds is `scale * x a^T b^T` with scale = alpha / rank.
"""

import dataclasses
import difflib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from relearn_jax.errors import InputError
from relearn_jax.models.adapters import WEIGHTS, check_adapter, linear_layers, peft_names
from relearn_jax.models.export import check_finite, new_folder
from relearn_jax.models.folders import ADAPTER
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.models.safetensor_files import read_tensors

ALL = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What an adapter is attached to, and how large it is.

  Attributes:
    rank: r.
    alpha: the scale is alpha / rank.
    targets: linear layers by their Hugging Face names ("q_proj", ..., the last part), or "all-linear": all
      but the output head, as PEFT means it.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = (ALL,)

  @property
  def scale(self) -> float:
    """What `Model.lora_scale` must be."""
    return self.alpha / self.rank


def check_lora(model: Model, config: LoraConfig, where: Any, field: str = "lora") -> list[str]:
  """The paths of the layers that an adapter is attached to.

  Raises:
    InputError: a rank or scale outside its domain, or a target that matches no layer.
  """
  if config.rank < 1:
    raise InputError(f"is {config.rank}", file=where, field=f"{field}.rank", mend="expected at least 1")
  if not (math.isfinite(config.alpha) and config.alpha > 0):
    raise InputError(f"is {config.alpha}", file=where, field=f"{field}.alpha", mend="expected a positive number")
  layers = linear_layers(model)
  if not config.targets:
    raise InputError("is empty", file=where, field=f"{field}.targets", mend=f"expected {ALL!r} or names of layers")
  chosen = set(layers) if ALL in config.targets else {p for p, name in layers.items() if name in config.targets}
  for target in config.targets:
    if target != ALL and target not in layers.values():
      near = difflib.get_close_matches(target, set(layers.values()), 2, 0.4)
      hint = f" (nearest: {', '.join(near)})" if near else ""
      raise InputError(f"has {target!r}, which matches no linear layer of this model{hint}", file=where,
                       field=f"{field}.targets",
                       mend=f"expected {ALL!r} or some of {', '.join(sorted(set(layers.values())))}")
  return sorted(chosen)


def init_lora(model: Model, config: LoraConfig, key: Array) -> Params:
  """A fresh adapter in fp32: `a` uniform in +-1/sqrt(in), `b` zero, as PEFT draws them; it changes nothing yet.

  Raises:
    InputError: see `check_lora`.
  """
  shapes = flatten(model.abstract())
  leaves: dict[str, Any] = {}
  for number, path in enumerate(check_lora(model, config, None)):
    layers, features, size = shapes[f"{path}/weight"].shape
    bound = size ** -0.5
    leaves[f"{path}/a"] = jax.random.uniform(
        jax.random.fold_in(key, number), (layers, config.rank, size), jnp.float32, -bound, bound)
    leaves[f"{path}/b"] = jnp.zeros((layers, features, config.rank), jnp.float32)
  return unflatten(leaves)


def merge_lora(params: Params, adapter: Params, scale: float) -> Params:
  """The base with the adapter added to its weights, each in its own dtype; the sum is made in fp32."""
  leaves, added = flatten(params), flatten(adapter)
  for path in [path.removesuffix("/a") for path in added if path.endswith("/a")]:
    weight = leaves[f"{path}/weight"]
    delta = jnp.einsum("lfr,lrd->lfd", jnp.asarray(added[f"{path}/b"], jnp.float32),
                       jnp.asarray(added[f"{path}/a"], jnp.float32), precision="highest")
    leaves[f"{path}/weight"] = (jnp.asarray(weight, jnp.float32) + scale * delta).astype(weight.dtype)
  return unflatten(leaves)


def export_peft(adapter: Params, model: Model, config: LoraConfig, destination: pathlib.Path, *, base: str,
                base_fingerprint: str | None = None, field: str = "--output") -> None:
  """Writes an adapter as a folder that `peft` loads; it appears complete or not at all.

  Args:
    adapter: of one run.
    model: the base's architecture.
    config: rank, scale and targets.
    destination: a folder that does not exist yet, or is empty.
    base: folder or hub id of the base, as PEFT should find it.
    base_fingerprint: of the base's weights; a folder that has one is refused for another base.
    field: which named the destination, for messages.

  Raises:
    InputError: the destination holds something, or cannot be written; or a weight is not finite.
  """
  names, leaves = peft_names(model), flatten(adapter)
  tensors: dict[str, np.ndarray] = {}
  for path, leaf in leaves.items():
    layer, _, part = path.rpartition("/")
    for i in range(model.config.num_layers):
      tensors[f"{names[layer].format(i=i)}.lora_{part.upper()}.weight"] = np.ascontiguousarray(leaf[i])
  for name, array in tensors.items():
    check_finite(name, array)
  layers = linear_layers(model)
  targets = sorted({layers[path.rpartition("/")[0]] for path in leaves})
  about = {
      "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
      "lora_alpha": config.alpha, "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
      "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
      "use_rslora": False, "use_dora": False}
  metadata = {"format": "pt"} | ({"base_fingerprint": base_fingerprint} if base_fingerprint else {})
  with new_folder(destination, field) as temporary:
    (temporary / ADAPTER).write_text(json.dumps(about, indent=2) + "\n")
    save_file(tensors, temporary / WEIGHTS, metadata=metadata)


def load_peft(folder: pathlib.Path, model: Model, *, base_fingerprint: str | None = None
              ) -> tuple[Params, LoraConfig]:
  """Reads a PEFT folder as an adapter of this model, in fp32.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    model: the base's architecture.
    base_fingerprint: of the base's weights, to be compared where the adapter states one.

  Raises:
    InputError: it is no LoRA adapter of the plain form, or one of another base.
  """
  found = check_adapter(folder, model)
  if found.fingerprint and base_fingerprint and found.fingerprint != base_fingerprint:
    raise InputError(f"was trained on a base with other weights (fingerprint {found.fingerprint[:12]}..., here "
                     f"{base_fingerprint[:12]}...)", file=found.file, field="base_fingerprint",
                     mend="give the adapter's own base")
  leaves: dict[str, Any] = {}
  layers = linear_layers(model)
  for path in layers:
    weights = [model.names[f"{path}/weight"].format(i=i) for i in range(model.config.num_layers)]
    if weights[0] in found.pairs:
      for which, part in enumerate("ab"):
        tensors = read_tensors(found.file, [found.pairs[weight][which] for weight in weights])
        leaves[f"{path}/{part}"] = np.stack(tensors).astype(np.float32)
  targets = tuple(sorted({layers[path.rpartition("/")[0]] for path in leaves}))
  return unflatten(leaves), LoraConfig(found.rank, found.alpha, targets)
