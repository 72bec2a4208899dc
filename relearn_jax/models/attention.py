"""Causal attention of whole rows: one function, in the form that device, precision and shape call for.

Shape letters: B rows, T query positions, S key positions, N query heads, K key-value heads, H head size.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from relearn_jax.errors import InputError
from relearn_jax.parallel.rules import num_shards

ATTENTION = ("auto", "einsum")
# Tokens of a row from which scores are worth keeping out of memory. A fused kernel was found no faster than XLA's form
# on shorter rows (NovaSky-AI/SkyRL#777), whose scores are a small part of what a layer keeps.
FUSED_FROM = 512
SPLASH_BLOCK = 128  # tokens, of which splash takes whole ones


def check_attention(name: str, where: object, field: str = "attention") -> None:
  """Raises `InputError` unless the name is one of `ATTENTION`."""
  if name not in ATTENTION:
    raise InputError(f"is {name!r}", file=where, field=field, mend=f"expected {' or '.join(ATTENTION)}")


def causal_mask(length: int, window: int | None) -> Bool[Array, "1 T T"]:
  """True where position i sees j: j <= i, and within the last `window` tokens, itself included."""
  mask = jnp.tri(length, dtype=bool)
  if window is not None and window < length:
    mask &= ~jnp.tri(length, k=-window, dtype=bool)
  return mask[None]


def packed_mask(segments: Int[Array, "B T"], window: int | None) -> Bool[Array, "B T T"]:
  """As `causal_mask`, within each row that shares a sequence with others.

  >>> packed_mask(jnp.array([[1, 1, 2]]), None)[0].astype(int).tolist()
  [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
  """
  return causal_mask(segments.shape[1], window) & (segments[:, :, None] == segments[:, None, :])


def packed_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Each token's position in its own row, where rows share a sequence.

  >>> packed_positions(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
  [[0, 1, 0, 1, 2, 0]]
  """
  place = jnp.arange(segments.shape[1])
  begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


@jax.custom_jvp
def softmax(scores: Float[Array, "*batch S"], mask: Bool[Array, "*#batch S"]) -> Float[Array, "*batch S"]:
  """exp(x) / sum exp(x) over what the mask lets through, of which one array is kept for the backward pass: the result.

  dy = y (dx - sum(y dx)), in which y = 0 is mask enough. Differentiating each operation would keep the exponentials
  and the mask too, and read them again. Where the mask lets nothing through, y is 1 / S, and dy means nothing.
  """
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  # Times the reciprocal, not divided: XLA makes that change in some programs and not in others,
  # which would let a result's last bit depend on the number of devices.
  return weights * (1.0 / jnp.sum(weights, axis=-1, keepdims=True))


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
  y, (change, _) = softmax(*primals), tangents
  return y, y * (change - jnp.sum(y * change, axis=-1, keepdims=True))


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
           mask: Bool[Array, "#B T S"]) -> Float[Array, "B T N H"]:
  """Softmax attention, in fp32 between the two products; N / K query heads share a key-value head.

  The same arithmetic on any number of devices, to the bit on CPU. Scores and weights are arrays `[B, N, T, S]` in fp32;
  without remat the weights of every layer are kept for the backward pass, in bf16 beside them too where that is v's.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: true where a query may look; a query that may look nowhere sees the mean of all values.
  """
  batch, length, heads, size = q.shape
  groups = k.shape[2]
  # Heads before positions, and the queries that share a head's keys one behind the other: products of two matrices.
  # As products over more axes their gradients are transposed element by element on CPU, 1.5 times the time.
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  grouped = q.reshape(batch, groups, -1, size)
  scores = jnp.einsum("bkqh,bksh->bkqs", grouped, k, preferred_element_type=jnp.float32) * (1.0 / math.sqrt(size))
  weights = softmax(scores, jnp.tile(mask, (1, heads // groups, 1))[:, None])
  out = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v)
  return jnp.swapaxes(out.reshape(batch, heads, length, size), 1, 2)


def attend_parts(q: Float[Array, "B T N H"], keys: Sequence[Float[Array, "B K _ H"]],
                 values: Sequence[Float[Array, "B K _ H"]], mask: Bool[Array, "B T S"]) -> Float[Array, "B T N H"]:
  """As `attend`, with keys and values in parts that lie apart, which are read where they are; S is all their positions.

  Only scores are joined. To join the keys would copy a prompt's cache at every token, three times the bytes that
  reading it takes.
  """
  batch, length, _, head_dim = q.shape
  heads = keys[0].shape[1]
  grouped = q.reshape(batch, length, heads, -1, head_dim)
  score = lambda k: jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
  scores = jnp.concatenate([score(k) for k in keys], -1) * (1.0 / math.sqrt(head_dim))
  weights = jnp.split(softmax(scores, mask[:, None, None]), np.cumsum([k.shape[2] for k in keys])[:-1], -1)
  parts = [jnp.einsum("bkgts,bksh->btkgh", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)]
  return functools.reduce(jnp.add, parts).reshape(q.shape)


def attend_by_jax(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
                  window: int | None, implementation: Literal["xla", "cudnn"]) -> Float[Array, "B T N H"]:
  """Causal attention by `jax.nn.dot_product_attention`, "xla" or "cudnn", the latter without scores in memory.

  Lengths are not passed: padding is on the right, where no real token looks, and what padding itself sees counts in no
  loss. Nor is a mask, which cuDNN would take as a bias `[B, N, T, T]`. Mapped over runs, queries, keys and values have
  to be stacked all three for cuDNN (jax 0.10.2): they are, as products of what the scan over layers carries.
  """
  left = None if window is None or window >= q.shape[1] else (window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=left, implementation=implementation)


def attend_by_splash(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
                     window: int | None, segments: Int[Array, "B T"] | None = None, *, interpret: bool = False
                     ) -> Float[Array, "B T N H"]:
  """Causal attention by the Pallas kernel for TPUs, without scores in memory; `interpret` runs it elsewhere."""
  # Takes half a second, and no other form wants it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

  length = q.shape[1]
  fill = -length % SPLASH_BLOCK
  fill_up = lambda x: jnp.pad(x, ((0, 0), (0, fill), *((0, 0),) * (x.ndim - 2)))  # keys that only padding sees
  size = (length + fill, length + fill)
  mask: splash_masks.Mask = splash_masks.CausalMask(size)
  if window is not None and window < length:
    mask = splash_masks.LocalMask(size, (window - 1, 0), 0)
  kernel = splash.make_splash_mha(splash_masks.MultiHeadMask([mask] * q.shape[2]), head_shards=1, q_seq_shards=1,
                                  interpret=interpret)
  q, k, v = (jnp.swapaxes(fill_up(x), 1, 2) for x in (q * (1.0 / math.sqrt(q.shape[-1])), k, v))
  if segments is None:
    out = jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
  else:
    ids = fill_up(segments)
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(q, k, v, ids)
  return jnp.swapaxes(out, 1, 2)[:, :length]


def choose_form(kind: str, backend: Callable[[], str], dtype: DTypeLike, length: int, head_dim: int, *, packed: bool,
                shards: int) -> str:
  """The form that `self_attention` takes: "einsum", "cudnn" or "splash".

  A fused kernel is taken for rows of at least `FUSED_FROM` tokens in half precision, of heads that it is made for,
  where a run is on one device: cuDNN on GPUs, for rows that are not packed, and splash on TPUs.

  Args:
    kind: one of `ATTENTION`; "einsum" is that everywhere.
    backend: `jax.default_backend`, called only where it matters: shapes are traced before any device is started.
    dtype: of queries.
    length: tokens of a row.
    head_dim: of a head.
    packed: whether rows share sequences.
    shards: devices that a run's activations are spread over.
  """
  fits = length >= FUSED_FROM and dtype in (jnp.bfloat16, jnp.float16) and shards == 1
  if kind == "einsum" or not fits:
    return "einsum"
  platform = backend()
  if platform == "gpu" and head_dim % 8 == 0 and head_dim <= 128 and not packed:  # larger ones from Hopper on
    return "cudnn"
  if platform == "tpu" and head_dim % 128 == 0 and dtype == jnp.bfloat16:
    return "splash"
  return "einsum"


def form_of(q: Float[Array, "B T N H"], segments: Int[Array, "B T"] | None = None, kind: str = "auto") -> str:
  """What `self_attention` takes here."""
  return choose_form(kind, jax.default_backend, q.dtype, q.shape[1], q.shape[-1], packed=segments is not None,
                     shards=num_shards())


def self_attention(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
                   window: int | None = None, segments: Int[Array, "B T"] | None = None, kind: str = "auto"
                   ) -> Float[Array, "B T N H"]:
  """Causal attention of rows over themselves, padded on the right.

  The forms agree within rounding: in fp32 to 1e-5 for values of about 1, gradients too, in bf16 to 3e-2 (tested).

  Args:
    q: queries.
    k: keys.
    v: values.
    window: tokens that a token sees, itself included; None: all before it.
    segments: where rows share a sequence, the row that each token is of; a token sees its own row alone.
    kind: one of `ATTENTION`; see `choose_form`.
  """
  form = form_of(q, segments, kind)
  if form == "cudnn":
    return attend_by_jax(q, k, v, window, "cudnn")
  if form == "splash":
    return attend_by_splash(q, k, v, window, segments)
  return attend(q, k, v, causal_mask(q.shape[1], window) if segments is None else packed_mask(segments, window))
