"""What the figures of a benchmark mean, from the FLOPs and bytes of `plan.estimate`: the one count in the project."""

import dataclasses

from relearn_jax.plan.estimate import estimate, flops_per_token
from relearn_jax.plan.work import Mesh, Work

# As they stand in the JSON file.
FORMULAS = {
    "mfu": "model FLOPs of a step's padded tokens / (seconds of the step * measured matmul FLOP/s). FLOPs a token: "
           "training of all parameters 6 P + 12 L N H S, of an adapter 4 P + 6 A + 12 L N H S; a forward pass "
           "2 P + 2 A + 4 L N H S. P: parameters of the layers' products and of the head; A: of the adapter; L layers, "
           "N heads of size H; S: keys that a token sees on average, half of the padded length without a window. What "
           "remat computes again is not counted.",
    "mfu_real": "the same, of real tokens: mfu * real tokens / padded tokens",
    "compute_share": "as mfu, with what remat computes again: what `relearn plan` multiplies a device's rate with",
    "bandwidth_share": "bytes of a decoding step / (its seconds * measured bandwidth). Bytes: all weights once as they "
                       "are stored (an embedding that is no head left out), and keys and values of all slots of all "
                       "rows.",
    "decode_seconds": "of one step: (seconds of G new tokens - seconds of 1 new token) / (G - 1), call by call in "
                      "turns; the second is reading the prompts",
    "matmul": "2 n^3 / seconds, of square matrices in the compute precision, on all devices at once",
    "bandwidth": "the higher of reading (a matrix times a vector) and of updating in place (read and written), bytes / "
                 "seconds, on all devices at once",
    "amount": "what an audit was on each side: points, models that were attacked; steps of training, of all models; "
              "asked, interviews; questions answered and rows scored in them. By hand in torch all chains unlearn as "
              "far as ours did, and the steps that are attacked are ours; equal_unlearn_steps counts the chains for "
              "which torch's own answers would have chosen the same. Ours has its programs in memory. Neither trains "
              "the model that all begin as, and ours is counted without the stage that looks for it.",
}


def model_flops(work: Work) -> float:
  """Of a training step of all runs, or of reading prompts, on all devices; without what remat computes again."""
  return work.runs * work.rows * work.length * flops_per_token(dataclasses.replace(work, remat="none"))


def mfu(work: Work, seconds: float, matmul: float) -> float:
  """Share of the measured rate of products, FLOP/s of all devices of the mesh, that a model's own FLOPs reach."""
  return model_flops(work) / (seconds * matmul)


def compute_share(work: Work, mesh: Mesh, seconds: float, matmul: float) -> float:
  """As `mfu`, of all FLOPs that a plan counts."""
  return estimate(work, mesh).flops / (seconds * matmul)


def decode_bytes(work: Work, mesh: Mesh) -> float:
  """Bytes that a device reads in one decoding step."""
  return estimate(work, mesh).phases[1].bytes / work.max_new_tokens


def bandwidth_share(work: Work, mesh: Mesh, devices: int, seconds: float, bandwidth: float) -> float:
  """Share of the measured bandwidth, bytes/s of all devices of the mesh, that decoding steps of `seconds` reach."""
  return devices * decode_bytes(work, mesh) / (seconds * bandwidth)
