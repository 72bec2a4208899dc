"""What only a GPU can show; benchmarks/gpu.sh runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.bench.attention_speed import forms
from relearn_jax.bench.compiling import fresh_cache
from relearn_jax.bench.decode_speed import make_prompts
from relearn_jax.bench.rates import measure_rates
from relearn_jax.bench.shapes import random_params, shape_config
from relearn_jax.bench.train_speed import Training, measure_training
from relearn_jax.generation.prompt_files import complete
from relearn_jax.models.model import Model
from relearn_jax.parallel.mesh import make_mesh, parse_mesh
from relearn_jax.plan.work import Work

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


@pytest.mark.parametrize("name", ["jax.nn, xla", "jax.nn, cudnn"])
def test_forms_of_attention_agree(name: str) -> None:
  q, k, v = (jax.random.normal(jax.random.key(seed), (2, 128, heads, 64)).astype(jnp.bfloat16)
             for seed, heads in enumerate((8, 4, 4)))
  ours, theirs = (np.asarray(forms()[form](q, k, v), np.float32) for form in ("relearn_jax", name))
  np.testing.assert_allclose(theirs, ours, atol=3e-2)


def test_a_step_takes_the_memory_that_the_plan_says() -> None:
  work = Work("full", "train", shape_config("llama_220m"), rows=8, length=256, counted=255, compute_bytes=2)
  with fresh_cache():
    row = measure_training(work, jnp.bfloat16, make_mesh(parse_mesh("runs:1"), both()[:1]),
                           measure_rates(jnp.bfloat16, 2), 2)
  assert 0.8 < row["memory"]["plan_over_compiler"] < 1.25
  assert row["memory"]["plan_over_peak"] is None or 0.7 < row["memory"]["plan_over_peak"] < 1.25
