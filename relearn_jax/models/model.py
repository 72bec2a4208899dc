"""A decoder as pure functions over a plain dictionary of parameters."""

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from relearn_jax.models.architectures import ARCHITECTURES
from relearn_jax.models.attention import packed_positions
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.decoder import LAYER, Caches, Decoder
from relearn_jax.models.layers import Context, LayerCache, rope_tables

UNROLLED = 8  # layers, at most

Params = dict[str, Any]  # with an adapter, its leaves are under "lora"


class Head(NamedTuple):
  """The output head; a bias only where the architecture has one."""

  weight: Float[Array, "V D"]
  bias: Float[Array, " V"] | None = None


@dataclasses.dataclass(frozen=True)
class Model:
  """Pure functions of one architecture; hashable, so a jitted function may close over it.

  Attributes:
    config: sizes and constants.
    dtype: compute precision; parameters keep their own.
    unroll: layers per iteration of the scan over layers (more: faster on CPU, longer to compile).
    remat: what a layer keeps for its backward pass; a key of `decoder.REMAT`.
    lora_scale: alpha / rank of the adapter, where parameters have one.
    attention: the form of attention over whole rows; one of `attention.ATTENTION`.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  unroll: int = 1
  remat: str = "none"
  lora_scale: float = 1.0
  attention: str = "auto"

  @property
  def module(self) -> nn.Module:
    """The Linen module."""
    return Decoder(self.config, self.dtype, self.unroll, self.remat, self.attention)

  @property
  def names(self) -> dict[str, str]:
    """Leaf path -> Hugging Face tensor name, for the leaves that this configuration has."""
    table = ARCHITECTURES[self.config.architecture].names
    return {leaf: name for leaf, name in table.items()
            if not (self.config.tie_embeddings and leaf.startswith("head/"))}

  def init(self, key: Array) -> Params:
    """Random fp32 parameters: normal(0, 0.02) matrices, unit norms, no biases."""
    return nn.meta.unbox(self.boxed(key))

  def boxed(self, key: Array) -> Any:
    """The same, each leaf in a box that names its axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    context = Context(*rope_tables(self.config, jnp.arange(2)[None]), None, 0)
    return self.module.init(key, tokens, None, context)["params"]

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters, without computing them and without touching a device."""
    return nn.meta.unbox(_abstract(self))

  def axes(self) -> dict[str, tuple[str, ...]]:
    """Leaf path -> logical axes of its dimensions; see `parallel.rules`."""
    boxed = flatten_dict(_abstract(self), sep="/")
    return {path: tuple(leaf.names) for path, leaf in boxed.items()}

  def apply(self, params: Params, tokens: Int[Array, "B T"], cache: Caches | None, context: Context,
            stop: int | None = None) -> tuple[Float[Array, "B T D"], Any]:
    """The decoder up to its final norm, or its first `stop` layers, with the adapter where `params` has one.

    Parameters may have been through `split_layers`, adapters with them; keys, values and caches are lists then.
    """
    variables: dict[str, Any] = {"params": {name: tree for name, tree in params.items() if name != "lora"}}
    if "lora" in params:
      # The scale goes into `b`: [features, rank] numbers, fewer than a layer's output has.
      scaled = lambda path, leaf: leaf * self.lora_scale if path[-1].key == "b" else leaf
      variables["lora"] = dict(jax.tree_util.tree_map_with_path(scaled, params["lora"]))
    module = self.module.clone(split="layers" not in params)
    if stop is not None:
      for tree in variables.values():
        tree["layers"] = jax.tree.map(lambda leaf: leaf[:stop], tree["layers"])
      module = module.clone(stop=stop, unroll=min(self.unroll, stop))
    out: Any = module.apply(variables, tokens, cache, context)
    return out

  def layer(self, params: Params, tokens: Int[Array, "B T"], depth: float, segments: Int[Array, "B T"] | None = None
            ) -> Float[Array, "B T D"]:
    """What the last of the first layers puts out, before any final norm; `depth` is their share, at least one layer."""
    stop = min(max(1, round(depth * self.config.num_layers)), self.config.num_layers)
    return self.apply(params, tokens, None, self._context(tokens, segments), stop)[0]

  def _context(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None) -> Context:
    in_order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    positions = in_order if segments is None else packed_positions(segments)
    return Context(*rope_tables(self.config, positions), None, 0, segments)

  def hidden(self, params: Params, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None
             ) -> Float[Array, "B T D"]:
    """Final hidden states of right-padded rows; padding never reaches a real position.

    With `segments` rows share sequences: each token's row, 0 at padding; positions restart with each row, and no row
    sees another.
    """
    return self.apply(params, tokens, None, self._context(tokens, segments))[0]

  def prefill(self, params: Params, tokens: Int[Array, "B T"], new_slots: int) -> tuple[Float[Array, "B T D"], Caches]:
    """As `hidden`, with a cache of its keys and values, and `new_slots` free ones."""
    hidden, kv = self.apply(params, tokens, None, self._context(tokens))

    def start(k: Array, v: Array) -> LayerCache:
      empty = jnp.zeros((*k.shape[:-2], new_slots, k.shape[-1]), k.dtype)
      return LayerCache(k, v, empty, empty)
    return hidden, [start(*one) for one in kv] if isinstance(kv, list) else start(*kv)

  def extend(self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Caches,
             mask: Bool[Array, "B T S"], step: Int[Array, "*#B"] | int) -> tuple[Float[Array, "B T D"], Caches]:
    """Hidden states of tokens that follow a cached prompt, and the cache with them written.

    Args:
      params: parameters.
      tokens: new tokens.
      positions: their positions in the whole sequence.
      cache: prompt and new keys and values.
      mask: what each new token may see of [prompt slots | new slots].
      step: slot of the first of the new tokens, of all rows or of each.
    """
    context = Context(*rope_tables(self.config, positions), mask, step)
    hidden, kv = self.apply(params, tokens, cache, context)
    if isinstance(cache, list):
      return hidden, [one._replace(new_k=k, new_v=v) for one, (k, v) in zip(cache, kv, strict=True)]
    return hidden, cache._replace(new_k=kv[0], new_v=kv[1])

  def head(self, params: Params) -> Head:
    """The output head: its own matrix or the tied embedding."""
    if self.config.tie_embeddings:
      return Head(params["embed"]["weight"])
    return Head(params["head"]["weight"], params["head"].get("bias"))

  def logits(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Logits in fp32, accumulated in fp32 at any compute precision."""
    return head_logits(hidden, self.head(params))


def unroll(config: ModelConfig) -> int:
  """`Model.unroll` for training: a short stack whole, since on CPU the loop costs more than its compilation saves."""
  return config.num_layers if config.num_layers <= UNROLLED else 1


def head_logits(hidden: Float[Array, "*batch D"], head: Head) -> Float[Array, "*batch V"]:
  """Logits in fp32, accumulated in fp32 at any compute precision."""
  flat = hidden.reshape(-1, hidden.shape[-1])  # see `layers.Linear`
  logits = jnp.einsum("td,vd->tv", flat, head.weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
  logits = logits.reshape(*hidden.shape[:-1], -1)
  return logits if head.bias is None else logits + head.bias.astype(jnp.float32)


def whole(params: Params, own: Params | None = None, shared: Params | None = None) -> Params:
  """A run's parameters: what is trained, on top of what is frozen (its own, or what all runs share)."""
  base = shared if own is None else own
  return params if base is None else {**base, "lora": params}


def split_layers(params: Params) -> Params:
  """Parameters, or adapters, with those of each layer by themselves in place of `[layers, ...]`.

  A loop whose body takes its layer from the stack copies it, or all of them, every time.
  """
  found = {name: tree for name, tree in params.items() if name not in ("layers", "lora")}
  if "layers" in params:
    take = lambda number: jax.tree.map(lambda leaf: leaf[number], params["layers"])
    found |= {LAYER.format(i): take(i) for i in range(jax.tree.leaves(params["layers"])[0].shape[0])}
  return found | ({"lora": split_layers(params["lora"])} if "lora" in params else {})


def unstack(params: Params) -> Params:
  """`split_layers` leaf by leaf, where they lie; the parameters that are passed in are let go, and need no room."""
  leaves, found = flatten(params), dict[str, Any]()
  params.clear()
  for path in sorted(leaves):
    leaf, (where, _, rest) = leaves.pop(path), path.partition("/")
    parts = _unstack(leaf) if where == "layers" else ()
    found |= {f"{LAYER.format(i)}/{rest}": part for i, part in enumerate(parts)} or {path: leaf}
  return unflatten(found)


@jax.jit
def _unstack(leaf: Array) -> tuple[Array, ...]:
  return tuple(leaf)


def flatten(params: Params) -> dict[str, Any]:
  """Leaves by path, for example "layers/attn/q/weight"."""
  return flatten_dict(params, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
  """The inverse of `flatten`."""
  return unflatten_dict(leaves, sep="/")


def fingerprint(params: Params) -> str:
  """SHA-256 over the leaves' paths, shapes, dtypes and bytes, on any device, in hexadecimal."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{path} {array.shape} {array.dtype}".encode())
    digest.update(array.data if array.dtype.kind == "f" else array.tobytes())
  return digest.hexdigest()


@functools.lru_cache(maxsize=64)  # tracing it takes a fifth of a second, and everything that is laid out asks for it
def _abstract(model: Model) -> Any:
  """Shapes, dtypes and axes of a model's parameters."""
  return jax.eval_shape(lambda: model.boxed(jax.random.key(0)))  # a key made outside would start the backend
