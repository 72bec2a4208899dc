"""What the devices can do at most, measured: FLOP/s of a product of matrices, bytes/s of their memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from relearn_jax.bench.timing import Spread, repeat

SIDE = {"cpu": 1024}  # of the square matrices
CHAIN = {"cpu": 1}  # products that follow each other in a call, so that starting it does not count
BYTES = {"cpu": 2**28}  # of the array that is read
SIDE_ELSE, CHAIN_ELSE, BYTES_ELSE = 8192, 8, 2**31


@dataclasses.dataclass(frozen=True)
class Rates:
  """Of all devices of this process at work at once.

  Attributes:
    matmul: FLOP/s of square matrices in the compute precision, 2 n^3 each.
    read: bytes/s of the products of a matrix and a vector, which read the matrix once.
    update: bytes/s of x := a x + b in place, which reads and writes.
    num_devices: that share in it; 1 on CPU, where every device uses all cores.
  """

  matmul: Spread
  read: Spread
  update: Spread
  num_devices: int

  @property
  def bandwidth(self) -> float:
    """The higher of the two of memory, bytes/s of all devices."""
    return max(self.read.median, self.update.median)

  def share(self, devices: int) -> float:
    """The part of these rates that a number of devices have."""
    return 1.0 if jax.default_backend() == "cpu" else devices / self.num_devices


def measure_rates(dtype: Any, repeats: int) -> Rates:
  """Measures them with arrays of `dtype`; see the constants above for sizes."""
  platform, devices = jax.default_backend(), jax.local_devices()
  mesh = jax.make_mesh((len(devices),), ("device",), axis_types=(AxisType.Auto,), devices=devices)
  side, chain = SIDE.get(platform, SIDE_ELSE), CHAIN.get(platform, CHAIN_ELSE)
  # All cores together on CPU, whose memory the devices share.
  size = BYTES.get(platform, BYTES_ELSE) // (len(devices) if platform == "cpu" else 1)
  matmul = _matmul(mesh, side, chain, dtype, repeats)
  read, update = _memory(mesh, size, dtype, repeats)
  return Rates(matmul, read, update, 1 if platform == "cpu" else len(devices))


def _matmul(mesh: Mesh, side: int, chain: int, dtype: Any, repeats: int) -> Spread:
  flops = 2.0 * side**3 * chain * mesh.size

  def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    step = lambda _, y: jnp.einsum("dij,djk->dik", y, w)
    return jax.lax.fori_loop(0, chain, step, x)
  call = _each(multiply, mesh, 2)
  # Random numbers: a product of equal ones draws less power, and is faster than any that trains a model.
  x, w = (_random(mesh, (side, side), dtype, seed) for seed in (0, 1))
  return repeat(lambda: call(x, w), repeats).map(lambda seconds: flops / seconds)


def _memory(mesh: Mesh, size: int, dtype: Any, repeats: int) -> tuple[Spread, Spread]:
  width = 4096
  shape = size // (width * np.dtype(dtype).itemsize), width
  held = {"x": _random(mesh, shape, dtype, 2)}
  vector = _random(mesh, (width,), dtype, 3)
  moved = float(held["x"].nbytes)
  product = _each(lambda x, v: jnp.einsum("dfi,di->df", x, v), mesh, 2)
  scale = jax.jit(lambda x: x * 0.5 + 0.25, donate_argnums=0)

  def update() -> jax.Array:
    held["x"] = scale(held["x"])
    return held["x"]
  read = repeat(lambda: product(held["x"], vector), repeats)
  return (read.map(lambda seconds: moved / seconds),
          repeat(update, repeats).map(lambda seconds: 2 * moved / seconds))


def _each(function: Any, mesh: Mesh, arguments: int) -> Any:
  """The function on every device's own part, without communication."""
  part = PartitionSpec("device")
  return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(part,) * arguments, out_specs=part))


def _random(mesh: Mesh, shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
  """An array of each device's own, with numbers such that products neither grow nor vanish."""
  draw = lambda key: (jax.random.normal(key, (mesh.size, *shape)) * shape[-1] ** -0.5).astype(dtype)
  return jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec("device")))(jax.random.key(seed))
