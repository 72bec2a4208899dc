"""Weights of the models that are given: read while the device is at work on others, and not twice in succession."""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from relearn_jax.models.checkpoint import Checked, load_params
from relearn_jax.models.model import Model, Params
from relearn_jax.parallel.memory import host_room
from relearn_jax.parallel.parts import read_parts

Wanted = tuple[str, Any]  # an arm, and the dtype in memory
SHARE = 4  # what is read ahead takes at most a fourth of the room that the host has


class Given:
  """The checkpoints of loaded arms, on their way to the mesh."""

  def __init__(self, checked: Mapping[str, Checked], model: Model, mesh: Mesh):
    self.checked, self.model, self.mesh = checked, model, mesh
    self._read: dict[Wanted, Future] = {}
    self._frozen: tuple[Wanted, Params] | None = None

  def take(self, arm: str, dtype: Any) -> Params:
    """The weights of an arm, on the mesh; they may be donated."""
    self._frozen = None  # more of them than are asked for need not fit
    if read := self._read.pop((arm, dtype), None):
      return jax.tree.map(lambda place: place(), read.result())
    return load_params(self.checked[arm], self.model, dtype=dtype, mesh=self.mesh)

  def freeze(self, arm: str, dtype: Any) -> Params:
    """As `take`, but not to be donated: asked for again, they are still there."""
    if self._frozen is None or self._frozen[0] != (arm, dtype):
      self._frozen = (arm, dtype), self.take(arm, dtype)
    return self._frozen[1]

  def read_ahead(self, wanted: Iterable[Wanted]) -> None:
    """Begins to read, into the host's memory, what the next stage takes; as much as there is room for, if any."""
    wanted = [key for key in wanted if self._frozen is None or self._frozen[0] != key]
    self._read = {key: read for key, read in self._read.items() if key in wanted}
    room = host_room() / SHARE
    for key in wanted:
      room -= sum(leaf.size for leaf in jax.tree.leaves(self.model.abstract())) * np.dtype(key[1]).itemsize
      if key not in self._read and room >= 0:
        self._read[key] = Future()
        # A daemon: nobody waits for it where the command ends before.
        threading.Thread(target=self._begin, args=(key, self._read[key]), daemon=True, name="ahead").start()

  def _begin(self, key: Wanted, future: Future) -> None:
    try:
      future.set_result(load_params(self.checked[key[0]], self.model, dtype=key[1], mesh=self.mesh, place=read_parts))
    except BaseException as error:  # raised where it is taken
      future.set_exception(error)
