"""Trains and asks on a mesh, in a process of its own; prints what came out, as JSON.

  python -m tests.parallel.spread RANK PORT WORKDIR KINDS MESH [MESH ...]

RANK -1 is a single process; otherwise two processes join at PORT. KINDS is "full", or "full,lora" for adapters
too. What they print must not depend on the mesh, up to rounding.
"""

import json
import pathlib
import sys

import jax

from relearn_jax.parallel.join import join

rank, port, workdir = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
if rank >= 0:
  join(f"localhost:{port}", 2, rank, 60)

import numpy as np  # noqa: E402

from relearn_jax.audit.interview import Interviewer  # noqa: E402
from relearn_jax.models.lora import LoraConfig, init_lora  # noqa: E402
from relearn_jax.models.model import Model  # noqa: E402
from relearn_jax.objectives.core import TokenRows  # noqa: E402
from relearn_jax.objectives.recipe import default_recipe  # noqa: E402
from relearn_jax.parallel.mesh import (  # noqa: E402
  make_mesh,
  parse_mesh,
  repeat_runs,
  row_shards,
  shard_rows,
  shard_runs,
  to_host,
)
from relearn_jax.training import checkpoints  # noqa: E402
from relearn_jax.training.references import add_references  # noqa: E402
from relearn_jax.training.step import NOTHING, Frozen, make_begin, make_step  # noqa: E402
from tests.small import CONFIG, make_tokenizer, params  # noqa: E402
from tests.training.test_step import DATA  # noqa: E402

LORA = LoraConfig(rank=2, alpha=4.0)
RUNS, STEPS = 2, 2
HYPER = {"learning_rate": 1e-3, "weight_decay": 0.01, "retain_weight": 0.5}
BUILD = default_recipe("kl").build


def train(text: str, adapters: bool) -> dict[str, object]:
  mesh = make_mesh(parse_mesh(text), config=CONFIG)
  model = Model(CONFIG, lora_scale=LORA.scale)
  objective = default_recipe("kl", retain_weight=0.5).objective  # reads both data sets and a reference's hidden states
  stack = lambda leaf: np.repeat(np.asarray(leaf)[None], RUNS, 0)
  rows = {name: jax.tree.map(stack, TokenRows(DATA[name].tokens, DATA[name].mask)) for name in objective.rows}
  data = {name: shard_rows(value, mesh) for name, value in rows.items()}
  assert all(leaf.shape[1] % row_shards(mesh) == 0 for leaf in jax.tree.leaves(data))
  hyper = shard_runs({name: np.full(RUNS, value, np.float32) for name, value in HYPER.items()}, mesh)
  frozen = NOTHING
  start = jax.tree.map(np.asarray, params())
  if adapters:
    frozen = Frozen(shared=jax.tree.map(lambda leaf: leaf[0], repeat_runs(start, 1, mesh, model.axes()))
                    if mesh.shape["runs"] == 1 else jax.device_put(start, jax.NamedSharding(mesh, jax.P())))
    start = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.01, init_lora(model, LORA, jax.random.key(0)))
  trained = repeat_runs(start, RUNS, mesh, model.axes())
  data = dict(add_references(model, trained, data, objective.needs, mesh, frozen))
  state = make_begin(BUILD, model.axes(), mesh)(trained, hyper)
  if not adapters:
    gate = state.opt_state[0].mu["layers"]["mlp"]["gate"]["weight"]
    sizes = mesh.shape
    want = (gate.shape[0] // sizes["runs"], 2, 48 // sizes["tensor"], 32 // sizes["fsdp"])
    assert {shard.data.shape for shard in gate.addressable_shards} == {want}, (text, gate.sharding)
  step = make_step(model, BUILD, mesh)
  logs = []
  for _ in range(STEPS):
    before = jax.tree.leaves(state.params)[0]
    state, log = step(state, data, hyper, None, frozen)
    assert before.is_deleted()  # donated, whatever the mesh
    logs.append({"loss": to_host(log.loss, RUNS).tolist(), "norm": to_host(log.grad_norm, RUNS).tolist()})
  path = workdir / f"{text.replace(':', '').replace(',', '-')}-{adapters}"
  checkpoints.save_tree(path, state, RUNS, checkpoints.description(model, ["a", "b"], "x", STEPS))
  found = {"logs": logs, "path": str(path),
           "weights": {name: float(np.abs(leaf).sum()) for name, leaf in flat(to_host(state.params, RUNS)).items()}}
  if not adapters:
    tokenizer = make_tokenizer()
    ids = lambda text: tokenizer(text)["input_ids"]
    questions = [(ids(prompt), ids("Mark")[1:]) for prompt in (
        "James Anthony", "James Robert Anthony", "John James Robert Anthony")]
    ask = Interviewer(model, tokenizer, questions, mesh, max_new_tokens=12, buckets=(8,), runs_per_call=RUNS)
    answers = ask(state.params, {"forget": rows["forget"]}, ["a", "b"])
    found |= {"tokens": answers.tokens.tolist(), "logprob": answers.logprob.tolist()}
    # What another mesh saved is restored onto this one.
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    others = [saved for saved in sorted(workdir.glob("*-False")) if saved != path]
    again = checkpoints.restore((others or [path])[0], like, RUNS)
    ours, theirs = flat(to_host(again, RUNS)), flat(to_host(state, RUNS))
    found["restored"] = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))
  return found


def flat(tree: object) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


if __name__ == "__main__":
  with jax.default_matmul_precision("highest"):
    kinds = sys.argv[4].split(",")
    print(json.dumps([[text, [train(text, kind == "lora") for kind in kinds]] for text in sys.argv[5:]]))
