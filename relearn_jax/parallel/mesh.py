"""The mesh, and how stacked runs, their weights and their rows lie on it.

Every array of a stacked state has a leading `runs` axis. On a mesh of the runs axis alone one run
never crosses a device, so its numbers do not depend on how many devices there are. Runs are padded to
a multiple of that axis by repeating the first ones; the copies are dropped on return. On the other
axes a run is spread: weights by `rules.RULES`, rows of a batch over data and fsdp.
"""

import contextlib
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from relearn_jax.errors import InputError
from relearn_jax.models.config import ModelConfig
from relearn_jax.parallel.parts import place_padded
from relearn_jax.parallel.processes import check_takes_part, fetch, is_alone, is_first
from relearn_jax.parallel.rules import spec

Tree = TypeVar("Tree")
AXES = ("runs", "data", "fsdp", "tensor")
RUNS = AXES[0]
DEFAULT = "runs:-1,data:1,fsdp:1,tensor:1"
FIELD = "--mesh"


def parse_mesh(text: str) -> dict[str, int]:
  """Sizes by axis of "runs:1,data:1,fsdp:-1,tensor:1"; an axis left out has size 1, -1 takes what is left.

  Raises:
    InputError: an unknown axis, one given twice, an invalid size, or several of -1.
  """
  mend = f"expected sizes such as {DEFAULT}, with at most one -1"
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = (piece.strip() for piece in part.partition(":"))
    if name not in AXES:
      near = difflib.get_close_matches(name, AXES, 1, 0.3)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      raise InputError(f"has axis {name!r}{hint}; the axes are {', '.join(AXES)}", field=FIELD, mend=mend)
    if name in sizes:
      raise InputError(f"gives axis {name!r} twice", field=FIELD, mend=mend)
    if not size.removeprefix("-").isdecimal() or not (int(size) > 0 or int(size) == -1):
      raise InputError(f"has size {size!r} for axis {name!r}", field=FIELD, mend=mend)
    sizes[name] = int(size)
  if list(sizes.values()).count(-1) > 1:
    raise InputError(f"is {text!r}", field=FIELD, mend=mend)
  return {axis: sizes.get(axis, 1) for axis in AXES}


def fill_mesh(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Replaces -1 by what is left of the devices.

  >>> fill_mesh(parse_mesh("runs:2,fsdp:-1"), 8)
  {'runs': 2, 'data': 1, 'fsdp': 4, 'tensor': 1}

  Raises:
    InputError: more devices are needed than there are.
  """
  fixed = math.prod(size for size in sizes.values() if size > 0)
  if fixed > num_devices:
    named = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
    raise InputError(f"is {named}, which needs {fixed} devices, and there {_are(num_devices)}", field=FIELD,
                     mend="make an axis smaller, or run on more devices")
  return {axis: size if size > 0 else num_devices // fixed for axis, size in sizes.items()}


def _are(count: int) -> str:
  return "is 1" if count == 1 else f"are {count}"


def check_divides(sizes: Mapping[str, int], config: ModelConfig) -> None:
  """Refuses a mesh that does not divide a dimension of the model, naming the dimension as config.json does.

  Raises:
    InputError: naming axis, dimension and the sizes that would do.
  """
  sizes = {axis: max(size, 1) for axis, size in sizes.items()}  # -1 is not known yet
  dimensions = [("fsdp", "hidden_size", config.hidden_size), ("tensor", "num_attention_heads", config.num_heads),
                ("tensor", "num_key_value_heads", config.num_kv_heads),
                ("tensor", "intermediate_size", config.intermediate_size), ("tensor", "vocab_size", config.vocab_size)]
  for axis, name, size in dimensions:
    if size % sizes[axis]:
      fit = [n for n in range(1, 65) if size % n == 0]
      raise InputError(f"has {axis}:{sizes[axis]}, which does not divide {name}={size}", field=FIELD,
                       mend=f"expected one of {', '.join(map(str, fit))}")


def check_mesh(text: str, config: ModelConfig) -> dict[str, int]:
  """Sizes by axis, with everything refused that can be before the devices are counted.

  Raises:
    InputError: see `parse_mesh` and `check_divides`.
  """
  sizes = parse_mesh(text)
  check_divides(sizes, config)
  return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, config: ModelConfig | None = None
              ) -> Mesh:
  """The mesh of the four axes over as many of the first devices as it needs.

  Raises:
    InputError: there are fewer, it does not divide a dimension of the model, or a process has none of its devices.
  """
  use = list(jax.devices() if devices is None else devices)
  shape = fill_mesh(sizes, len(use))
  if config is not None:
    check_divides(shape, config)
  used = use[:math.prod(shape.values())]
  check_takes_part(used, FIELD)
  return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


def default_rows_mesh() -> str | None:
  """Of commands that ask one model about rows: one device; several processes share the rows among all devices."""
  return None if is_alone() else "data:-1"


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """The mesh that activations are laid out on inside; None: none."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def runs_mesh(devices: int | None = None) -> Mesh:
  """All devices, or that many of the first, on the runs axis."""
  return make_mesh({axis: -1 if axis == RUNS else 1 for axis in AXES}, jax.devices()[:devices])


def runs_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over the runs axis of the mesh, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(RUNS))


def spreads_runs(mesh: Mesh) -> bool:
  """Whether a run crosses devices."""
  return mesh.size > mesh.shape[RUNS]


def row_shards(mesh: Mesh) -> int:
  """Devices over which the rows of a run's batch lie; their number must be a multiple of it."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Of `[runs, rows, ...]`."""
  return NamedSharding(mesh, spec("runs", "batch"))


def weight_shardings(tree: Any, axes: Mapping[str, tuple[str, ...]], mesh: Mesh, *, stacked: bool) -> Any:
  """Where the leaves of a tree of weights, of a training state or of adapters lie.

  A leaf whose path ends in a parameter's and that has its number of dimensions (Adam's moments) lies as
  that parameter does; every other one is whole, over the runs axis if `stacked`.

  Args:
    tree: the leaves' shapes.
    axes: parameter path -> logical axes; see `Model.axes`.
    mesh: the mesh.
    stacked: whether leaves have a leading runs axis.
  """
  lead = ("runs",) if stacked else ()

  def one(path: Any, leaf: Any) -> NamedSharding:
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    for start in range(len(parts)):
      found = axes.get("/".join(parts[start:]))
      if found is not None and len(found) + len(lead) == leaf.ndim:
        return NamedSharding(mesh, spec(*lead, *found))
    return NamedSharding(mesh, spec(*lead))
  return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def padded_runs(num_runs: int, mesh: Mesh) -> int:
  """`num_runs` rounded up to a multiple of the mesh's runs axis."""
  return -(-num_runs // mesh.shape[RUNS]) * mesh.shape[RUNS]


def pad_runs(tree: Tree, size: int) -> Tree:
  """Lengthens every leaf `[runs, ...]` to `size` runs by repeating the leading ones."""
  def pad(leaf: Any) -> Any:
    index = np.arange(size) % leaf.shape[0]
    return leaf if leaf.shape[0] == size else leaf[index]
  return jax.tree.map(pad, tree)


def lay_out(tree: Tree, shardings: Any) -> Tree:
  """`jax.device_put` of arrays that every process has whole, and has alike.

  Between processes it would compare them first, leaf by leaf, by collectives that wait for one local device only; on
  CPU the next one then meets what is still under way, and ends the program.

  Args:
    tree: arrays on the host, or already on the mesh.
    shardings: of all leaves, or a tree of them.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _, sharding=shardings: sharding, tree)
  if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
    return jax.device_put(tree, shardings)

  def lay(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
  return jax.tree.map(lay, tree, shardings)


def shard_runs(tree: Tree, mesh: Mesh) -> Tree:
  """Pads the runs of arrays on the host and lays them out over the runs axis."""
  size, sharding = padded_runs(jax.tree.leaves(tree)[0].shape[0], mesh), runs_sharding(mesh)
  return jax.tree.map(lambda leaf: place_padded(leaf, (size, *leaf.shape[1:]), sharding), tree)


def map_runs(function: Callable[[Any, Any], Any], mesh: Mesh, stacked: Callable[[Any, Any], Any] | None = None
             ) -> Callable[[Any, Any], Any]:
  """Applies a function of one run to every run; to be called under `jax.jit`.

  Each device works through its own runs: all at once on accelerators, one after the other on CPU, where
  that is faster, needs the memory of one run, and compiles to the same arithmetic for a run however many
  there are, so that results are equal to the bit on any number of devices. Where runs are spread over
  devices, they are computed all at once, and results are equal up to rounding.

  Args:
    function: (one run's tree, what all runs share) -> tree.
    mesh: where the runs lie.
    stacked: what accelerators call instead of `jax.vmap(function)`, on `[runs, ...]` of a device.

  Returns:
    (tree of `[runs, ...]`, padded and sharded; shared tree) -> tree of `[runs, ...]`.
  """
  def device(trees: Any, shared: Any) -> Any:
    if mesh.devices.flat[0].platform == "cpu":
      return jax.lax.map(lambda tree: function(tree, shared), trees)
    return (stacked or jax.vmap(function, in_axes=(0, None)))(trees, shared)
  if not spreads_runs(mesh):
    return jax.shard_map(device, mesh=mesh, in_specs=(PartitionSpec(RUNS), PartitionSpec()),
                         out_specs=PartitionSpec(RUNS), check_vma=False)

  def partitioned(trees: Any, shared: Any) -> Any:
    # The partitioner splits runs as it splits rows: to map one axis by hand and leave it the others ends in an
    # internal error of XLA's (jaxlib 0.10.2, CPU).
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return (stacked or jax.vmap(function, in_axes=(0, None), spmd_axis_name=RUNS))(trees, shared)
  return partitioned


@jax.jit
def take_runs(tree: Tree, index: Any) -> Tree:
  """Some of stacked runs, in an order; by one program, where an index of each leaf is dozens."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


@functools.partial(jax.jit, static_argnums=(2, 3))
def take_held(tree: Tree, start: Any, devices: int, number: int) -> Tree:
  """`number` of the stacked runs that each device holds, from a place on; nothing leaves its device.

  Args:
    tree: `[runs, ...]`, padded and laid out over the devices.
    start: the first place, the same on every device.
    devices: that the runs lie on.
    number: of runs, of each device.
  """
  def pick(leaf: jax.Array) -> jax.Array:
    apart = leaf.reshape(devices, -1, *leaf.shape[1:])
    return jax.lax.dynamic_slice_in_dim(apart, start, number, 1).reshape(-1, *leaf.shape[1:])
  return jax.tree.map(pick, tree)


def to_host(tree: Tree, num_runs: int | None = None) -> Tree:
  """Numpy copies on every process, with the padding of the runs axis dropped."""
  return jax.tree.map(lambda leaf: fetch(leaf)[:num_runs] if num_runs else fetch(leaf), tree)


def to_first(tree: Any, num_runs: int | None = None) -> Any:
  """As `to_host`, on process 0 alone; the others take part, hold one leaf at a time, and get None."""
  leaves, structure = jax.tree.flatten(tree)
  kept = []
  for leaf in leaves:
    value = to_host(leaf, num_runs)
    if is_first():
      kept.append(value)
  return jax.tree.unflatten(structure, kept) if is_first() else None


def shard_rows(tree: Tree, mesh: Mesh, multiple: int = 1, at_least: int = 0) -> Tree:
  """Lays out a data set `[runs, rows, ...]`: runs padded by repeating, rows by empty ones.

  Args:
    tree: token rows on the host; of several processes each lays out what its devices hold.
    mesh: the mesh.
    multiple: the rows of each of its shards become a multiple of this.
    at_least: their number, over all shards.
  """
  unit, sharding = row_shards(mesh) * multiple, rows_sharding(mesh)

  def lay(leaf: np.ndarray) -> jax.Array:
    rows = -(-max(leaf.shape[1], at_least) // unit) * unit
    return place_padded(leaf, (padded_runs(leaf.shape[0], mesh), rows, *leaf.shape[2:]), sharding)
  return jax.tree.map(lay, tree)


def repeat_runs(tree: Tree, num_runs: int, mesh: Mesh, axes: Mapping[str, tuple[str, ...]] | None = None) -> Tree:
  """The same parameters `num_runs` times (padded), laid out over the mesh.

  Args:
    tree: one run's parameters, laid out on the mesh or on the host.
    num_runs: how often.
    mesh: the mesh.
    axes: see `weight_shardings`; without it a run is on one device, or whole on each of its own.
  """
  size = padded_runs(num_runs, mesh)
  stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), tree)
  spread = jax.jit(lambda t: jax.tree.map(lambda leaf: jnp.repeat(leaf[None], size, 0), t),
                   out_shardings=weight_shardings(stacked, axes or {}, mesh, stacked=True))
  on_mesh = all(getattr(leaf, "sharding", None) is not None and leaf.sharding.device_set == set(mesh.devices.flat)
                for leaf in jax.tree.leaves(tree))
  return spread(tree if on_mesh else lay_out(tree, weight_shardings(tree, axes or {}, mesh, stacked=False)))


@functools.lru_cache(maxsize=16)
def _stack(places: tuple[int, ...]) -> Callable[..., Any]:
  """Distinct trees -> those at some places, stacked; one function for equal places, so that it is compiled once."""
  every = places == tuple(range(len(places)))
  pick = lambda leaf: leaf if every else leaf[np.array(places)]
  return lambda *some: jax.tree.map(lambda *leaves: pick(jnp.stack(leaves)), *some)


def stack_trees(trees: Sequence[Tree], mesh: Mesh, axes: Mapping[str, tuple[str, ...]]) -> Tree:
  """Parameters of several runs as `[runs, ...]`, padded by repeating the first ones and laid out over the mesh.

  Args:
    trees: one run's parameters each, laid out on the mesh or elsewhere.
    mesh: the mesh.
    axes: see `weight_shardings`.
  """
  padded = [trees[i % len(trees)] for i in range(padded_runs(len(trees), mesh))]
  # Seeds of an attack begin with the same tree, which is passed once: compiling takes the longer the more there are.
  distinct = list({id(tree): tree for tree in padded}.values())
  stack = _stack(tuple(next(i for i, tree in enumerate(distinct) if tree is one) for one in padded))
  lay = lambda tree: lay_out(tree, weight_shardings(tree, axes, mesh, stacked=False))
  shardings = weight_shardings(jax.eval_shape(stack, *distinct), axes, mesh, stacked=True)
  return jax.jit(stack, out_shardings=shardings)(*map(lay, distinct))
