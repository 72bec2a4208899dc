"""The models of a server: those that it was given, and what its jobs have made of them."""

import collections
import dataclasses
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from relearn_jax.data.chat import Chat
from relearn_jax.errors import InputError
from relearn_jax.generation.prompts import end_ids
from relearn_jax.models.checkpoint import Checked, load_params
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model, Params, unroll
from relearn_jax.models.precision import compute_dtype
from relearn_jax.serve.conversations import chat_of
from relearn_jax.training import checkpoints

HELD = 8  # sets of weights that are kept in memory besides the one in use


@dataclasses.dataclass(frozen=True)
class Base:
  """A model that the server was given.

  Attributes:
    name: as clients call it.
    checked: its checkpoint.
    tokenizer: of it, for the thread that answers; another thread opens its own.
    chat: its chat template; None: the plain one.
    model: its architecture at the precision of products.
    eos_ids: that end an answer.
  """

  name: str
  checked: Checked
  tokenizer: Any
  chat: Chat | None
  model: Model
  eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What a job made of a base: a step's checkpoint."""

  base: str
  path: pathlib.Path
  lora: LoraConfig | None


class Catalog:
  """Names of models, and their weights on the device, of which the last few that were asked for are held."""

  def __init__(self, given: Mapping[str, str], dtype: str = "auto"):
    """
    Args:
      given: name -> folder or hub id of a checkpoint.
      dtype: precision of products.

    Raises:
      InputError: a checkpoint is wrong.
    """
    self.lock, self.tuned = threading.Lock(), dict[str, Tuned]()
    self.bases: dict[str, Base] = {}
    opened = {name: open_checkpoint(folder) for name, folder in given.items()}  # before a device is asked for
    self.dtype = compute_dtype(dtype, None, "--dtype")
    for name, (checked, tokenizer) in opened.items():
      model = Model(checked.config, dtype=self.dtype, unroll=unroll(checked.config))
      self.bases[name] = Base(name, checked, tokenizer, chat_of(tokenizer, checked.path), model, end_ids(checked))
    self.held: collections.OrderedDict[str, Params] = collections.OrderedDict()

  def add(self, name: str, tuned: Tuned) -> None:
    """From here on a tuned model can be asked."""
    with self.lock:
      self.tuned[name] = tuned

  def drop(self, name: str) -> None:
    """From here on a tuned model cannot be asked any more."""
    with self.lock:
      self.tuned.pop(name, None)
      self.held.pop(name, None)

  def __contains__(self, name: str) -> bool:
    with self.lock:
      return name in self.bases or name in self.tuned

  def names(self) -> list[tuple[str, str]]:
    """Every model, and what it was made from; "" of those that were given."""
    with self.lock:
      return [*((name, "") for name in self.bases), *((name, tuned.base) for name, tuned in self.tuned.items())]

  def base(self, name: str) -> Base:
    """The given model that a name stands for or was made from, with the scale of its adapter.

    Raises:
      KeyError: there is none.
    """
    with self.lock:
      tuned = self.tuned.get(name)
    if tuned is None:
      return self.bases[name]
    found = self.bases[tuned.base]
    scale = tuned.lora.scale if tuned.lora else 1.0
    return dataclasses.replace(found, model=dataclasses.replace(found.model, lora_scale=scale))

  def params(self, name: str) -> Params:
    """The weights of a model, with its adapter where it has one.

    Raises:
      KeyError: there is none.
      InputError: its files are gone.
    """
    with self.lock:
      tuned = self.tuned.get(name)
      if name in self.held:
        self.held.move_to_end(name)
        return self.held[name]
    if tuned is None:
      found = load_params(self.bases[name].checked, self.bases[name].model, dtype=self.dtype)
    else:
      found = self._load(tuned)
    with self.lock:
      self.held[name] = found
      while len(self.held) > HELD:
        self.held.popitem(last=False)
    return found

  def _load(self, tuned: Tuned) -> Params:
    model, lora = self.bases[tuned.base].model, tuned.lora
    if not checkpoints.is_saved(tuned.path):
      raise InputError("is not there any more", file=tuned.path, mend="train it again")
    if lora is None:
      tree = checkpoints.load_tree(tuned.path, model.abstract(), 1)
      return jax.tree.map(lambda leaf: jnp.asarray(leaf[0], self.dtype), tree)
    like = jax.eval_shape(lambda: init_lora(model, lora, jax.random.key(0)))
    adapter = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), checkpoints.load_tree(tuned.path, like, 1))
    return {**self.params(tuned.base), "lora": adapter}
