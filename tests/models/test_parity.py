"""The decoder against transformers: from committed outputs everywhere, live where torch is installed.

The golden folders are written by make_golden.py.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from relearn_jax.generation import decode
from relearn_jax.metrics.likelihood import token_logprobs
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.decoder import REMAT
from relearn_jax.models.export import export, hf_tensors
from relearn_jax.models.layers import rope_frequencies
from relearn_jax.models.model import Model, Params, flatten
from relearn_jax.objectives.core import TokenRows
from relearn_jax.training.step import model_outputs

from .tiny import GOLDEN

CASES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 1e-4
SHARED = pathlib.Path(os.environ.get("RELEARN_SHARED") or pathlib.Path(__file__).parents[3] / "shared")
REAL = SHARED / "models" / "tofu-mini-full"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs {REAL}; set RELEARN_SHARED to the shared folder")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
  """Accelerators multiply fp32 in fewer bits unless told otherwise."""
  with jax.default_matmul_precision("highest"):
    yield


@dataclasses.dataclass(frozen=True)
class Case:
  """A loaded checkpoint and, for golden ones, what transformers made of it."""

  model: Model
  params: Params
  golden: Any
  folder: pathlib.Path


@functools.cache
def load(folder: pathlib.Path) -> Case:
  checked = check_checkpoint(folder)
  model = Model(checked.config)
  golden = dict(np.load(folder / "golden.npz")) if (folder / "golden.npz").exists() else None
  return Case(model, load_params(checked, model), golden, folder)


@functools.cache
def forward(model: Model):
  """Jitted `tokens -> (hidden, logits)`, compiled once a shape."""
  def run(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(params, tokens)
    return hidden, model.logits(params, hidden)
  return jax.jit(run)


def torch_model(folder: pathlib.Path):
  torch = pytest.importorskip("torch", reason="the live comparison needs torch: pip install -e '.[parity]'")
  from transformers import AutoModelForCausalLM
  return torch, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def worst(ours: Any, theirs: Any, lengths: np.ndarray) -> float:
  """Largest absolute difference over the real tokens."""
  real = np.arange(ours.shape[1]) < lengths[:, None]
  return float(np.abs(np.asarray(ours) - np.asarray(theirs))[real].max())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
  return load(GOLDEN / request.param)


def test_the_cases_cover_what_they_name() -> None:
  assert CASES == ["grouped_query_untied", "llama3_rope", "mistral_window", "multi_head_tied", "phi_partial",
                   "qwen2_bias", "wide_heads"]
  configs = {name: load(GOLDEN / name).model.config for name in CASES}
  assert configs["multi_head_tied"].tie_embeddings and configs["multi_head_tied"].num_kv_heads == 4
  grouped = configs["grouped_query_untied"]
  assert not grouped.tie_embeddings and grouped.num_kv_heads == 2 and grouped.rope_theta == 500000.0
  wide = configs["wide_heads"]
  assert wide.head_dim * wide.num_heads != wide.hidden_size
  llama3 = configs["llama3_rope"]
  assert llama3.rope_scaling is not None
  assert llama3.rope_scaling.original_max_positions < load(GOLDEN / "llama3_rope").golden["lengths"].max()
  plain = rope_frequencies(dataclasses.replace(llama3, rope_scaling=None))
  ratio = plain / rope_frequencies(llama3)
  kept, divided = np.isclose(ratio, 1), np.isclose(ratio, llama3.rope_scaling.factor)
  assert kept.any() and divided.any() and not (kept | divided).all()
  mistral, lengths = configs["mistral_window"], load(GOLDEN / "mistral_window").golden
  assert mistral.architecture == "mistral" and mistral.sliding_window is not None
  assert mistral.sliding_window < min(lengths["lengths"].max(), lengths["prompt_lengths"].max(), 64)
  phi = load(GOLDEN / "phi_partial")
  assert phi.model.config.architecture == "phi" and 2 * (phi.model.config.rotary_dim or 0) == phi.model.config.head_dim
  qwen2 = load(GOLDEN / "qwen2_bias")
  assert qwen2.model.config.architecture == "qwen2" and qwen2.model.config.tie_embeddings
  for case, count in ((phi, 9), (qwen2, 3)):
    biases = [np.asarray(leaf) for path, leaf in flatten(case.params).items() if path.endswith("/bias")]
    assert len(biases) == count and all(np.abs(bias).min() > 0 for bias in biases)
  assert sum(file.stat().st_size for file in GOLDEN.rglob("*.*")) < 4e6


def test_logits(case: Case) -> None:
  _, logits = forward(case.model)(case.params, case.golden["tokens"])
  assert logits.dtype == jnp.float32
  error = worst(logits, case.golden["logits"], case.golden["lengths"])
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE


def test_token_logprobs(case: Case) -> None:
  tokens = case.golden["tokens"]
  hidden, _ = forward(case.model)(case.params, tokens)
  ours = token_logprobs(hidden[:, :-1], case.model.head(case.params), jnp.asarray(tokens[:, 1:]))
  error = worst(ours, case.golden["logprobs"], case.golden["lengths"] - 1)
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE


def loss_gradients(model: Model, params: Params, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
  """Of the mean cross-entropy over the real tokens, by Hugging Face name."""
  mask = (np.arange(tokens.shape[1]) < lengths[:, None]) & (np.arange(tokens.shape[1]) > 0)

  def loss(params: Params) -> jax.Array:
    outputs = model_outputs(model, params, TokenRows(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32)))
    return -jnp.sum(outputs.logprobs * mask) / mask.sum()
  return {name: np.asarray(value()) for name, value in hf_tensors(jax.jit(jax.grad(loss))(params), model)}


def worst_gradient(ours: dict[str, np.ndarray], theirs: Any) -> float:
  """Largest error, relative to the largest entry of its tensor."""
  assert ours.keys() == set(theirs)
  return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ours
             if name not in key_biases(ours))


def key_biases(names: Any) -> set[str]:
  """Tensors whose true gradient is zero: softmax does not see what is added to all keys alike."""
  return {name for name in names if name.endswith("k_proj.bias")}


def test_gradients(case: Case) -> None:
  expected = dict(np.load(case.folder / "gradients.npz"))
  ours = loss_gradients(case.model, case.params, case.golden["tokens"], case.golden["lengths"])
  error = worst_gradient(ours, expected)
  print(f"max relative error {error:.2e}")
  assert error <= 2e-5


@pytest.mark.parametrize("name", ["multi_head_tied", "phi_partial"])
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_computed_again_gives_the_same_gradients(name: str, remat: str) -> None:
  case = load(GOLDEN / name)
  arguments = case.params, case.golden["tokens"], case.golden["lengths"]
  again = loss_gradients(dataclasses.replace(case.model, remat=remat), *arguments)
  for tensor, value in loss_gradients(case.model, *arguments).items():
    np.testing.assert_allclose(again[tensor], value, atol=1e-6 * max(1.0, np.abs(value).max()))


def test_what_is_computed_again_takes_no_memory() -> None:
  config = dataclasses.replace(load(GOLDEN / "multi_head_tied").model.config, num_layers=8)
  sizes = {}
  for remat in REMAT:
    model = Model(config, remat=remat)
    loss = lambda p, tokens, model=model: jnp.sum(model.hidden(p, tokens) ** 2)
    lowered = jax.jit(jax.grad(loss)).lower(model.abstract(), jax.ShapeDtypeStruct((8, 128), jnp.int32))
    sizes[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
  print(sizes)
  assert sizes["full"] < sizes["attn"] < sizes["none"] and sizes["full"] < 0.5 * sizes["none"]
  assert sizes["dots"] < sizes["none"]


def prompts_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
  lengths = case.golden["prompt_lengths"]
  prompts = case.golden["tokens"][:, :lengths.max()]
  return np.where(np.arange(prompts.shape[1]) < lengths[:, None], prompts, 0), lengths


def test_greedy_with_a_cache(case: Case) -> None:
  expected = case.golden["greedy"]
  assert expected.shape[1] == 64 and min(len(set(row)) for row in expected.tolist()) >= 16  # not degenerate

  def run(params: Params, prompts: jax.Array, lengths: jax.Array) -> decode.Generated:
    prompted = decode.prefill(case.model, params, prompts, lengths, 64)
    return decode.decode(case.model, params, prompted, max_new_tokens=64, eos_ids=())
  generated = jax.jit(run)(case.params, *prompts_of(case))
  np.testing.assert_array_equal(generated.tokens, expected)
  assert not generated.finished.any() and (generated.num_tokens == 64).all()


def test_greedy_by_full_forward(case: Case) -> None:
  prompts, lengths = prompts_of(case)
  tokens = np.zeros((len(prompts), prompts.shape[1] + 64), np.int32)
  tokens[:, :prompts.shape[1]] = prompts
  rows = np.arange(len(tokens))
  for step in range(64):
    _, logits = forward(case.model)(case.params, tokens)
    tokens[rows, lengths + step] = np.asarray(logits)[rows, lengths + step - 1].argmax(-1)
  ours = np.stack([row[n:n + 64] for row, n in zip(tokens, lengths, strict=True)])
  np.testing.assert_array_equal(ours, case.golden["greedy"])


def test_prefill_and_extend_agree_with_the_full_forward(case: Case) -> None:
  parts = (4, 4)  # two calls, so that the second attends to what the first wrote
  prompts, lengths = prompts_of(case)
  new = np.random.default_rng(1).integers(4, case.model.config.vocab_size, (len(prompts), sum(parts)))
  whole = np.zeros((len(prompts), prompts.shape[1] + 64), np.int32)  # a width that is compiled already
  whole[:, :prompts.shape[1]] = prompts
  at = lengths[:, None] + np.arange(sum(parts))
  np.put_along_axis(whole, at, new, 1)
  expected, _ = forward(case.model)(case.params, whole)
  prompted = jax.jit(decode.prefill, static_argnums=(0, 4))(case.model, case.params, prompts, lengths, sum(parts))
  extend = jax.jit(decode.extend, static_argnums=0)
  seen, step = [], 0
  for part in parts:
    hidden, cache = extend(case.model, case.params, prompted, new[:, step:step + part], step)
    prompted, step = prompted._replace(cache=cache), step + part
    seen.append(hidden)
  ours = np.concatenate([np.asarray(prompted.last_hidden)[:, None], *seen], 1)
  theirs = np.take_along_axis(np.asarray(expected), np.concatenate([at[:, :1] - 1, at], 1)[..., None], 1)
  assert np.abs(ours - theirs).max() <= TOLERANCE


def test_padding_changes_nothing(case: Case) -> None:
  tokens, lengths = case.golden["tokens"], case.golden["lengths"]
  padded = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, case.model.config.vocab_size - 1)
  ours, theirs = (np.asarray(forward(case.model)(case.params, t)[1])[1, :lengths[1]] for t in (tokens, padded))
  np.testing.assert_array_equal(ours, theirs)


def test_unrolled_layers_agree() -> None:
  case = load(GOLDEN / "grouped_query_untied")  # 3 layers, so that the last iteration is a short one
  unrolled = dataclasses.replace(case.model, unroll=2)
  ours, theirs = (forward(m)(case.params, case.golden["tokens"])[1] for m in (unrolled, case.model))
  assert worst(ours, theirs, case.golden["lengths"]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_live_logits(name: str) -> None:
  case = load(GOLDEN / name)
  torch, reference = torch_model(GOLDEN / name)
  tokens = np.random.default_rng(3).integers(0, case.model.config.vocab_size, case.golden["tokens"].shape, np.int32)
  with torch.no_grad():
    expected = reference(torch.from_numpy(tokens).long()).logits.numpy()
    committed = reference(torch.from_numpy(case.golden["tokens"]).long()).logits.numpy()
  error = worst(forward(case.model)(case.params, tokens)[1], expected, np.full(3, 72))
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE
  assert worst(committed, case.golden["logits"], case.golden["lengths"]) <= TOLERANCE  # the goldens are up to date


def assert_transformers_loads(folder: pathlib.Path, source: pathlib.Path) -> None:
  """The exported folder gives transformers the source's tensors, bit for bit, and nothing unexpected."""
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  from transformers import AutoModelForCausalLM
  loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
  ours, info = loaded
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
  expected = theirs.state_dict()
  assert ours.state_dict().keys() == expected.keys()
  for tensor_name, value in ours.state_dict().items():
    assert value.dtype == expected[tensor_name].dtype and torch.equal(value, expected[tensor_name]), tensor_name
  same = ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id",
          "rms_norm_eps", "layer_norm_eps", "sliding_window")
  assert all(getattr(ours.config, f) == getattr(theirs.config, f) for f in same if hasattr(theirs.config, f))


def stored_dtype(folder: pathlib.Path) -> Any:
  return jnp.dtype(json.loads((folder / "config.json").read_text())["dtype"])


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_exported(tmp_path: pathlib.Path, name: str) -> None:
  case = load(GOLDEN / name)
  export(case.params, case.model, tmp_path / "out", source=GOLDEN / name, dtype=stored_dtype(GOLDEN / name))
  assert_transformers_loads(tmp_path / "out", GOLDEN / name)


@needs_real
def test_real_checkpoint_agrees_live() -> None:
  case = load(REAL)
  torch, reference = torch_model(REAL)
  tokens = np.random.default_rng(4).integers(3, case.model.config.vocab_size, (2, 128), np.int32)
  with torch.no_grad():
    expected = reference(torch.from_numpy(tokens).long()).logits.numpy()
  error = worst(forward(case.model)(case.params, tokens)[1], expected, np.array([128, 128]))
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE


@needs_real
def test_real_checkpoint_round_trip(tmp_path: pathlib.Path) -> None:
  case = load(REAL)
  export(case.params, case.model, tmp_path / "out", source=REAL, dtype=stored_dtype(REAL))
  ours, theirs = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path / "out", REAL))
  assert ours.keys() == theirs.keys() and all(ours[n].tobytes() == theirs[n].tobytes() for n in theirs)
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (REAL / name).read_bytes()
  with contextlib.suppress(ImportError):
    import torch  # noqa: F401
    assert_transformers_loads(tmp_path / "out", REAL)
