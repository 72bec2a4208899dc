"""Arrays of a mesh from the parts that this process's devices hold; nobody makes, or reads, the whole."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

Index = tuple[slice, ...]


def place_parts(shape: tuple[int, ...], sharding: Sharding, part: Callable[[Index], np.ndarray], dtype: Any
                ) -> jax.Array:
  """As `jax.make_array_from_callback`, which would hold the parts of all devices on the host at once.

  Args:
    shape: of the whole array.
    sharding: of it.
    part: slices of it -> that part, asked once for all devices that hold the same.
    dtype: of it.
  """
  places = sharding.addressable_devices_indices_map(shape)
  alike = collections.defaultdict(list)
  for device, index in places.items():
    alike[str(index)].append(device)  # slices cannot be hashed before Python 3.12
  arrays: dict[Any, jax.Array] = {}
  for devices in alike.values():
    host = part(places[devices[0]] or ())
    arrays |= {device: jax.device_put(host, device) for device in devices}
    jax.block_until_ready([arrays[device] for device in devices])
    del host
    jax.device_put(np.zeros(()), devices[0])  # the runtime lets go of what it has copied at its next transfer
  return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[device] for device in places], dtype=dtype)


def read_parts(shape: tuple[int, ...], sharding: Sharding, part: Callable[[Index], np.ndarray], dtype: Any
               ) -> Callable[[], jax.Array]:
  """As `place_parts`, in two: the parts are read now, into the host's memory, and laid out by what is returned."""
  read: dict[str, np.ndarray] = {}
  for index in sharding.addressable_devices_indices_map(shape).values():
    if str(index or ()) not in read:
      read[str(index or ())] = part(index or ())
  return lambda: place_parts(shape, sharding, lambda index: read.pop(str(index)), dtype)


def place_padded(leaf: np.ndarray, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
  """An array `[runs, ...]` of the host on a mesh, runs padded by repeating the first ones, the rest by zeros.

  Args:
    leaf: on the host, or mapped from a file, of which the pages that are needed are read.
    shape: after padding.
    sharding: of that.
  """
  def part(index: Index | None) -> np.ndarray:
    assert index is not None
    runs = np.arange(shape[0])[index[0]] % leaf.shape[0]
    own = np.asarray(leaf[runs][(slice(None), *index[1:])])
    size = tuple(len(range(*one.indices(length))) for one, length in zip(index, shape, strict=True))
    return own if own.shape == size else np.pad(own, [(0, to - now) for to, now in zip(size, own.shape, strict=True)])
  if sharding.is_fully_addressable:
    return jax.device_put(part((slice(None),) * len(shape)), sharding)
  return jax.make_array_from_callback(shape, sharding, part)
