"""Memory and time of a stage by arithmetic: bytes per device, FLOPs, and what would make it fit.

Notation of the docstrings: L layers, D hidden, F intermediate, N query heads, K key-value heads, H head
size, V vocabulary, T padded tokens a row, c bytes of a number in compute precision. No device is used:
models are only traced for their shapes.
"""

import math

from relearn_jax.errors import InputError
from relearn_jax.metrics.likelihood import CHUNK_BYTES
from relearn_jax.models.config import ModelConfig
from relearn_jax.parallel.mesh import AXES
from relearn_jax.plan.work import (
  Estimate,
  Leaf,
  Mesh,
  Phase,
  Work,
  adapter_leaves,
  cache_bytes,
  cache_per_token,
  count,
  count_shard,
  gathered,
  leaves,
  linears,
  output_head,
  split_off,
  whole_over_fsdp,
)


def _is_gated(config: ModelConfig) -> bool:
  return any(leaf.path == "layers/mlp/gate/weight" for leaf in linears(config))


def kept_per_token(config: ModelConfig, length: int, remat: str, compute_bytes: int, tensor: int = 1) -> int:
  """Bytes that one layer keeps of a token for its backward pass.

  What `jax.ad_checkpoint.saved_residuals` lists for each policy (n norms in a layer: 2, or 1 where
  attention and MLP share it):

  * full: c D, the layer's input.
  * attn: c (D + 2 N H + 2 K H), with queries, keys, values and attention's result.
  * dots: c (n D + N H + 2 K H + F), with the results of products with weights; 2 F with a gate.
  * none: n (8 + c) D for the norms in fp32, c (2 N H + 2 K H), 3 c F for the MLP (gate, up and what comes of them; 2
    without a gate), and attention's weights in fp32, in bf16 beside them too where that is computed in: 4 N T or 6 N T.

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
      "none": (norms * (8 + c) * width + c * (2 * q + 2 * kv + (3 if gated else 2) * wide)
               + (4 if c == 4 else 4 + c) * heads * length),
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
  gradient), two in the forward pass, and two more for a reference's distribution or a second model. Generation has one
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
  copies = (3 if work.kind == "train" else 2) + (2 if work.kl and work.kind == "train" or work.second else 0)
  return copies * position * positions // shards


def mean_keys(length: float, window: int | None) -> float:
  """Keys that a token attends to, on average over a row: T / 2, or w - w^2 / (2 T) in a window w < T."""
  return length / 2 if window is None or window >= length else window - window**2 / (2 * length)


def matmul_params(config: ModelConfig) -> int:
  """Parameters that are multiplied with every token: the layers' products and the head, tied or not."""
  return count(linears(config)) + count([output_head(config)])


def flops_per_token(work: Work) -> float:
  """FLOPs per padded token of a pass over rows, of the kind of work; with what remat computes again.

  With P = `matmul_params`, A the adapter's parameters and S = `mean_keys`: a forward pass is
  2 P + 2 A + 4 L N H S, training thrice that (Kaplan et al., 2020; causal attention counts half of its
  square). Where only an adapter is trained the frozen products have no weight gradient: 4 P + 6 A + 12 L N H S.
  See `_again_per_token` for remat.
  """
  config = work.config
  base = matmul_params(config)
  extra = count(_adapter(work))
  attention = 4 * config.num_layers * config.num_heads * config.head_dim * mean_keys(work.length, config.sliding_window)
  if work.kind != "train":
    return 2 * base + 2 * extra + attention
  return (4 if work.adapter == "lora" else 6) * base + 6 * extra + 3 * attention + _again_per_token(work, attention)


def _again_per_token(work: Work, attention: float) -> float:
  """FLOPs of what the backward pass computes again, of a token; `attention` is that of a forward pass.

  dots: attention. attn: its scores, the product after it, and the MLP's. full: all products, and attention. The last
  product of a layer's MLP is left out, since nothing of the layer reads its result, and so is attention's last in Phi,
  whose MLP stands beside it.
  """
  names = {"none": (), "dots": (), "attn": ("attn/o", "mlp/"), "full": ("attn/", "mlp/")}[work.remat]
  unread = ("mlp/down", "mlp/fc2", *(("attn/o",) if work.config.architecture == "phi" else ()))
  has = lambda leaf, parts: any(part in leaf.path for part in parts)
  again = [leaf for leaf in (*linears(work.config), *_adapter(work)) if has(leaf, names) and not has(leaf, unread)]
  return 2 * count(again) + attention * {"none": 0.0, "dots": 1.0, "attn": 0.5, "full": 1.0}[work.remat]


def _adapter(work: Work) -> tuple[Leaf, ...]:
  return adapter_leaves(work.config, work.lora_rank, work.lora_targets) if work.adapter == "lora" else ()


def _copies(work: Work, stored: int, mesh: Mesh, room: float) -> int:
  """Bytes of one run's weights in the form that products read, where that is not how they are stored.

  One layer at a time in the scan, whole over `fsdp`, and the head. Training without remat in another
  precision keeps the copies of all layers, as residuals. Decoding keeps what `work.gathered` and `work.split_off` say:
  c bytes a number of all weights that lie over `fsdp`, nearly c P, and as much of the layers', each by itself.
  """
  c, fsdp = work.compute_bytes, mesh.get("fsdp", 1)
  apart = c * split_off(work, mesh, room)
  if numbers := gathered(work, mesh, room):
    return c * numbers + apart
  if stored == c and fsdp == 1:
    return apart
  whole = whole_over_fsdp(mesh)
  products = linears(work.config)
  layer = c * count_shard(products, whole) // work.config.num_layers
  head = c * count_shard([output_head(work.config)], whole)
  if stored != c and work.kind == "train" and work.remat == "none":
    return c * count_shard(products, mesh) + head + (layer if fsdp > 1 else 0)
  return (apart or layer) + head


def estimate(work: Work, mesh: Mesh, room: float = math.inf) -> Estimate:
  """Memory of a device and FLOPs of a step; a device's runs are computed all at once, as on accelerators.

  Per run (a shared base once): weights are 4 bytes where trained, else `param_dtype` (an adapter always 4);
  gradients 4 (8 with micro-batches) and Adam 8 bytes a trained parameter, 4 for each of `copies`; activations
  L * `kept_per_token` and the final norm's (8 + c) D, of the tokens of a micro-batch, times `kept`, and `inner`. Full
  fine-tuning in fp32 is thus 16 bytes a parameter. The update copies moments, which are donated and read while they are
  written: on CPU the compiler copies those of several arrays, of which the two of the largest are counted, 8 bytes a
  number (benchmarks/plan.md). FLOPs are those of `passes`, of which each defence makes its own number
  (`recipes.defence_cost`).
  Traffic: weights once for each pass over them and micro-batch, 28 bytes a trained parameter for the update
  (reads parameter, gradient and moments, writes all but the gradient), in decoding weights and cache once a token; with
  `fsdp` the weights are those that were gathered, c bytes a number, and so are layers' where they are copied apart.

  Args:
    work: the stage.
    mesh: sizes of the axes `AXES`.
    room: bytes of a device that copies for decoding may take; see `work.gathered` and `work.split_off`.
  """
  if unknown := set(mesh) - set(AXES):
    raise InputError(f"has the axis {sorted(unknown)[0]!r}", field="mesh", mend=f"expected {', '.join(AXES)}")
  config, c, training = work.config, work.compute_bytes, work.kind == "train"
  tensor, row_shards = mesh.get("tensor", 1), mesh.get("data", 1) * mesh.get("fsdp", 1)
  runs, waiting = (-(-number // mesh.get("runs", 1)) for number in (work.runs, work.waiting))
  models = runs * (2 if work.second else 1) + waiting  # in memory
  bases = 1 if work.shared else models
  parts = work.num_microbatches if training else 1
  rows = -(-work.rows // parts)
  rows_here = -(-rows // row_shards)
  tokens = rows_here * work.length

  base, extra = leaves(config), _adapter(work)
  full = (training or work.moments) and work.adapter == "full"
  trained = base if full else extra if training or work.moments else ()
  stored = 4 if full else work.param_dtype
  trained_here = count_shard(trained, mesh)

  kept = cache = reference = 0
  if training:
    each = kept_per_token(config, work.length, work.remat, c, tensor)
    kept = math.ceil(work.kept * tokens * (config.num_layers * each + (8 + c) * config.hidden_size))
    if work.inner:
      again = tokens * config.num_layers * kept_per_token(config, work.length, "none", c, tensor)
      kept += math.ceil(work.inner * (again + 4 * rows_here * work.counted * config.vocab_size // tensor))
  layer = tokens * _work_per_token(work, tensor)
  apart = split_off(work, mesh, room)
  if work.kind == "generate":
    slots = max(1, work.max_new_tokens - 1)
    each = rows_here * cache_per_token(config, c, tensor)
    cache = cache_bytes(work, mesh)
    # Where layers are copied apart their caches are too, once prompts have been read. Otherwise a step's scan writes
    # the new slots anew, and joins one layer's prompt and new keys.
    layer = max(layer, cache if apart else each * slots + each * (work.length + slots) // config.num_layers)
  elif work.kind == "score":
    cache = tokens * cache_per_token(config, c, tensor)
  if work.kind in ("train", "reference"):
    split = lambda rows: -(-rows // row_shards)
    states = split(work.reference_rows or (work.rows if work.kl else 0)) * config.hidden_size * c
    reference = work.length * (states + 4 * split(work.statistic_rows))
    if work.kl and work.adapter == "full":  # a frozen head is the model's own
      reference += work.reference_heads * stored * count_shard([output_head(config)], mesh)

  flops, phases = _time(work, mesh, stored, trained_here, runs, apart)
  return Estimate(
      num_params=count(base) + count(extra), num_trained=count(trained) if training else 0,
      weights=bases * stored * count_shard(base, mesh) + models * 4 * count_shard(extra, mesh),
      compute=((1 if work.shared else models - waiting) * _copies(work, stored, mesh, room)
               + (4 * (models - waiting) * count(extra) if apart else 0)),
      gradients=runs * trained_here * (8 if parts > 1 else 4) if training else 0,
      optimizer=(waiting or runs) * trained_here * 8 + runs * trained_here * 4 * work.copies,
      update=runs * 8 * max((count_shard([leaf], mesh) for leaf in trained), default=0) if training else 0,
      activations=runs * kept, layer=runs * layer, logits=runs * _logits_bytes(work, rows, row_shards * tensor),
      cache=runs * cache, reference=runs * reference, data=runs * -(-work.token_bytes // row_shards), flops=flops,
      phases=phases, compute_bytes=c)


def _time(work: Work, mesh: Mesh, stored: int, trained_here: int, runs: int, apart: int
          ) -> tuple[float, tuple[Phase, ...]]:
  """FLOPs of a step of all runs, and its phases on one device, where decoding reads `apart` numbers that were copied.

  See `estimate`.
  """
  config = work.config
  parts, row_shards = work.num_microbatches if work.kind == "train" else 1, mesh.get("data", 1) * mesh.get("fsdp", 1)
  # Rows are not divided: a device has whole ones, or only padding.
  share = parts * math.ceil(math.ceil(work.rows / parts) / row_shards) / work.rows / mesh.get("tensor", 1)
  # A token reads one row of an embedding that is no head.
  read = [leaf for leaf in leaves(config) if leaf.path != "embed/weight" or config.tie_embeddings]
  base, extra = stored * count_shard(read, mesh), 4 * count_shard(_adapter(work), mesh)
  weights = base + runs * extra if work.shared else runs * (base + extra)  # of all runs
  one = work.rows * work.length * flops_per_token(work) * (2 if work.second else work.passes)
  if work.kind == "train":
    passes = work.passes * work.num_microbatches * (2 if work.remat == "none" else 3)
    return work.runs * one, (Phase(runs * one * share, passes * weights + runs * 28 * trained_here),)
  first = Phase(runs * one * share, 2 * weights if work.second else weights)
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
  if mesh.get("fsdp", 1) > 1:
    base = work.compute_bytes * count_shard(read, whole_over_fsdp(mesh))
  else:
    base -= (stored - work.compute_bytes) * apart
  moved = work.max_new_tokens * (base * (1 if work.shared else runs) + runs * (extra + cache))
  return work.runs * (one + decode), (first, Phase(runs * decode * share, moved, decodes=True))
