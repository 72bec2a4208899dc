"""What devices send each other by the plan: by hand, and as the compiler's programs have it."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.stages import plan_stages
from relearn_jax.errors import InputError
from relearn_jax.generation import gather
from relearn_jax.generation.decode import decode, prefill
from relearn_jax.generation.gather import UNTOLD
from relearn_jax.models.model import Model
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import (
  make_mesh,
  map_runs,
  parse_mesh,
  repeat_runs,
  rows_sharding,
  shard_rows,
  shard_runs,
)
from relearn_jax.plan.command import plan
from relearn_jax.plan.devices import get_device
from relearn_jax.plan.exchange import exchange
from relearn_jax.plan.schedule import audit_disk, makespan
from relearn_jax.plan.work import Work
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.step import make_begin, make_step

from ..audit.tiny import names_audit
from ..small import CONFIG
from .test_plan import LLAMA

LAYERS, ENDS, NORMS = 6_476_005_376, 2 * 32000 * 4096, 65 * 4096  # numbers of Llama-2-7b
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def test_weights_and_gradients_by_hand() -> None:
  """Llama-2-7b on 8 devices: 2 x 2 bytes of the layers, 2 of embedding and head; 4 of all gradients; 7/8 of them."""
  work = Work("attack", "train", LLAMA, rows=16, compute_bytes=2, remat="full")
  found = exchange(work, {"fsdp": 8})
  assert found.weights == 7 / 8 * 2 * (2 * LAYERS + ENDS)
  assert found.gradients == 7 / 8 * 4 * (LAYERS + ENDS + 2 * NORMS) and found.data == found.tensor == 0
  assert found.seconds(get_device("v5p")) == pytest.approx(46.7e9 / 600e9, rel=1e-2)
  ask = Work("ask", "generate", LLAMA, rows=16, runs=2, compute_bytes=2, max_new_tokens=50)
  room = 2 * 2 * (LAYERS + ENDS)  # of two runs
  assert exchange(ask, {"fsdp": 8}, room) == (7 / 8 * room, 0, 0, 0)  # once
  assert exchange(ask, {"fsdp": 8}, room - 1) == (51 * 7 / 8 * room, 0, 0, 0)  # the prompts, and each new token
  assert exchange(ask, {"fsdp": 4, "tensor": 2}, room / 2).weights == 3 / 4 * room / 2
  two = exchange(dataclasses.replace(work, num_microbatches=2, runs=6), {"fsdp": 8, "runs": 2})
  assert two.weights == 6 * found.weights and two.gradients == 6 * found.gradients  # three runs a device, twice
  spread = exchange(work, {"fsdp": 2, "data": 4})
  assert spread.data == 2 * 3 / 4 * 4 * ((LAYERS + ENDS) / 2 + NORMS)
  assert exchange(work, {"runs": 8}) == (0, 0, 0, 0)


def test_an_adapter_has_small_gradients() -> None:
  work = Work("attack", "train", LLAMA, runs=3, rows=16, compute_bytes=2, adapter="lora", lora_rank=2,
              lora_targets=("q_proj",), shared=True)
  found, adapter = exchange(work, {"fsdp": 8}), 32 * 2 * 4096  # `a` is sharded, `b` is not
  assert found.weights == 7 / 8 * 2 * (2 * LAYERS + ENDS + 3 * 2 * adapter)
  assert found.gradients == 7 / 8 * 4 * 3 * (adapter + 2 * adapter)


def test_activations_by_hand() -> None:
  """Two all-reduces of c D bytes a layer and token forward, seven backward, one again; embedding and head."""
  work = Work("attack", "train", LLAMA, rows=16, length=100, counted=20, compute_bytes=2, remat="full")
  found = exchange(work, {"tensor": 4})
  assert found == (0, 0, 0, 2 * 3 / 4 * 2 * 4096 * 16 * (100 * (32 * 8 + 1) + 20))
  asked = Work("ask", "generate", LLAMA, rows=16, length=100, compute_bytes=2, max_new_tokens=50)
  assert exchange(asked, {"tensor": 4}).tensor == 2 * 3 / 4 * 2 * 4096 * 16 * 150 * (32 * 2 + 1)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_the_compiler_sends_as_much(axis: str, remat: str) -> None:
  mesh = make_mesh(parse_mesh(f"{axis}:2"), config=UNTIED)
  model, rows, length = Model(UNTIED, remat=remat), 4, 16
  data = shard_rows(TokenRows(np.ones((1, rows, length), np.int32), np.ones((1, rows, length), np.float32)), mesh)
  hyper = shard_runs({"learning_rate": np.full(1, 1e-3, np.float32), "weight_decay": np.zeros(1, np.float32)}, mesh)
  build = lambda _: nll("forget")
  start = repeat_runs(model.init(jax.random.key(0)), 1, mesh, model.axes())
  state = make_begin(build, model.axes(), mesh)(start, hyper)
  text = make_step(model, build, mesh).lower(state, {"forget": data}, hyper).compile().as_text()
  found = {"all-gather": 0.0, "all-reduce": 0.0}
  for line in text.splitlines():
    if made := re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", line):
      sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", made[1])]
      times = UNTIED.num_layers if "/while/body" in line else 1
      found[made[2]] += 4 * times * sum(size for size in sizes if size > rows * length)  # sums of a token left out
  by_hand = exchange(Work("t", "train", UNTIED, rows=rows, length=length, counted=length - 1, remat=remat), {axis: 2})
  assert found["all-gather"] / 2 == by_hand.weights
  if axis == "tensor":
    assert found["all-reduce"] == pytest.approx(by_hand.tensor, rel=1e-6)
  else:  # gradients are summed whole, and each device takes its part; norms are too small to be found here
    assert found["all-reduce"] / 2 == by_hand.gradients - 4 * (2 * UNTIED.num_layers + 1) * UNTIED.hidden_size


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("most", [0, UNTOLD])
def test_the_compiler_gathers_all_weights_once_or_for_each_new_token(most: int, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
  monkeypatch.setattr(gather, "most_bytes", lambda: most)
  mesh, model = make_mesh(parse_mesh("fsdp:2"), config=UNTIED), Model(UNTIED)
  start = repeat_runs(model.init(jax.random.key(0)), 1, mesh, model.axes())
  tokens, lengths = (jax.device_put(np.ones(shape, np.int32), rows_sharding(mesh)) for shape in ((1, 4, 16), (1, 4)))

  def answer(tree: Any, _: None) -> Any:
    params, tokens, lengths = tree
    params = gather.gather_weights(model, params)
    return decode(model, params, prefill(model, params, tokens, lengths, 7), max_new_tokens=8, eos_ids=(2,))
  text = jax.jit(lambda tree: map_runs(answer, mesh)(tree, None)).lower((start, tokens, lengths)).compile().as_text()
  found = 0
  for line in text.splitlines():
    if "all-gather(" in line and (most or re.search(r"/while/body/(Decoder|td,vd)", line)):
      shapes = re.findall(r"f32\[([\d,]+)\]", line.split("all-gather(")[0])
      sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
      found += 4 * sum(sizes) * (UNTIED.num_layers if "/Decoder/while/body" in line else 1)
  ask = Work("ask", "generate", UNTIED, rows=4, length=16, max_new_tokens=8)
  sent = [exchange(dataclasses.replace(ask, max_new_tokens=new), {"fsdp": 2}, most).weights for new in (8, 9)]
  assert found / 2 == (sent[0] if most else sent[1] - sent[0])


def test_commands_claim_what_is_ready() -> None:
  """Memorising, two methods beside each other, then eight attacks of each as commands become free."""
  config = names_audit(unlearn__methods=("ga", "npo"), seeds=tuple(range(8)))
  stages = plan_stages(config, ["prefixes"])
  takes = {"pretrain": 5.0, "memorize": 10.0, "unlearn": 4.0, "attack": 3.0}
  seconds = [takes[stage.kind] for stage in stages]
  assert makespan(stages, seconds, 1) == sum(seconds) == 5 + 10 + 2 * 4 + 16 * 3
  assert makespan(stages, seconds, 4) == 5 + 10 + 4 + 16 / 4 * 3
  assert makespan(stages, seconds, 100) == 5 + 10 + 4 + 3


def test_what_is_kept_on_disk() -> None:
  """Of U and N with two seeds: 4 that memorised, and 4 at each of two depths; O and N are not unlearned again."""
  config: Audit = names_audit(unlearn__methods=("ga",), unlearn__depths=2, seeds=(0, 1), case__variants=(7,))
  works = [Work("attack", "train", LLAMA, runs=3)]
  stages, model = plan_stages(config, ["prefixes"]), 4 * 6_738_415_616
  assert audit_disk(config, stages, works) == (12 * model, 10 * model, 3 * 3 * model, model)


def test_the_command_says_it() -> None:
  job = UnlearnJob(model="meta-llama/Llama-2-7b-hf", method="ga", steps=10, keep_every=2, remat="full")
  of = functools.partial(plan, job, "job.py", device="v5p", num_devices=8, mesh="fsdp:-1")
  text = of()
  assert "between devices" in text and "all 8); alone: the time at 600 GB/s" in text and " an hour" not in text
  assert "kept weights 135 GB at most, 135 GB at the end; a state to go on from 80.9 GB, twice" in text
  with pytest.raises(InputError, match="`--num_commands` is 2; leave it out"):
    of(commands=2)
