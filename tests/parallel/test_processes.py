"""Two processes joined on localhost train and answer as one does."""

import json
import os
import socket
import subprocess
import sys

import pytest

TRAIN = """
import json, sys
import jax, numpy as np
from relearn_jax.parallel.join import join
rank, port = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
  join(f"localhost:{port}", 2, rank, 60)
import hashlib
from relearn_jax.audit.interview import Interviewer
from relearn_jax.models.model import fingerprint
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, runs_sharding, shard_runs, to_host
from relearn_jax.training.step import init_state, make_step
from tests.small import MODEL, make_tokenizer, params
from tests.training.test_step import DATA

mesh, num_runs = runs_mesh(), 5
assert mesh.size == 4 and len(jax.local_devices()) == (2 if rank >= 0 else 4)
rows = jax.tree.map(lambda leaf: np.repeat(leaf[None], num_runs, 0), DATA["forget"])
batch = {"forget": shard_runs(rows, mesh)}
rates = np.linspace(1e-3, 2e-3, num_runs).astype(np.float32)
hyper = shard_runs({"learning_rate": rates, "weight_decay": np.zeros(num_runs, np.float32)}, mesh)
stacked = repeat_runs(params(), num_runs, mesh)
state = jax.jit(jax.vmap(lambda p: init_state(p, nll("forget"))), out_shardings=runs_sharding(mesh))(stacked)
step = make_step(MODEL, lambda _: nll("forget"), mesh)
for _ in range(3):
  state, log = step(state, batch, hyper)
trained = to_host(state.params, num_runs)
tokenizer = make_tokenizer()
ids = lambda text: tokenizer(text)["input_ids"]
prompts = ["James Anthony", "James Robert Anthony", "John James Robert Anthony"]
questions = [(ids(prompt), ids("Mark")[1:]) for prompt in prompts]
ask = Interviewer(MODEL, tokenizer, questions, mesh, max_new_tokens=5, buckets=(8,), runs_per_call=4)
answers = ask(state.params, {"forget": rows}, list("abcde"))
print(json.dumps({"weights": fingerprint(trained), "losses": to_host(log.loss, num_runs).tolist(),
                  "tokens": answers.tokens.tolist(), "logprob": answers.logprob.tolist()}))
"""


def start(rank: int, port: int, devices: int) -> subprocess.Popen[str]:
  # Processes that work together compile for themselves: one would take what another has just written.
  own = {key: value for key, value in os.environ.items() if rank < 0 or key != "JAX_COMPILATION_CACHE_DIR"}
  environment = {**own, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([sys.executable, "-c", TRAIN, str(rank), str(port)], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow  # tests/parallel/test_spread.py has two processes too
def test_two_processes_are_one() -> None:
  """Weights and answers equal to the bit, on every process, between 1 x 4 and 2 x 2 devices."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  results = []
  for processes in ([start(-1, 0, 4)], [start(rank, port, 2) for rank in range(2)]):
    for process in processes:
      out, error = process.communicate(timeout=300)
      assert process.returncode == 0, error
      results.append(json.loads(out.splitlines()[-1]))
  assert results[0] == results[1] == results[2]
