"""What versions of this repository take for the same work: a process of each, which take turns.

usage: python benchmarks/versions.py train|decode|audit|singly --shape=names [options] CHECKOUT CHECKOUT ...

audit: the short names audit of `relearn bench`, with its programs in memory; singly: attacked and asked one by one.

The first checkout is what the others are compared with. Each process uses all cores as one device. Seconds and seconds
of CPU are told: on a machine with other work on it the latter say more. Losses, tokens and results are compared too.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

WORKER = """
import hashlib, itertools, json, pathlib, sys, tempfile, time
import jax, jax.numpy as jnp, numpy as np, pyarrow.parquet as pq
from relearn_jax.bench import grid_speed
from relearn_jax.bench.shapes import random_params, shape_config
from relearn_jax.bench.train_speed import Stepper, Training
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, use_mesh
from relearn_jax.parallel.start import start
from relearn_jax.plan.work import Work

start()
given = json.loads(sys.argv[1])

def audits(temporary):
  plan, root, number = grid_speed.short_audit(config, methods=("ga",), adapters=("full",)), pathlib.Path(temporary), (
      itertools.count())
  if given["what"] == "singly":
    grid_speed.singly(plan)
  def call():
    name = f"audit{next(number)}"
    grid_speed.audit_once(plan, root, name, "runs:1")
    return np.zeros(()), root / name
  call()
  frame = pq.read_table(call()[1] / "results.parquet").to_pandas()
  return call, hashlib.sha256(frame.to_csv().encode()).hexdigest()

config, rows, length = shape_config(given["shape"]), given["rows"], given["length"]
mesh = make_mesh(parse_mesh("runs:1"), jax.devices()[:1])
with use_mesh(mesh), jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as temporary:
  if given["what"] in ("audit", "singly"):
    call, said = audits(temporary)
  elif given["what"] == "train":
    lora = given["adapter"] == "lora"
    training = Training(Work("", "train", config, runs=given["runs"], rows=rows, length=length, counted=length - 1,
                             adapter=given["adapter"], shared=lora), jnp.float32, mesh)
    stepper = Stepper(training.step, training.start())
    jax.block_until_ready(stepper())
    said = [round(float(x), 5) for x in jax.block_until_ready(stepper())[1].loss]
    call = stepper
  else:
    model = Model(config)
    params = random_params(model, jnp.float32, mesh)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length), dtype=np.int32)
    arguments = params, tokens, np.full(rows, length, np.int32), 0.0, None
    compiled = complete.lower(*arguments, model=model, max_new_tokens=given["new_tokens"], eos_ids=()).compile()
    call = lambda: compiled(*arguments)
    said = np.asarray(call().tokens).sum(-1).tolist()
  print(json.dumps(said), flush=True)
  for _ in sys.stdin:
    begin, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call()[0])
    print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu]), flush=True)
"""


def main() -> None:
  """See the top of the file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("train", "decode", "audit", "singly"))
  parser.add_argument("checkouts", type=pathlib.Path, nargs="+")
  parser.add_argument("--shape", default="names")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--length", type=int, default=64, help="tokens of a row, or of a prompt")
  parser.add_argument("--runs", type=int, default=1)
  parser.add_argument("--adapter", choices=("full", "lora"), default="full")
  parser.add_argument("--new_tokens", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=15)
  given = vars(parser.parse_args())
  checkouts, told = given.pop("checkouts"), json.dumps(given)
  workers = [subprocess.Popen(
      [sys.executable, "-c", WORKER, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=one,
      env=os.environ | {"PYTHONPATH": str(one.resolve()), "JAX_NUM_CPU_DEVICES": "1"}) for one in checkouts]

  def ask(worker: subprocess.Popen) -> list:
    assert worker.stdout
    return json.loads(worker.stdout.readline())
  said = [ask(worker) for worker in workers]
  took: list[list[list[float]]] = [[] for _ in workers]
  for _ in range(given["repeats"]):
    for worker, rows in zip(workers, took, strict=True):
      assert worker.stdin
      worker.stdin.write("\n")
      worker.stdin.flush()
      rows.append(ask(worker))
  print(told)
  for one, rows, result in zip(checkouts, took, said, strict=True):
    ratios = [sorted(old[i] / new[i] for old, new in zip(took[0], rows, strict=True)) for i in range(2)]
    wall, cpu = (f"{statistics.median(r):.2f} [{r[0]:.2f}, {r[-1]:.2f}]" for r in ratios)
    print(f"{one}: {statistics.median(row[0] for row in rows):.4g} s; speed-up {wall}, of CPU {cpu}; "
          f"{'same result' if result == said[0] else f'results {result}, not {said[0]}'}")


if __name__ == "__main__":
  main()
