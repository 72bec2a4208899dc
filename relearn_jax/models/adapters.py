"""PEFT folders (Mangrulkar et al., 2022) beside their base or alone: what of them is used, and what is refused."""

import dataclasses
import math
import pathlib
import re
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.models.folders import ADAPTER
from relearn_jax.models.model import Model, flatten
from relearn_jax.models.safetensor_files import ADAPTERS, FLOATS, read_header, read_json, read_metadata

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields of adapter_config.json that change nothing of what a trained adapter adds.
WITHOUT_EFFECT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "layers_pattern", "eva_config",
    "ensure_weight_tying"}
READ = {"r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules"}
# Other ways to begin change the base too, again each time that the adapter is loaded.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A low-rank adapter in which nothing was found wrong.

  Attributes:
    folder: that holds it.
    rank: r.
    alpha: the product of its two matrices is multiplied with alpha / rank.
    pairs: weight of the base, by its Hugging Face name -> names of `a [rank, in]` and `b [out, rank]`.
    fingerprint: of the base's weights that it was trained on, where it states one.
  """

  folder: pathlib.Path
  rank: int
  alpha: float
  pairs: dict[str, tuple[str, str]]
  fingerprint: str | None

  @property
  def scale(self) -> float:
    """What the product of its two matrices is multiplied with."""
    return self.alpha / self.rank

  @property
  def file(self) -> pathlib.Path:
    """That holds its matrices."""
    return self.folder / WEIGHTS


def has_adapter(folder: pathlib.Path) -> bool:
  """Whether an adapter lies in a folder, complete or not."""
  return (folder / ADAPTER).exists() or any(folder.glob(ADAPTERS))


def linear_layers(model: Model) -> dict[str, str]:
  """Path of every linear layer of the stacked layers -> the last part of its Hugging Face name."""
  shapes = flatten(model.abstract())
  return {path.removesuffix("/weight"): model.names[path].split(".")[-2] for path, shape in shapes.items()
          if path.startswith("layers/") and path.endswith("/weight") and shape.ndim == 3}


def peft_names(model: Model) -> dict[str, str]:
  """Path of a linear layer -> its name in a PEFT file, `{i}` for the layer."""
  return {path: PREFIX + model.names[f"{path}/weight"].removesuffix(".weight") for path in linear_layers(model)}


def check_adapter(folder: pathlib.Path, model: Model) -> Adapter:
  """Finds what is wrong with a PEFT folder from its configuration and header alone.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    model: the base's architecture.

  Raises:
    InputError: it is no LoRA adapter of the plain form, or has tensors that this base has no place for.
  """
  about = read_json(folder / ADAPTER, "give the whole folder of the PEFT adapter, or remove what is left of it")
  rank, alpha = _rank_and_alpha(about, folder / ADAPTER)
  file = folder / WEIGHTS
  if not file.exists():
    raise InputError("does not exist" + (" (adapter_model.bin is there, which can run code when loaded)"
                                         if (folder / "adapter_model.bin").exists() else ""), file=file,
                     mend="save the adapter as safetensors")
  header, base = read_header(file), about.get("base_model_name_or_path")
  shapes, left = flatten(model.abstract()), set(header)
  pairs: dict[str, tuple[str, str]] = {}
  for path, name in peft_names(model).items():
    layers, features, size = shapes[f"{path}/weight"].shape
    tensors = [(f"{name.format(i=i)}.lora_A.weight", f"{name.format(i=i)}.lora_B.weight") for i in range(layers)]
    if not any(tensor in header for pair in tensors for tensor in pair):
      continue
    for i, pair in enumerate(tensors):
      _check_target(about, name.format(i=i).removeprefix(PREFIX), folder / ADAPTER)
      for tensor, want in zip(pair, ((rank, size), (features, rank)), strict=True):
        _check_tensor(header, tensor, want, file, base)
      pairs[model.names[f"{path}/weight"].format(i=i)] = pair
      left -= set(pair)
  if left:
    raise InputError("has no place in this base", file=file, field=min(left),
                     mend=f"give the adapter's own base ({base})")
  if not pairs:
    raise InputError("has no tensors", file=file, mend="give an adapter that was trained")
  return Adapter(folder, rank, alpha, pairs, read_metadata(file).get("base_fingerprint"))


def _check_target(about: dict[str, Any], layer: str, file: pathlib.Path) -> None:
  """`InputError` where PEFT would pass over a layer's tensors, since the configuration does not name the layer."""
  def named(field: str) -> bool:
    value: Any = about.get(field)
    if isinstance(value, str):
      return value == "all-linear" or re.fullmatch(value, layer) is not None
    return any(layer == part or layer.endswith(f".{part}") for part in value or ())
  for field, wanted in (("target_modules", True), ("exclude_modules", False)):
    if about.get(field) and named(field) != wanted:
      raise InputError(f"is {about[field]!r}, but {WEIGHTS} {'also ' if wanted else ''}has tensors of {layer}",
                       file=file, field=field, mend="give configuration and weights that belong together")


def _check_tensor(header: dict[str, dict[str, Any]], tensor: str, want: tuple[int, ...], file: pathlib.Path, base: Any
                  ) -> None:
  fail = lambda problem, mend: InputError(problem, file=file, field=tensor, mend=mend)
  if tensor not in header:
    raise fail("is missing", "give an adapter of every layer of this base")
  if tuple(header[tensor]["shape"]) != want:
    raise fail(f"has shape {tuple(header[tensor]['shape'])}, but this base asks for {want}",
               f"give the adapter's own base ({base})")
  if header[tensor]["dtype"] not in FLOATS:
    raise fail(f"has dtype {header[tensor]['dtype']}", f"expected one of {', '.join(FLOATS)}")


def _rank_and_alpha(about: dict[str, Any], file: pathlib.Path) -> tuple[int, float]:
  """Rank and alpha from adapter_config.json; `InputError` for what is not computed here, by its name."""
  def fail(field: str, problem: str, mend: str) -> InputError:
    return InputError(problem, file=file, field=field, mend=mend)
  if about.get("peft_type", "LORA") != "LORA":
    raise fail("peft_type", f"is {about['peft_type']!r}, which is not supported", "expected 'LORA'")
  for field, value in about.items():
    if field not in WITHOUT_EFFECT | READ and value and not (field == "bias" and value == "none"):
      raise fail(field, f"is {value!r}, which is not supported", "merge the adapter into its base where it was trained")
  beginning: Any = about.get("init_lora_weights")
  if beginning not in BEGINNINGS:
    raise fail("init_lora_weights", f"is {beginning!r}, by which loading changes the base too, which is not supported",
               "merge the adapter into its base where it was trained")
  rank, alpha, root = about.get("r"), about.get("lora_alpha"), about.get("use_rslora", False)
  if type(rank) is not int or rank < 1:
    raise fail("r", f"is {rank!r}", "expected a positive integer")
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
    raise fail("lora_alpha", f"is {alpha!r}", "expected a positive number")
  if root not in (None, True, False):
    raise fail("use_rslora", f"is {root!r}", "expected true or false")
  return rank, alpha * math.sqrt(rank) if root else float(alpha)  # rank-stabilised: alpha / sqrt(rank) is the scale
