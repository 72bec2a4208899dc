"""What only a GPU can show; benchmarks/gpu.sh runs it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.attack import relearn_nll
from relearn_jax.bench.compiling import fresh_cache
from relearn_jax.bench.decode_speed import make_prompts
from relearn_jax.bench.rates import measure_rates
from relearn_jax.bench.shapes import random_params, shape_config
from relearn_jax.bench.train_speed import Training, measure_training
from relearn_jax.data.rows import host_rows
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.attention import FUSED_FROM, form_of, self_attention
from relearn_jax.models.lora import LoraConfig, init_lora
from relearn_jax.models.model import Model
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.mesh import make_mesh, parse_mesh, repeat_runs, shard_rows
from relearn_jax.plan.work import Work
from relearn_jax.training.step import Frozen, make_begin, make_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]
NAMES = shape_config("names")


def both() -> list:
  return [jax.devices("gpu")[0], jax.devices("cpu")[0]]


def test_losses_of_training_are_those_of_a_cpu() -> None:
  losses = []
  for device in both():
    with jax.default_matmul_precision("highest"):
      training = Training(Work("full", "train", NAMES, rows=4, length=32, counted=31), jnp.float32,
                          make_mesh(parse_mesh("runs:1"), [device]))
      state, rest = training.start()
      for _ in range(3):
        state, log = training.step(state, *rest)
      losses.append(float(np.asarray(log.loss)[0]))
  assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_greedy_tokens_are_those_of_a_cpu() -> None:
  work, model, said = Work("d", "generate", NAMES, rows=3, length=12, max_new_tokens=8), Model(NAMES), []
  prompts, lengths = make_prompts(work)
  params = jax.device_get(random_params(model, jnp.float32, make_mesh(parse_mesh("runs:1"), both()[1:])))
  for device in both():
    with jax.default_matmul_precision("highest"), jax.default_device(device):
      said.append(np.asarray(complete(jax.device_put(params, device), prompts, lengths, 0.0, None, model=model,
                                      max_new_tokens=8, eos_ids=()).tokens))
  assert np.mean(said[0] == said[1]) > 0.95  # near-ties may fall differently


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("length", [FUSED_FROM, FUSED_FROM + 13])
def test_cudnn_is_the_einsum(length: int, window: int | None) -> None:
  """Values and gradients, of two runs side by side."""
  q, k, v, ahead = (jax.random.normal(jax.random.key(seed), (2, 2, length, heads, 64)).astype(jnp.bfloat16)
                    for seed, heads in enumerate((8, 4, 4, 8)))
  assert form_of(q[0]) == "cudnn"

  def both_ways(kind: str) -> list:
    def one(*given: jax.Array) -> tuple:
      out, back = jax.vjp(lambda *parts: self_attention(*parts, window, kind=kind), *given[:3])
      return out, *back(given[3])
    return jax.jit(jax.vmap(one))(q, k, v, ahead)
  for ours, theirs in zip(both_ways("einsum"), both_ways("auto"), strict=True):
    np.testing.assert_allclose(np.asarray(theirs, np.float32), np.asarray(ours, np.float32), atol=6e-2)


def test_runs_of_adapters_train_through_cudnn() -> None:
  """One frozen base, and adapters on queries alone: what cuDNN is mapped over is stacked all the same."""
  config, rows = dataclasses.replace(NAMES, max_positions=FUSED_FROM), make_rows(FUSED_FROM)
  mesh, losses, lora = make_mesh(parse_mesh("runs:1"), both()[:1]), [], LoraConfig(4, 8.0, ("q_proj",))
  for kind in ("auto", "einsum"):
    model = Model(config, dtype=jnp.bfloat16, attention=kind, lora_scale=lora.scale)
    shared = random_params(model, jnp.bfloat16, mesh)
    runs = repeat_runs(init_lora(model, lora, jax.random.key(0)), 2, mesh)
    hyper = {"learning_rate": jnp.full(2, 1e-2), "weight_decay": jnp.zeros(2)}
    state = make_begin(relearn_nll, model.axes(), mesh)(runs, hyper)
    step, found = make_step(model, relearn_nll, mesh), []
    for _ in range(5):
      state, log = step(state, {"relearn": shard_rows(rows, mesh)}, hyper, None, Frozen(shared=shared))
      found.append(np.asarray(log.loss))
    losses.append(np.stack(found))
  assert losses[0][-1, 0] < losses[0][0, 0]
  np.testing.assert_allclose(losses[0], losses[1], atol=2e-2)


def make_rows(length: int) -> TokenRows:
  """The same rows for two runs, one of them padded."""
  tokens = np.random.default_rng(0).integers(1, NAMES.vocab_size, (2, 2, length), dtype=np.int32)
  tokens[1] = tokens[0]
  mask = np.broadcast_to(np.arange(length) < np.array([[length], [length // 2]]), tokens.shape).astype(np.float32)
  return host_rows(tokens * (mask > 0), mask * (np.arange(length) > 0))


def test_a_step_takes_the_memory_that_the_plan_says() -> None:
  work = Work("full", "train", shape_config("llama_220m"), rows=8, length=256, counted=255, compute_bytes=2)
  with fresh_cache():
    row = measure_training(work, jnp.bfloat16, make_mesh(parse_mesh("runs:1"), both()[:1]),
                           measure_rates(jnp.bfloat16, 2), 2)
  assert 0.8 < row["memory"]["plan_over_compiler"] < 1.25
  assert row["memory"]["plan_over_peak"] is None or 0.7 < row["memory"]["plan_over_peak"] < 1.25
