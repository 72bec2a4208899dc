"""What `relearn bench` is told, and what it refuses before a device is used."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from relearn_jax.bench.shapes import shape_config
from relearn_jax.errors import InputError
from relearn_jax.generation.prompts import check_batch_size
from relearn_jax.models.checkpoint import check_checkpoint
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.decoder import REMAT
from relearn_jax.models.folders import resolve
from relearn_jax.models.precision import check_dtype
from relearn_jax.parallel.mesh import check_mesh
from relearn_jax.plan.work import count, leaves

PARTS = ("train", "decode", "load", "attention")
AUDITS = ("short", "default")  # that are done by hand too
MOST_PRETRAINED = 50_000_000  # parameters of a model that a grid pretrains first


@dataclasses.dataclass(frozen=True)
class BenchSettings:
  """The flags of `relearn bench`, which say what each is."""

  model: str = ""
  shape: str = "small"
  what: tuple[str, ...] = PARTS[:3]
  grid: bool = False
  compare: str = ""
  audit: str = ""
  mesh: str | None = None
  dtype: str = "auto"
  batch_size: int = 8
  length: int = 128
  adapters: tuple[str, ...] = ("full", "lora")
  runs: tuple[int, ...] = (1, 4)
  remat: tuple[str, ...] = ("none",)
  lora_rank: int = 16
  decode_batches: tuple[int, ...] = (1, 16)
  prompt_length: int = 64
  max_new_tokens: int = 32
  repeats: int = 10


def _among(field: str, given: Sequence[object], allowed: Sequence[str]) -> None:
  if not given:
    raise InputError("is empty", field=f"--{field}", mend=f"expected some of {', '.join(allowed)}")
  if unknown := [value for value in given if value not in allowed]:
    raise InputError(f"has {unknown[0]!r}", field=f"--{field}", mend=f"expected some of {', '.join(allowed)}")


def _positive(field: str, given: Sequence[int], least: int = 1) -> None:
  if not given:
    raise InputError("is empty", field=f"--{field}", mend="expected numbers, with commas between them")
  if wrong := [value for value in given if value < least]:
    raise InputError(f"is {wrong[0]}" if len(given) == 1 else f"has {wrong[0]}", field=f"--{field}",
                     mend=f"expected at least {least}")


def check_settings(settings: BenchSettings) -> tuple[ModelConfig, pathlib.Path | None]:
  """The architecture, and the checkpoint's folder where one is given; no device is used.

  Raises:
    InputError: a flag, or the checkpoint that it names, is wrong.
  """
  _among("what", settings.what, PARTS)
  _among("adapters", settings.adapters, ("full", "lora"))
  _among("remat", settings.remat, tuple(REMAT))
  check_batch_size(settings.batch_size)
  for field in ("runs", "decode_batches"):
    _positive(field, getattr(settings, field))
  for field, least in (("length", 2), ("lora_rank", 1), ("prompt_length", 1), ("max_new_tokens", 2), ("repeats", 1)):
    _positive(field, [getattr(settings, field)], least)
  check_dtype(settings.dtype, None, "--dtype")
  _check_compare(settings)
  folder = None
  if settings.model:
    if settings.grid:
      raise InputError("is given, and a grid pretrains a small model of a named shape", field="--model",
                       mend="leave it out, or leave out --grid")
    folder = resolve(settings.model, "--model")
    config = check_checkpoint(folder).config
  else:
    config = shape_config(settings.shape)
  if settings.mesh is not None:
    check_mesh(settings.mesh, config)
  if settings.grid:
    _check_grid(settings, config)
    return config, folder
  for field, tokens in (("--length", settings.length),
                        ("--prompt_length", settings.prompt_length + settings.max_new_tokens)):
    if tokens > config.max_positions:
      more = "" if field == "--length" else " with --max_new_tokens"
      raise InputError(f"is {tokens} tokens{more}, and the model has {config.max_positions} positions", field=field,
                       mend="give fewer")
  return config, folder


def _check_grid(settings: BenchSettings, config: ModelConfig) -> None:
  if config.architecture != "llama" or config.num_heads * config.head_dim != config.hidden_size or config.rope_scaling:
    raise InputError(f"is {settings.shape!r}, and a grid pretrains a plain Llama", field="--shape",
                     mend="give tiny, names or small")
  if (size := count(leaves(config))) > MOST_PRETRAINED:
    raise InputError(f"is {settings.shape!r} with {size / 1e6:.0f} M parameters, and a grid pretrains its model first",
                     field="--shape", mend=f"give one of at most {MOST_PRETRAINED / 1e6:.0f} M")


def _check_compare(settings: BenchSettings) -> None:
  if settings.compare not in ("", "torch"):
    raise InputError(f"is {settings.compare!r}", field="--compare", mend="expected torch")
  if settings.audit:
    _among("audit", [settings.audit], AUDITS)
    if not (settings.grid and settings.compare):
      raise InputError("says which audit is done by hand, and none is", field="--audit",
                       mend="give --grid --compare=torch too, or leave it out")
  if settings.compare and importlib.util.find_spec("torch") is None:
    raise InputError("is torch, which is not installed", field="--compare", mend="pip install 'relearn_jax[parity]'")


def settings_of(values: Any) -> BenchSettings:
  """The settings that flags state.

  Raises:
    InputError: a list holds something else than numbers, or both a model and a shape are given.
  """
  if values.model and values.shape:
    raise InputError("is given beside --model", field="--shape", mend="give one of them")
  numbers = lambda field: tuple(_number(field, text) for text in getattr(values, field))
  return BenchSettings(
      model=values.model or "", shape=values.shape or BenchSettings.shape, what=tuple(values.what), grid=values.grid,
      compare=values.compare, audit=values.audit, mesh=values.mesh, dtype=values.dtype, batch_size=values.batch_size,
      length=values.length, adapters=tuple(values.adapters), runs=numbers("runs"), remat=tuple(values.remat),
      lora_rank=values.lora_rank, decode_batches=numbers("decode_batches"), prompt_length=values.prompt_length,
      max_new_tokens=values.max_new_tokens, repeats=values.repeats)


def _number(field: str, text: str) -> int:
  if not text.isdecimal():
    raise InputError(f"has {text!r}", field=f"--{field}", mend="expected numbers, with commas between them")
  return int(text)
