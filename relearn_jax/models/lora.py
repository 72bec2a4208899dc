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
from relearn_jax.models.export import check_finite, new_folder
from relearn_jax.models.model import Model, Params, flatten, unflatten
from relearn_jax.models.safetensor_files import read_header, read_json, read_tensors

ALL = "all-linear"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


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


def linear_layers(model: Model) -> dict[str, str]:
  """Path of every linear layer of the stacked layers -> the last part of its Hugging Face name."""
  shapes = flatten(model.abstract())
  return {path.removesuffix("/weight"): model.names[path].split(".")[-2] for path, shape in shapes.items()
          if path.startswith("layers/") and path.endswith("/weight") and shape.ndim == 3}


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


def _peft_names(model: Model) -> dict[str, str]:
  """Path of a linear layer -> its name in a PEFT file, `{i}` for the layer."""
  return {path: PREFIX + model.names[f"{path}/weight"].removesuffix(".weight") for path in linear_layers(model)}


def export_peft(adapter: Params, model: Model, config: LoraConfig, destination: pathlib.Path, *, base: str,
                base_fingerprint: str | None = None) -> None:
  """Writes an adapter as a folder that `peft` loads; it appears complete or not at all.

  Args:
    adapter: of one run.
    model: the base's architecture.
    config: rank, scale and targets.
    destination: a folder that does not exist yet, or is empty.
    base: folder or hub id of the base, as PEFT should find it.
    base_fingerprint: of the base's weights; a folder that has one is refused for another base.

  Raises:
    InputError: the destination holds something, or cannot be written; or a weight is not finite.
  """
  names, leaves = _peft_names(model), flatten(adapter)
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
  with new_folder(destination) as temporary:
    (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
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
  about = read_json(folder / CONFIG, "give the folder of a PEFT adapter")

  def fail(field: str, problem: str, mend: str) -> InputError:
    return InputError(problem, file=folder / CONFIG, field=field, mend=mend)
  plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
  for field, value in plain.items():
    if about.get(field, value) != value:
      raise fail(field, f"is {about[field]!r}, which is not supported", f"expected {value!r}")
  for field in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
    if about.get(field):
      raise fail(field, f"is {about[field]!r}, which is not supported", "expected none")
  rank, alpha = about.get("r"), about.get("lora_alpha")
  if type(rank) is not int or rank < 1:
    raise fail("r", f"is {rank!r}", "expected a positive integer")
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
    raise fail("lora_alpha", f"is {alpha!r}", "expected a positive number")
  file = folder / WEIGHTS
  if not file.exists():
    raise InputError("does not exist" + (" (adapter_model.bin is there, which can run code when loaded)"
                                         if (folder / "adapter_model.bin").exists() else ""), file=file,
                     mend="save the adapter as safetensors")
  header = read_header(file)
  stated = read_metadata(file).get("base_fingerprint")
  if stated and base_fingerprint and stated != base_fingerprint:
    raise InputError("was trained on a base with other weights "
                     f"({about.get('base_model_name_or_path')!r}, fingerprint {stated[:12]}..., here "
                     f"{base_fingerprint[:12]}...)", file=file, field="base_fingerprint",
                     mend="give the adapter's own base")
  names, shapes, left = _peft_names(model), flatten(model.abstract()), set(header)
  leaves: dict[str, Any] = {}
  for path, name in names.items():
    layers, features, size = shapes[f"{path}/weight"].shape
    for part, want in (("a", (rank, size)), ("b", (features, rank))):
      tensors = [f"{name.format(i=i)}.lora_{part.upper()}.weight" for i in range(layers)]
      if not any(tensor in header for tensor in tensors):
        continue
      for tensor in tensors:
        if tensor not in header:
          raise InputError("is missing", file=file, field=tensor, mend="give an adapter of every layer of this base")
        if tuple(header[tensor]["shape"]) != want:
          raise InputError(f"has shape {tuple(header[tensor]['shape'])}, but this base asks for {want}", file=file,
                           field=tensor, mend=f"give the adapter's own base ({about.get('base_model_name_or_path')})")
      leaves[f"{path}/{part}"] = np.stack(read_tensors(file, tensors)).astype(np.float32)
      left -= set(tensors)
  if left:
    raise InputError("has no place in this base", file=file, field=min(left),
                     mend=f"give the adapter's own base ({about.get('base_model_name_or_path')})")
  if not leaves:
    raise InputError("has no tensors", file=file, mend="give an adapter that was trained")
  layers_of = linear_layers(model)
  targets = tuple(sorted({layers_of[path.rpartition("/")[0]] for path in leaves}))
  return unflatten(leaves), LoraConfig(rank, float(alpha), targets)


def read_metadata(file: pathlib.Path) -> dict[str, str]:
  """The free text of a safetensors header."""
  with file.open("rb") as stream:
    header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
  found = header.get("__metadata__")
  return found if isinstance(found, dict) else {}
