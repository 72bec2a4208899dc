"""What is planned: a stage of a job, the arrays of its model, and what an estimate of it says."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from relearn_jax.errors import InputError
from relearn_jax.generation.gather import SPREAD
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.decoder import REMAT
from relearn_jax.models.lora import ALL, LoraConfig, check_lora
from relearn_jax.models.model import Model, flatten
from relearn_jax.parallel.rules import RULES
from relearn_jax.plan.devices import Device

KINDS = ("train", "reference", "generate", "score")

Mesh = Mapping[str, int]  # axis -> size; an axis left out has size 1


@dataclasses.dataclass(frozen=True)
class Work:
  """One stage of a job.

  Attributes:
    name: the stage.
    kind: "train", "reference" (the frozen model's forward pass, chunked as in training), "generate"
      (prefill and decoding) or "score" (log-probabilities of answers after a cached prompt).
    config: the model.
    runs: stacked models.
    rows: per run and step, of all data sets together.
    length: padded tokens a row; for "generate", of the prompt.
    counted: tokens a row that the loss looks at.
    steps: of training; batches of the other kinds.
    adapter: "full" (no adapter) or "lora".
    lora_rank: of the adapter.
    lora_targets: as in `models.lora.LoraConfig`.
    shared: one base in memory for all runs, each of which has its own adapter.
    param_dtype: bytes of a number of the weights that are not trained, 4 or 2.
    compute_bytes: 4 for fp32, 2 for bf16.
    remat: a key of `decoder.REMAT`.
    num_microbatches: parts into which a step's rows are split.
    max_new_tokens: of "generate".
    passes: forward and backward passes of a step, where an objective makes others than one.
    kept: likewise, how often as much is kept for the backward pass.
    inner: how often as much is kept as without remat, beside that, with the logits of all counted tokens.
    copies: fp32 numbers in memory for each that is trained, beside parameters, gradients and moments.
    second: of "reference": a second model is asked beside the first.
    kl: the objective keeps a reference's hidden states, and its head where the head is trained.
    reference_rows: rows of which hidden states, or a layer's output, are kept; 0 with `kl`: those of the step.
    reference_heads: copies of the head that are kept with `kl`, one for each data set.
    statistic_rows: rows of which a number a token is kept.
    token_bytes: of one run's data sets on all devices, in training and reference passes; see `audit_plan.Data`.
    moments: the optimizer's moments are in memory, although nothing is trained in this stage.
    groups: the runs may be worked through in smaller groups, by the setting `runs_at_once`.
    waiting: stacked models in memory besides those at work.
  """

  name: str
  kind: str
  config: ModelConfig
  runs: int = 1
  rows: int = 1
  length: int = 512
  counted: int = 512
  steps: int = 1
  adapter: str = "full"
  lora_rank: int = 16
  lora_targets: tuple[str, ...] = (ALL,)
  shared: bool = False
  param_dtype: int = 4
  compute_bytes: int = 4
  remat: str = "none"
  num_microbatches: int = 1
  max_new_tokens: int = 0
  passes: float = 1.0
  kept: float = 1.0
  inner: float = 0.0
  copies: int = 0
  second: bool = False
  kl: bool = False
  reference_rows: int = 0
  reference_heads: int = 1
  statistic_rows: int = 0
  token_bytes: int = 0
  moments: bool = False
  groups: bool = False
  waiting: int = 0

  def __post_init__(self) -> None:
    for field, allowed in (("kind", KINDS), ("adapter", ("full", "lora")), ("remat", tuple(REMAT)),
                           ("param_dtype", (4, 2)), ("compute_bytes", (4, 2))):
      if getattr(self, field) not in allowed:
        raise InputError(f"is {getattr(self, field)!r}", field=field,
                         mend=f"expected one of {', '.join(map(str, allowed))}")


class Phase(NamedTuple):
  """Part of a step on one device: its arithmetic, the bytes it moves to and from memory, and whether it is decoding."""

  flops: float
  bytes: float
  decodes: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a stage needs; memory in bytes per device.

  Attributes:
    num_params: of one run, with its adapter.
    num_trained: of one run.
    weights: as stored: fp32 where they are trained.
    compute: copies of weights in compute precision, gathered from their shards, or with each layer's by themselves.
    gradients: fp32; twice where micro-batches are added up.
    optimizer: Adam's two moments, and the copies of what is trained that an objective holds, fp32.
    update: copies of the largest trained array's moments, which are read while they are written.
    activations: kept from the forward to the backward pass.
    layer: what one layer has in memory while it is at work.
    logits: what the head has in memory while it is at work, which is never while a layer is.
    cache: keys and values of generation.
    reference: what the objective compares with: hidden states and head, a layer's output, numbers of tokens.
    data: token rows.
    flops: of a step, of all runs; with what remat computes again.
    phases: a step on one device, in order.
    compute_bytes: of the work.
  """

  num_params: int
  num_trained: int
  weights: int
  compute: int
  gradients: int
  optimizer: int
  update: int
  activations: int
  layer: int
  logits: int
  cache: int
  reference: int
  data: int
  flops: float
  phases: tuple[Phase, ...]
  compute_bytes: int

  @property
  def total(self) -> int:
    """The peak, bytes per device."""
    return (self.weights + self.compute + self.gradients + self.optimizer + self.update
            + self.activations + max(self.layer, self.logits) + self.cache + self.reference
            + self.data)

  def seconds(self, device: Device) -> float:
    """Of a step: each phase takes max(FLOPs / (peak * mfu), bytes / bandwidth), the roofline's bound.

    In decoding only the share `device.decoding` of the bandwidth is reached.
    """
    peak = (device.flops if self.compute_bytes == 2 else device.flops_fp32) * device.mfu
    reached = lambda phase: device.bandwidth * (device.decoding if phase.decodes else 1.0)
    return sum(max(phase.flops / peak, phase.bytes / reached(phase)) for phase in self.phases)


class Leaf(NamedTuple):
  """One array of the parameters of one run, with the logical axes of its dimensions."""

  path: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]


@functools.cache
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
  """All parameters of a model; traced, not computed."""
  model = Model(config)
  axes = model.axes()
  return tuple(Leaf(path, tuple(leaf.shape), axes[path]) for path, leaf in flatten(model.abstract()).items())


def linears(config: ModelConfig) -> tuple[Leaf, ...]:
  """The weights `[L, out, in]` of the layers' products."""
  return tuple(leaf for leaf in leaves(config) if leaf.path.startswith("layers/") and len(leaf.shape) == 3)


def output_head(config: ModelConfig) -> Leaf:
  """The output head; the embedding where it is tied."""
  name = "embed/weight" if config.tie_embeddings else "head/weight"
  return next(leaf for leaf in leaves(config) if leaf.path == name)


@functools.lru_cache(maxsize=64)
def adapter_leaves(config: ModelConfig, rank: int, targets: tuple[str, ...]) -> tuple[Leaf, ...]:
  """A low-rank adapter: `a [L, rank, in]` and `b [L, out, rank]` of every target (Hu et al., 2021).

  Raises:
    InputError: a target that matches no layer; see `models.lora.check_lora`.
  """
  model, made = Model(config), []
  by_path = {leaf.path.removesuffix("/weight"): leaf for leaf in linears(config)}
  for path in check_lora(model, LoraConfig(rank, 1.0, targets), None):
    _, (layers, out, width), (_, out_axis, in_axis) = by_path[path]
    made += [Leaf(f"lora/{path}/weight/a", (layers, rank, width), ("layers", None, in_axis)),
             Leaf(f"lora/{path}/weight/b", (layers, out, rank), ("layers", out_axis, None))]
  return tuple(made)


def count(arrays: Sequence[Leaf]) -> int:
  """Numbers in whole arrays."""
  return sum(math.prod(leaf.shape) for leaf in arrays)


def count_shard(arrays: Sequence[Leaf], mesh: Mesh) -> int:
  """Numbers of one run's arrays on one device, each dimension divided as `parallel.rules.RULES` says."""
  def parts(axis: str | None) -> int:
    return math.prod(mesh.get(name, 1) for name in RULES[axis]) if axis else 1
  return sum(math.prod(-(-size // parts(axis)) for size, axis in zip(leaf.shape, leaf.axes, strict=True))
             for leaf in arrays)


def whole_over_fsdp(mesh: Mesh) -> Mesh:
  """The mesh as gathered weights lie on it."""
  return dict(mesh) | {"fsdp": 1}


def cache_per_token(config: ModelConfig, compute_bytes: int, tensor: int = 1) -> int:
  """Bytes of the keys and values of one token: 2 c L K H."""
  return 2 * compute_bytes * config.num_layers * -(-config.num_kv_heads // tensor) * config.head_dim


def cache_bytes(work: Work, mesh: Mesh) -> int:
  """Bytes of one run's keys and values on a device, of the prompts and of what is generated."""
  rows = -(-work.rows // (mesh.get("data", 1) * mesh.get("fsdp", 1)))
  slots = max(1, work.max_new_tokens - 1)
  return rows * (work.length + slots) * cache_per_token(work.config, work.compute_bytes, mesh.get("tensor", 1))


def gathered(work: Work, mesh: Mesh, room: float) -> int:
  """Numbers of one run's weights that a device holds whole over `fsdp` while a batch of questions is answered.

  0 where those of all its runs at work (one base, where they share it), c bytes a number, are more than `room` bytes:
  then every new token gathers them anew. See `generation.gather.gather_weights`.
  """
  if work.kind != "generate" or mesh.get("fsdp", 1) == 1:
    return 0
  numbers = count_shard([leaf for leaf in leaves(work.config) if SPREAD in leaf.axes], whole_over_fsdp(mesh))
  return numbers if work.compute_bytes * _bases(work, mesh) * numbers <= room else 0


def split_off(work: Work, mesh: Mesh, room: float) -> int:
  """Numbers of one run's weights that a device copies so that each layer's lie by themselves while tokens are decoded.

  0 where this copy, of adapters and cache too, and what was gathered are together more than `room` bytes, and where
  weights stay divided over `fsdp`. See `generation.gather.split_weights`.
  """
  before = gathered(work, mesh, room)
  if work.kind != "generate" or mesh.get("fsdp", 1) > 1 and not before:
    return 0
  layers = [leaf for leaf in leaves(work.config) if SPREAD in leaf.axes and leaf.path.startswith("layers/")]
  numbers = count_shard(layers, whole_over_fsdp(mesh))
  adapter = adapter_leaves(work.config, work.lora_rank, work.lora_targets) if work.adapter == "lora" else ()
  own = -(-work.runs // mesh.get("runs", 1)) * (4 * count(adapter) + cache_bytes(work, mesh))
  return numbers if work.compute_bytes * _bases(work, mesh) * (before + numbers) + own <= room else 0


def _bases(work: Work, mesh: Mesh) -> int:
  return 1 if work.shared else -(-work.runs // mesh.get("runs", 1))
