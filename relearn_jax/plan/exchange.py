"""Bytes that devices send each other in a step, by arithmetic: what the partitioner makes of `parallel.rules`.

An all-gather of n devices, of an array of B bytes, is (n - 1) / n B sent by each; so is a reduce-scatter; an
all-reduce is both. Devices on the axis `runs` send nothing. Notation as in `estimate`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from relearn_jax.generation.gather import SPREAD
from relearn_jax.plan.devices import Device
from relearn_jax.plan.work import (
  Leaf,
  Mesh,
  Work,
  adapter_leaves,
  count_shard,
  gathered,
  leaves,
  linears,
  output_head,
  whole_over_fsdp,
)


class Exchange(NamedTuple):
  """Bytes that a device sends in a step, of all its runs.

  Attributes:
    weights: all-gathers of weights over `fsdp`.
    gradients: their reduce-scatters over `fsdp`, and all-reduces of those that are whole on each device.
    data: all-reduces of gradients over `data`.
    tensor: all-reduces of activations over `tensor`.
  """

  weights: float = 0.0
  gradients: float = 0.0
  data: float = 0.0
  tensor: float = 0.0

  def seconds(self, device: Device) -> float:
    """What it takes at the maker's rate, alone."""
    return sum(self) / device.link if sum(self) else 0.0


def exchange(work: Work, mesh: Mesh, room: float = math.inf) -> Exchange:
  """What the devices of a run send each other in a step of a stage.

  Weights, where f = `fsdp` devices share them: in c bytes a number, those of the layers forward and once more backward,
  embedding and head once, for each micro-batch and each of `passes`. With P parameters that is (f - 1) / f times nearly
  4 P in bf16. A base that runs share is gathered once for all. To ask, all are gathered once for a batch of questions,
  (f - 1) / f times nearly 2 P in bf16, where they fit (`work.gathered`); elsewhere to read the prompts, and again for
  each new token.

  Gradients, fp32, for each micro-batch and pass: 4 bytes (f - 1) / f of what is sharded, twice that of what is not, as
  norms are. Over `data` twice 4 bytes (d - 1) / d of what a device holds of them.

  Activations over `tensor`, each c D bytes a token, twice (t - 1) / t: behind a layer's two products whose input is
  divided (attention's and the MLP's last), the first of them again with remat "attn" or "full", backward behind each
  product whose output is divided (three of attention, and one or two of the MLP), behind the embedding, and before the
  head of the tokens that count.

  On CPU the compiler makes all-reduces of the reduce-scatters, which send twice as much, and multiplies bfloat16 in
  fp32; its programs are otherwise what is counted here (`tests/plan/test_exchange.py`).

  Args:
    work: the stage.
    mesh: sizes of the axes.
    room: bytes of a device that weights gathered for decoding may take.
  """
  sizes = {axis: mesh.get(axis, 1) for axis in ("runs", "data", "fsdp", "tensor")}
  share = {axis: (size - 1) / size for axis, size in sizes.items()}
  runs, training, c = -(-work.runs // sizes["runs"]), work.kind == "train", work.compute_bytes
  parts = work.num_microbatches if training else 1
  each = work.passes * parts if training else 1 + work.max_new_tokens if work.kind == "generate" else 1
  whole = whole_over_fsdp(mesh)
  is_shared = lambda leaf: SPREAD in leaf.axes
  of = lambda arrays: count_shard([leaf for leaf in arrays if is_shared(leaf)], whole)

  base = leaves(work.config)
  extra = adapter_leaves(work.config, work.lora_rank, work.lora_targets) if work.adapter == "lora" else ()
  ends = [output_head(work.config), next(leaf for leaf in base if leaf.path == "embed/weight")]
  twice = 2 if training else 1
  layers = [leaf for leaf in base if leaf.path.startswith("layers/")]
  bases = 1 if work.shared else runs
  models = 2 if work.second else 1
  once = bases * gathered(work, mesh, room)
  weights = once or models * each * (bases * (twice * of(layers) + of(ends)) + runs * twice * of(extra))

  trained: Sequence[Leaf] = () if not training else extra or base
  sums = of(trained) + 2 * count_shard([leaf for leaf in trained if not is_shared(leaf)], whole)
  rows = -(-work.rows // parts)
  here = parts * -(-rows // (sizes["data"] * sizes["fsdp"]))
  return Exchange(
      weights=share["fsdp"] * c * weights,
      gradients=share["fsdp"] * 4 * runs * each * sums,
      data=share["data"] * 8 * runs * each * count_shard(trained, mesh),
      tensor=2 * share["tensor"] * c * work.config.hidden_size * runs * models * here * _activations(work))


def _activations(work: Work) -> float:
  """All-reduces over `tensor` of a row, in tokens."""
  products = linears(work.config)
  last = sum(leaf.axes[1] == "embed" for leaf in products)
  layers, length = work.config.num_layers, work.length
  if work.kind != "train":
    return (length + (work.max_new_tokens if work.kind == "generate" else 0)) * (layers * last + 1)
  again = 1 if work.remat in ("attn", "full") else 0
  return work.passes * (length * (layers * (len(products) + again) + 1) + work.counted)
