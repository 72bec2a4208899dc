"""How much memory of the host loading a checkpoint takes beside the loaded arrays: `python benchmarks/loading.py`.

Random checkpoints of a Llama's shape are written into a temporary folder, one tensor at a time, and each is loaded in a
fresh process as the commands load one: headers checked, weights read by slice into stacked fp32 arrays, laid out over a
mesh of virtual CPU devices. Memory is read as benchmarks/resident.py says: pages of the mapped files do not count.

On CPU the loaded arrays lie in the host's memory too. What an accelerator's host would have to hold is what there was
at the peak besides them: columns "beside", and its ratios to the model's bytes in memory, to what one device gets of
them, to the largest stacked array, and to one device's part of the largest. "loaded" counts every copy on every device.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import resident

from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import to_hf_config
from relearn_jax.models.model import Model, flatten
from relearn_jax.models.safetensor_files import INDEX, SINGLE
from relearn_jax.parallel.mesh import make_mesh, parse_mesh

MB = 1e6
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
MESHES = ("fsdp:1", "fsdp:8", "data:4,fsdp:2")
SHARDS = 3
HEAD = ["numbers", "files", "mesh", "on disk", "loaded", "peak", "beside", "/ model", "/ device's share", "/ array",
        "/ part", "left over", "peak with file pages", "seconds"]
LLAMA = ModelConfig(
    architecture="llama", vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_layers=12, num_heads=16,
    num_kv_heads=16, head_dim=64, max_positions=2048, norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    tie_embeddings=False, bos_id=1, eos_ids=(2,))


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every tensor of a checkpoint, layer by layer."""
  model = Model(config)
  shapes: dict[str, tuple[int, ...]] = {}
  for leaf, shape in flatten(model.abstract()).items():
    name = model.names[leaf]
    if "{i}" in name:
      shapes |= {name.format(i=i): shape.shape[1:] for i in range(config.num_layers)}
    else:
      shapes[name] = shape.shape
  return shapes


def write_file(file: pathlib.Path, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
  """A safetensors file of random numbers, of which one tensor at a time is in memory."""
  header, end = {}, 0
  for name, shape in shapes.items():
    size = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
    header[name] = {"dtype": kind, "shape": shape, "data_offsets": (end, end + size)}
    end += size
  text = json.dumps(header).encode()
  rng = np.random.default_rng(0)
  with file.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
      stream.write((rng.random(shape, np.float32) - 0.5).astype(DTYPES[kind]).tobytes())


def write_checkpoint(folder: pathlib.Path, config: ModelConfig, kind: str, num_files: int) -> None:
  """A checkpoint folder of `num_files` files, with an index if there are several."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
  shapes = list(tensors(config).items())
  if num_files == 1:
    write_file(folder / SINGLE, dict(shapes), kind)
    return
  weight_map: dict[str, str] = {}
  for number in range(num_files):
    part = dict(shapes[number::num_files])  # layers of one array lie in all files
    file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
    write_file(folder / file, part, kind)
    weight_map |= dict.fromkeys(part, file)
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: str, text: str) -> None:
  """The child: loads one checkpoint while its parent looks on."""
  mesh = make_mesh(parse_mesh(text))
  jax.block_until_ready(jax.device_put(np.zeros(1), jax.devices()[-1]))  # the backend is up
  resident.mark("before")
  resident.mark("start")
  begin = time.perf_counter()
  checked = check_checkpoint(folder)
  params = jax.block_until_ready(load_params(checked, Model(checked.config), dtype=jnp.float32, mesh=mesh))
  seconds = time.perf_counter() - begin
  resident.mark("end")
  leaves = jax.tree.leaves(params)
  largest = max(leaves, key=lambda leaf: leaf.nbytes)
  resident.finish({
      "seconds": seconds, "loaded": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
      "model": sum(leaf.nbytes for leaf in leaves), "leaf": largest.nbytes,
      "part": max(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
      "device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)})


def main() -> None:
  """Writes the checkpoints, loads each, prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=LLAMA.num_layers, help="of the model (default: %(default)s)")
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the numbers in the files")
  parser.add_argument("--meshes", nargs="+", default=list(MESHES), help="as --mesh of the commands")
  parser.add_argument("--folder", type=pathlib.Path, help="where checkpoints are written, up to 900 MB at a time, and "
                      "removed again (default: the system's temporary folder)")
  parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.load:
    load(*flags.load)
    return
  config = dataclasses.replace(LLAMA, num_layers=flags.layers)
  rows = []
  for kind in flags.dtypes:
    for num_files in (1, SHARDS):
      with tempfile.TemporaryDirectory(dir=flags.folder) as temporary:
        folder = pathlib.Path(temporary) / "checkpoint"
        write_checkpoint(folder, config, kind, num_files)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for mesh in flags.meshes:
          devices = int(np.prod(list(parse_mesh(mesh).values())))
          seen = resident.watch([os.path.abspath(__file__), "--load", str(folder), mesh], JAX_PLATFORMS="cpu",
                                JAX_NUM_CPU_DEVICES=str(devices))
          found = seen.result
          beside = seen.peak - seen.before - found["loaded"]
          rows.append([
              kind, str(num_files), mesh, f"{size / MB:.0f}", f"{found['loaded'] / MB:.0f}",
              f"{(seen.peak - seen.before) / MB:.0f}", f"{beside / MB:.0f}", f"{beside / found['model']:.2f}",
              f"{beside / found['device']:.2f}", f"{beside / found['leaf']:.2f}", f"{beside / found['part']:.2f}",
              f"{(seen.after - seen.before - found['loaded']) / MB:.0f}",
              f"{(seen.peak_with_files - seen.before_with_files) / MB:.0f}", f"{found['seconds']:.1f}"])
          print("  ".join(rows[-1]), flush=True)
  print(f"\nlargest array {found['leaf'] / MB:.0f} MB of {found['model'] / MB:.0f} MB; all in MB = 1e6 bytes\n")
  print(resident.table(HEAD, rows))


if __name__ == "__main__":
  main()
