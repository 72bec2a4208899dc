"""`relearn bench`: measures part after part, and writes what it has after each row."""

import datetime
import functools
import importlib.metadata
import math
import pathlib
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relearn_jax.bench.bench_settings import BenchSettings, check_settings
from relearn_jax.bench.bench_text import bench_text
from relearn_jax.bench.compiling import fresh_cache
from relearn_jax.bench.formulas import FORMULAS
from relearn_jax.bench.rates import Rates, measure_rates
from relearn_jax.bench.shapes import random_params
from relearn_jax.bench.train_speed import Base, measure_training, train_works
from relearn_jax.data.jsonl import check_writable, write_jsonl
from relearn_jax.generation.gather import most_bytes
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.precision import compute_dtype
from relearn_jax.parallel.mesh import AXES, DEFAULT, RUNS, fill_mesh, make_mesh, parse_mesh
from relearn_jax.parallel.start import num_cores
from relearn_jax.plan.bench_file import SCHEMA
from relearn_jax.plan.devices import USABLE
from relearn_jax.plan.estimate import estimate
from relearn_jax.plan.fit import device_memory
from relearn_jax.plan.work import Work, count, leaves
from relearn_jax.progress import progress
from relearn_jax.training.unlearn import default_mesh

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "relearn_jax")
Rows = Iterable[dict[str, Any]]  # each is written as soon as it is there
Part = tuple[str, str, Callable[[], Rows]]  # key of the results, what is measured, how


def bench(settings: BenchSettings, command: str, output: pathlib.Path | None) -> str:
  """Measures, writes JSON to `output` after every row, and returns the tables.

  A part that does not fit the devices' memory, by the plan or in earnest, is named among what was left out; the others
  go on.

  Raises:
    InputError: a flag, the checkpoint or the output is wrong.
  """
  config, folder = check_settings(settings)
  if output is not None:
    check_writable(output)
  write = lambda found: None if output is None else write_jsonl(output, [plain(found)])
  dtype = compute_dtype(settings.dtype, None, "--dtype")
  with fresh_cache(), tempfile.TemporaryDirectory(prefix="relearn-bench-") as temporary:
    found = about(settings, command, config, dtype)
    rates = measure_rates(dtype, settings.repeats)
    found["rates"] = {"dtype": jnp.dtype(dtype).name, "matmul_flops": rates.matmul.median,
                      "bandwidth_bytes": rates.bandwidth, **vars(rates)}
    measure = _Parts(settings, config, folder, dtype, rates, found, pathlib.Path(temporary))
    parts = list(measure.parts())
    with progress(len(parts), "bench", "part") as bar:
      for key, name, part in parts:
        bar.set_postfix_str(name)
        try:
          for row in part():
            found.setdefault(key, []).append(row)
            write(found)
        except RuntimeError as error:  # memory, of either side, is one
          found["left_out"].append({"part": f"{key} {name}", "why": str(error).splitlines()[0][:300]})
        bar.update(1)
        write(found)
  write(found)
  return bench_text(plain(found)) + (f"\nJSON: {output}" if output else "")


def about(settings: BenchSettings, command: str, config: ModelConfig, dtype: Any) -> dict[str, Any]:
  """What was measured, when, by what, and on what."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  return {
      "schema_version": SCHEMA, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "command": command,
      "device": {"kind": device.device_kind, "platform": device.platform, "number": jax.local_device_count(),
                 "memory_bytes": stats.get("bytes_limit"), "cores": num_cores(), "processor": processor(),
                 "system": platform.platform()},
      "versions": {"python": platform.python_version(),
                   **{name: importlib.metadata.version(name) for name in PACKAGES}},
      "model": {"name": settings.model or settings.shape, "parameters": count(leaves(config)),
                "compute_dtype": jnp.dtype(dtype).name, **vars(config)},
      "settings": vars(settings), "formulas": FORMULAS, "left_out": []}


def processor() -> str:
  """The host's, as its system calls it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def plain(value: Any) -> Any:
  """JSON-safe: named tuples as objects with their fields, in whatever is nested."""
  if hasattr(value, "_asdict"):
    return {key: plain(one) for key, one in value._asdict().items()}
  if isinstance(value, Mapping):
    return {str(key): plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [plain(one) for one in value]
  return value if isinstance(value, str | int | float | bool | None) else str(value)


class _Parts:
  """What is measured of one model, in the order of the memory that it takes: each peak is then the highest so far."""

  def __init__(self, settings: BenchSettings, config: ModelConfig, folder: pathlib.Path | None, dtype: Any,
               rates: Rates, found: dict[str, Any], temporary: pathlib.Path):
    self.settings, self.config, self.folder, self.dtype, self.rates = settings, config, folder, dtype, rates
    self.found, self.temporary = found, temporary
    self.base: Base = random_params
    if folder is not None:
      checked = check_checkpoint(folder)
      self.base = lambda model, dtype, mesh: load_params(checked, model, dtype=dtype, mesh=mesh)

  def parts(self) -> Iterator[Part]:
    """The parts; those that the plan says do not fit are left out."""
    if self.settings.grid:
      yield from self._grids()
      return
    what, settings = self.settings.what, self.settings
    if "attention" in what:
      from relearn_jax.bench.attention_speed import measure_attention
      yield "attention", "attention", lambda: measure_attention(self.config, self.dtype, self.rates, settings.repeats)
    if "load" in what:
      from relearn_jax.bench.load_speed import measure_loading
      yield "load", "load", lambda: [measure_loading(self.config, self.folder, self.dtype, self.mesh(1),
                                                     settings.repeats)]
    if "decode" in what and (works := self._fitting("decode", self.decode_works())):
      from relearn_jax.bench.decode_speed import measure_decoding
      yield "decode", "decode", lambda: measure_decoding(works, self.dtype, self.mesh(1), self.rates, settings.repeats,
                                                         self.base)
      if settings.compare:
        yield "compare", "decode", functools.partial(self._compare_decoding, works)
    if "train" in what:
      for work in self._fitting("train", self.train_works()):
        yield "train", work.name, functools.partial(self._train, work)
        if settings.compare:
          yield "compare", work.name, functools.partial(self._compare_training, work)

  def mesh(self, runs: int) -> Mesh:
    """Where a number of runs lie; a model alone as `relearn unlearn` has it, stacked ones as `relearn audit` does."""
    return make_mesh(self._sizes(runs), config=self.config)

  def _sizes(self, runs: int) -> dict[str, int]:
    given = self.settings.mesh
    if given is not None:
      return fill_mesh(parse_mesh(given), jax.device_count())
    if runs == 1:
      return fill_mesh(parse_mesh(default_mesh()), jax.device_count())
    return dict.fromkeys(AXES, 1) | {RUNS: math.gcd(runs, jax.device_count())}

  def _bytes(self) -> int:
    return jnp.dtype(self.dtype).itemsize

  def decode_works(self) -> list[Work]:
    """A work for each batch size."""
    s, size = self.settings, self._bytes()
    return [Work(f"batch {rows}", "generate", self.config, rows=rows, length=s.prompt_length, counted=1,
                 max_new_tokens=s.max_new_tokens, param_dtype=size, compute_bytes=size)
            for rows in sorted(set(s.decode_batches))]

  def train_works(self) -> list[Work]:
    """A work for each kind of training step."""
    s = self.settings
    base = Work("", "train", self.config, rows=s.batch_size, length=s.length, counted=s.length - 1,
                compute_bytes=self._bytes(), lora_rank=s.lora_rank)
    return train_works(base, s.adapters, s.remat, s.runs)

  def _fitting(self, part: str, works: list[Work]) -> list[Work]:
    """Those that fit by the plan and whose runs the mesh divides, smallest first."""
    limit, found = device_memory() * USABLE, []
    for work in works:
      laid = self._sizes(work.runs)
      needed = estimate(work, laid, most_bytes()).total
      if work.runs % laid[RUNS]:
        self._leave_out(part, work, f"{work.runs} runs do not divide over {laid[RUNS]} devices of the mesh")
      elif needed > limit:
        self._leave_out(part, work, f"the plan says {needed / 2**30:.1f} GiB a device, and {limit / 2**30:.1f} GiB can "
                        "be used")
      else:
        found.append((needed, work))
    return [work for _, work in sorted(found, key=lambda pair: pair[0])]

  def _leave_out(self, part: str, work: Work, why: str) -> None:
    self.found["left_out"].append({"part": f"{part} {work.name}", "why": why})

  def _train(self, work: Work) -> Rows:
    yield measure_training(work, self.dtype, self.mesh(work.runs), self.rates, self.settings.repeats, self.base)

  def _other(self) -> pathlib.Path:
    """The model as a folder that transformers loads; what the other side is, is put down once."""
    from relearn_jax.bench import torch_side
    from relearn_jax.bench.compare_torch import write_model
    self.found.setdefault("other_side", torch_side.describe())
    folder = self.temporary / "model"
    return folder if folder.exists() else write_model(self.base, self.config, folder, self.mesh(1))

  def _compare_training(self, work: Work) -> Rows:
    from relearn_jax.bench.compare_torch import compare_training
    yield compare_training(work, self.dtype, self.mesh(work.runs), self._other(), self.settings.repeats, self.base)

  def _compare_decoding(self, works: list[Work]) -> Rows:
    from relearn_jax.bench.compare_torch import compare_decoding
    return compare_decoding(works, self.dtype, self.mesh(1), self._other(), self.settings.repeats, self.base)

  def _grids(self) -> Iterator[Part]:
    from relearn_jax.bench.grid_speed import measure_grid, ways
    if self.settings.compare:
      yield "compare", "audit", self._compare_audit
      return
    config, adapters, dtype = self.config, self.settings.adapters, self.settings.dtype
    parts = [("grid", f"{way}, {mesh}", functools.partial(
        measure_grid, config, mesh, way, self.settings.repeats, dtype, adapters))
             for way, mesh in ways(self.settings.mesh)]
    # Cells that are not alike cannot stand for each other; and off CPU this process holds the devices.
    if len(adapters) == 1 and jax.default_backend() == "cpu":
      from relearn_jax.bench.separate_speed import measure_commands
      parts.insert(2, ("grid", "commands", functools.partial(
          measure_commands, config, self.settings.mesh or DEFAULT, adapters, dtype)))
    yield from parts

  def _compare_audit(self) -> Rows:
    from relearn_jax.bench import torch_side
    from relearn_jax.bench.compare_audit import BATCHED, ONE_PROMPT, compare_audit
    from relearn_jax.bench.grid_speed import default_audit, short_audit
    self.found.setdefault("other_side", torch_side.describe())
    if self.settings.audit == "default":  # one prompt a call takes an hour
      plan, name, ways = default_audit(self.config), "default audit", [BATCHED]
    else:
      plan = short_audit(self.config, methods=("ga",), adapters=("full",), dtype="float32")
      name, ways = "names audit", [BATCHED, ONE_PROMPT]
    yield compare_audit(plan, name, self.settings.mesh or DEFAULT, self.settings.repeats, ways)
