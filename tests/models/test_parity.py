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
from relearn_jax.models.export import export
from relearn_jax.models.layers import rope_frequencies
from relearn_jax.models.model import Model, Params

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


@functools.cache
def load(folder: pathlib.Path) -> Case:
  checked = check_checkpoint(folder)
  model = Model(checked.config)
  golden = dict(np.load(folder / "golden.npz")) if (folder / "golden.npz").exists() else None
  return Case(model, load_params(checked, model), golden)


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
  assert CASES == ["grouped_query_untied", "llama3_rope", "multi_head_tied", "wide_heads"]
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
  assert sum(file.stat().st_size for file in GOLDEN.rglob("*.*")) < 1.5e6


def test_logits(case: Case) -> None:
  _, logits = forward(case.model)(case.params, case.golden["tokens"])
  assert logits.dtype == jnp.float32
  error = worst(logits, case.golden["logits"], case.golden["lengths"])
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE


def test_token_logprobs(case: Case) -> None:
  tokens = case.golden["tokens"]
  hidden, _ = forward(case.model)(case.params, tokens)
  ours = token_logprobs(hidden[:, :-1], case.model.head(case.params), tokens[:, 1:])
  error = worst(ours, case.golden["logprobs"], case.golden["lengths"] - 1)
  print(f"max error {error:.2e}")
  assert error <= TOLERANCE


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
  same = ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id", "rms_norm_eps")
  assert all(getattr(ours.config, f) == getattr(theirs.config, f) for f in same)


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
