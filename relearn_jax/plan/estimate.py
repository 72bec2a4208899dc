"""Memory and time of a stage by arithmetic: bytes per device, FLOPs, and what would make it fit.

Notation of the docstrings: L layers, D hidden, F intermediate, N query heads, K key-value heads, H head
size, V vocabulary, T padded tokens a row, c bytes of a number in compute precision. No device is used:
models are only traced for their shapes.
"""

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from relearn_jax.errors import InputError
from relearn_jax.metrics.likelihood import CHUNK_BYTES
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.decoder import REMAT
from relearn_jax.models.model import Model, flatten
from relearn_jax.parallel.rules import RULES
from relearn_jax.plan.devices import GIB, Device

AXES = ("runs", "data", "fsdp", "tensor")
KINDS = ("train", "reference", "generate", "score")
MAX_DEVICES = 64  # that `advise` would ask for

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
    lora_targets: names of linear layers ("q", "down", ...), or ("all",).
    param_dtype: bytes of a number of the weights that are not trained, 4 or 2.
    compute_bytes: 4 for fp32, 2 for bf16.
    remat: a key of `decoder.REMAT`.
    num_microbatches: parts into which a step's rows are split.
    max_new_tokens: of "generate".
    kl: the objective keeps a reference's hidden states and head.
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
  lora_targets: tuple[str, ...] = ("all",)
  param_dtype: int = 4
  compute_bytes: int = 4
  remat: str = "none"
  num_microbatches: int = 1
  max_new_tokens: int = 0
  kl: bool = False

  def __post_init__(self) -> None:
    for field, allowed in (("kind", KINDS), ("adapter", ("full", "lora")), ("remat", tuple(REMAT)),
                           ("param_dtype", (4, 2)), ("compute_bytes", (4, 2))):
      if getattr(self, field) not in allowed:
        raise InputError(f"is {getattr(self, field)!r}", field=field,
                         mend=f"expected one of {', '.join(map(str, allowed))}")


class Phase(NamedTuple):
  """Part of a step on one device: its arithmetic, and the bytes it moves to and from memory."""

  flops: float
  bytes: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a stage needs; memory in bytes per device.

  Attributes:
    num_params: of one run, with its adapter.
    num_trained: of one run.
    weights: as stored: fp32 where they are trained.
    compute: copies of weights in compute precision, or gathered from their shards.
    gradients: fp32; twice where micro-batches are added up.
    optimizer: Adam's two moments, fp32.
    activations: kept from the forward to the backward pass.
    layer: what one layer has in memory while it is at work.
    logits: what the head has in memory while it is at work, which is never while a layer is.
    cache: keys and values of generation.
    reference: hidden states and head that the objective compares with.
    flops: of a step, of all runs; recomputation (remat) is not counted.
    phases: a step on one device, in order.
    compute_bytes: of the work.
  """

  num_params: int
  num_trained: int
  weights: int
  compute: int
  gradients: int
  optimizer: int
  activations: int
  layer: int
  logits: int
  cache: int
  reference: int
  flops: float
  phases: tuple[Phase, ...]
  compute_bytes: int

  @property
  def total(self) -> int:
    """The peak, bytes per device."""
    return (self.weights + self.compute + self.gradients + self.optimizer + self.activations
            + max(self.layer, self.logits) + self.cache + self.reference)

  def seconds(self, device: Device) -> float:
    """Of a step: each phase takes max(FLOPs / (peak * mfu), bytes / bandwidth), the roofline's bound."""
    peak = (device.flops if self.compute_bytes == 2 else device.flops_fp32) * device.mfu
    return sum(max(phase.flops / peak, phase.bytes / device.bandwidth) for phase in self.phases)


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


def _linears(config: ModelConfig) -> tuple[Leaf, ...]:
  """The weights `[L, out, in]` of the layers' products."""
  return tuple(leaf for leaf in leaves(config) if leaf.path.startswith("layers/") and len(leaf.shape) == 3)


def _head(config: ModelConfig) -> Leaf:
  """The output head; the embedding where it is tied."""
  name = "embed/weight" if config.tie_embeddings else "head/weight"
  return next(leaf for leaf in leaves(config) if leaf.path == name)


def adapter_leaves(config: ModelConfig, rank: int, targets: Sequence[str]) -> tuple[Leaf, ...]:
  """A low-rank adapter: `a [L, rank, in]` and `b [L, out, rank]` of every target (Hu et al., 2021).

  Raises:
    InputError: a target that the architecture does not have; the nearest are listed.
  """
  by_name = {leaf.path.split("/")[-2]: leaf for leaf in _linears(config)}
  for target in targets:
    if target != "all" and target not in by_name:
      near = difflib.get_close_matches(target, by_name, 2, 0.3)
      hint = f" (nearest: {', '.join(near)})" if near else ""
      raise InputError(f"has {target!r}, which is no linear layer of {config.architecture}{hint}",
                       field="lora_targets", mend=f"expected all, or some of {', '.join(by_name)}")
  made = []
  for name, (path, (layers, out, width), (_, out_axis, in_axis)) in by_name.items():
    if "all" in targets or name in targets:
      made += [Leaf(f"lora/{path}/a", (layers, rank, width), ("layers", None, in_axis)),
               Leaf(f"lora/{path}/b", (layers, out, rank), ("layers", out_axis, None))]
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


def _is_gated(config: ModelConfig) -> bool:
  return any(leaf.path == "layers/mlp/gate/weight" for leaf in _linears(config))


def kept_per_token(config: ModelConfig, length: int, remat: str, compute_bytes: int, tensor: int = 1) -> int:
  """Bytes that one layer keeps of a token for its backward pass.

  What `jax.ad_checkpoint.saved_residuals` lists for each policy (n norms in a layer: 2, or 1 where
  attention and MLP share it):

  * full: c D, the layer's input.
  * attn: c (D + 2 N H + 2 K H), with queries, keys, values and attention's result.
  * dots: c (n D + N H + 2 K H + F), with the results of products with weights; 2 F with a gate.
  * none: n (8 + c) D for the norms in fp32, c (2 N H + 2 K H), 6 c F for the MLP (gate, up and the
    activation's steps; as many without a gate), and attention's weights before and after normalisation,
    (4 + c) N T.

  Heads and the MLP's width are divided over `tensor`.
  """
  c, gated = compute_bytes, _is_gated(config)
  norms = sum(leaf.path.startswith("layers/") and leaf.path.endswith("norm/weight") for leaf in leaves(config))
  width, heads = config.hidden_size, -(-config.num_heads // tensor)
  q, kv = heads * config.head_dim, -(-config.num_kv_heads // tensor) * config.head_dim
  wide = -(-config.intermediate_size // tensor)
  return {
      "full": c * width,
      "attn": c * (width + 2 * q + 2 * kv),
      "dots": c * (norms * width + q + 2 * kv + (2 if gated else 1) * wide),
      "none": norms * (8 + c) * width + c * (2 * q + 2 * kv + 6 * wide) + (4 + c) * heads * length,
  }[remat]


def _work_per_token(work: Work, tensor: int) -> int:
  """Bytes that a layer at work has of a token, beside what is kept.

  Training: with remat, everything of the one layer that is computed again; then gradients, of attention's
  weights and scores (8 N T) or of the MLP's arrays (3 c F), and of the layer's input and output (2 c D).
  Forward alone: the norm (8 + 2 c) D, and either scores and weights (8 N T) with c (N H + 2 K H), or 3 c F.
  """
  config, c = work.config, work.compute_bytes
  heads, wide = -(-config.num_heads // tensor), -(-config.intermediate_size // tensor)
  scores, mlp = 8 * heads * work.length, 3 * c * wide
  if work.kind == "train":
    again = 0 if work.remat == "none" else kept_per_token(config, work.length, "none", c, tensor)
    return again + max(scores, mlp) + 2 * c * config.hidden_size
  qkv = c * config.head_dim * (heads + 2 * -(-config.num_kv_heads // tensor))
  return (8 + 2 * c) * config.hidden_size + max(scores + qkv, mlp)


def _logits_bytes(work: Work, rows: int, shards: int) -> int:
  """Bytes of one run's fp32 logits in the chunk at work, on a device.

  The chunk is that of `likelihood.per_token`; three arrays of it in the backward pass (logits, softmax,
  gradient), two in the forward pass, and two more for a reference's distribution. Generation has one
  position a row, scoring all counted ones at once.

  Args:
    work: the stage.
    rows: of one run in a micro-batch, on all devices.
    shards: devices that share them.
  """
  position = 4 * rows * work.config.vocab_size
  positions = 1 if work.kind == "generate" else work.counted
  if work.kind in ("train", "reference"):
    chunk = max(1, CHUNK_BYTES * shards // position)
    positions = -(-positions // -(-positions // chunk)) if positions > chunk else positions
  copies = (3 if work.kind == "train" else 2) + (2 if work.kl and work.kind == "train" else 0)
  return copies * position * positions // shards


def cache_per_token(config: ModelConfig, compute_bytes: int, tensor: int = 1) -> int:
  """Bytes of the keys and values of one token: 2 c L K H."""
  return 2 * compute_bytes * config.num_layers * -(-config.num_kv_heads // tensor) * config.head_dim


def mean_keys(length: float, window: int | None) -> float:
  """Keys that a token attends to, on average over a row: T / 2, or w - w^2 / (2 T) in a window w < T."""
  return length / 2 if window is None or window >= length else window - window**2 / (2 * length)


def matmul_params(config: ModelConfig) -> int:
  """Parameters that are multiplied with every token: the layers' products and the head, tied or not."""
  return count(_linears(config)) + count([_head(config)])


def flops_per_token(work: Work) -> float:
  """FLOPs per padded token of a pass over rows, of the kind of work; remat is not counted.

  With P = `matmul_params`, A the adapter's parameters and S = `mean_keys`: a forward pass is
  2 P + 2 A + 4 L N H S, training thrice that (Kaplan et al., 2020; causal attention counts half of its
  square). Where only an adapter is trained the frozen products have no weight gradient: 4 P + 6 A + 12 L N H S.
  """
  config = work.config
  base = matmul_params(config)
  extra = count(_adapter(work))
  attention = 4 * config.num_layers * config.num_heads * config.head_dim * mean_keys(work.length, config.sliding_window)
  if work.kind != "train":
    return 2 * base + 2 * extra + attention
  return (4 if work.adapter == "lora" else 6) * base + 6 * extra + 3 * attention


def _adapter(work: Work) -> tuple[Leaf, ...]:
  return adapter_leaves(work.config, work.lora_rank, work.lora_targets) if work.adapter == "lora" else ()


def _copies(work: Work, stored: int, mesh: Mesh) -> int:
  """Bytes of one run's weights in the form that products read, where that is not how they are stored.

  One layer at a time in the scan, whole over `fsdp`, and the head. Training without remat in another
  precision keeps the copies of all layers, as residuals.
  """
  c, fsdp = work.compute_bytes, mesh.get("fsdp", 1)
  if stored == c and fsdp == 1:
    return 0
  whole = dict(mesh) | {"fsdp": 1}
  linears = _linears(work.config)
  layer = c * count_shard(linears, whole) // work.config.num_layers
  head = c * count_shard([_head(work.config)], whole)
  if stored != c and work.kind == "train" and work.remat == "none":
    return c * count_shard(linears, mesh) + head + (layer if fsdp > 1 else 0)
  return layer + head


def estimate(work: Work, mesh: Mesh) -> Estimate:
  """Memory of a device and FLOPs of a step; a device's runs are computed all at once, as on accelerators.

  Per run: weights are 4 bytes where trained, else `param_dtype` (an adapter always 4); gradients 4 (8 with
  micro-batches) and Adam 8 bytes a trained parameter; activations L * `kept_per_token` and the final norm's
  (8 + c) D, of the tokens of a micro-batch. Full fine-tuning in fp32 is thus 16 bytes a parameter.
  Traffic: weights once for each pass over them and micro-batch, 28 bytes a trained parameter for the update
  (reads parameter, gradient and moments, writes all but the gradient), in decoding weights and cache once a token.

  Args:
    work: the stage.
    mesh: sizes of the axes `AXES`.
  """
  if unknown := set(mesh) - set(AXES):
    raise InputError(f"has the axis {sorted(unknown)[0]!r}", field="mesh", mend=f"expected {', '.join(AXES)}")
  config, c, training = work.config, work.compute_bytes, work.kind == "train"
  tensor, row_shards = mesh.get("tensor", 1), mesh.get("data", 1) * mesh.get("fsdp", 1)
  runs = -(-work.runs // mesh.get("runs", 1))
  parts = work.num_microbatches if training else 1
  rows = -(-work.rows // parts)
  rows_here = -(-rows // row_shards)
  tokens = rows_here * work.length

  base, extra = leaves(config), _adapter(work)
  full = training and work.adapter == "full"
  trained = base if full else extra if training else ()
  stored = 4 if full else work.param_dtype
  trained_here = count_shard(trained, mesh)

  kept = cache = reference = 0
  if training:
    each = kept_per_token(config, work.length, work.remat, c, tensor)
    kept = tokens * (config.num_layers * each + (8 + c) * config.hidden_size)
  layer = tokens * _work_per_token(work, tensor)
  if work.kind == "generate":
    slots = max(1, work.max_new_tokens - 1)
    each = rows_here * cache_per_token(config, c, tensor)
    cache = each * (work.length + slots)
    # A step's scan writes the new slots anew, and joins one layer's prompt and new keys.
    layer = max(layer, each * slots + each * (work.length + slots) // config.num_layers)
  elif work.kind == "score":
    cache = tokens * cache_per_token(config, c, tensor)
  if work.kl and work.kind in ("train", "reference"):
    rows_kept = -(-work.rows // row_shards)
    reference = (rows_kept * work.length * config.hidden_size * c
                 + work.param_dtype * count_shard([_head(config)], mesh))

  flops, phases = _time(work, mesh, stored, trained_here, runs)
  return Estimate(
      num_params=count(base) + count(extra), num_trained=count(trained),
      weights=runs * (stored * count_shard(base, mesh) + 4 * count_shard(extra, mesh)),
      compute=runs * _copies(work, stored, mesh),
      gradients=runs * trained_here * (8 if parts > 1 else 4), optimizer=runs * trained_here * 8,
      activations=runs * kept, layer=runs * layer, logits=runs * _logits_bytes(work, rows, row_shards * tensor),
      cache=runs * cache, reference=runs * reference, flops=flops, phases=phases, compute_bytes=c)


def _time(work: Work, mesh: Mesh, stored: int, trained_here: int, runs: int) -> tuple[float, tuple[Phase, ...]]:
  """FLOPs of a step of all runs, and its phases on one device; see `estimate`."""
  config = work.config
  shards = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("tensor", 1)
  # A token reads one row of an embedding that is no head.
  read = [leaf for leaf in leaves(config) if leaf.path != "embed/weight" or config.tie_embeddings]
  weights = stored * count_shard(read, mesh) + 4 * count_shard(_adapter(work), mesh)
  one = work.rows * work.length * flops_per_token(work)
  if work.kind == "train":
    passes = work.num_microbatches * (2 if work.remat == "none" else 3)
    return work.runs * one, (Phase(runs * one / shards, runs * (passes * weights + 28 * trained_here)),)
  first = Phase(runs * one / shards, runs * weights)
  if work.kind != "generate" or not work.max_new_tokens:
    return work.runs * one, (first,)
  reach = work.length + work.max_new_tokens / 2
  seen = min(reach, config.sliding_window or reach)
  each = (2 * matmul_params(config) + 2 * count(_adapter(work))
          + 4 * config.num_layers * config.num_heads * config.head_dim * seen)
  decode = work.rows * work.max_new_tokens * each
  rows_here = -(-work.rows // (mesh.get("data", 1) * mesh.get("fsdp", 1)))
  # All slots are read, whatever the mask hides.
  cache = rows_here * (work.length + work.max_new_tokens) * cache_per_token(
      config, work.compute_bytes, mesh.get("tensor", 1))
  moved = work.max_new_tokens * (weights + cache)
  return work.runs * (one + decode), (first, Phase(runs * decode / shards, runs * moved))


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
  if work.kind == "train" and work.adapter == "full":
    knobs["adapter"] = ["lora"]
  return {field: values for field, values in knobs.items() if values}


def _tried(work: Work, mesh: Mesh, knobs: Mapping[str, list[Any]], fields: Sequence[str]) -> Iterator[Suggestion]:
  for values in itertools.product(*(knobs[field] for field in fields)):
    settings = dict(zip(fields, values, strict=True))
    changed = dataclasses.replace(work, **{k: v for k, v in settings.items() if k != "fsdp"})
    laid = dict(mesh) | {k: v for k, v in settings.items() if k == "fsdp"}
    yield Suggestion(settings, changed, laid, estimate(changed, laid))


def suggest(work: Work, mesh: Mesh, device: Device) -> tuple[list[Suggestion], Suggestion | None]:
  """The fewest settings that make a stage fit: for each set of so many fields, the mildest values that do.

  Returns:
    What fits; and, where nothing does, the smallest of all that was tried.
  """
  knobs = _knobs(work, mesh, device)
  smallest: Suggestion | None = None
  for size in range(1, len(knobs) + 1):
    found = []
    for fields in itertools.combinations(knobs, size):
      for tried in _tried(work, mesh, knobs, fields):
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
