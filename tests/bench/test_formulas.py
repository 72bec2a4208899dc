"""What the figures mean, by hand."""

import dataclasses

import pytest

from relearn_jax.audit.audit_config import PretrainSettings
from relearn_jax.audit.pretrained import model_config
from relearn_jax.bench.formulas import bandwidth_share, compute_share, decode_bytes, mfu, model_flops
from relearn_jax.bench.shapes import SHAPES, shape_config
from relearn_jax.bench.timing import in_turns, ratio, spread
from relearn_jax.bench.train_speed import make_batch, train_works
from relearn_jax.plan.work import Work, count, leaves

from .. import small

TINY = shape_config("tiny")
# Two layers of width 16: queries, keys, values, output, and three products of the MLP; and the tied head.
PRODUCTS = 2 * (4 * 16 * 16 + 3 * 16 * 32)
HEAD = 162 * 16


def test_mfu_of_training_all_parameters() -> None:
  """6 FLOPs a parameter and token, and 12 L N H S of attention, of which a token sees half of the row."""
  work = Work("t", "train", TINY, runs=3, rows=4, length=20)
  by_hand = 6 * (PRODUCTS + HEAD) + 12 * 2 * 16 * 10
  assert model_flops(work) == 3 * 4 * 20 * by_hand
  assert mfu(work, 0.5, 1e9) == pytest.approx(240 * by_hand / 0.5e9)


def test_mfu_of_an_adapter() -> None:
  """4 a frozen parameter, 6 a trained one: of rank 2 on every product of a layer."""
  adapter = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
  work = Work("t", "train", TINY, rows=4, length=20, adapter="lora", lora_rank=2, shared=True)
  assert model_flops(work) == 80 * (4 * (PRODUCTS + HEAD) + 6 * adapter + 12 * 2 * 16 * 10)


def test_what_remat_computes_again_is_work_but_not_the_models() -> None:
  plain = Work("t", "train", TINY, rows=4, length=20)
  again = dataclasses.replace(plain, remat="full")
  assert mfu(again, 1.0, 1e9) == mfu(plain, 1.0, 1e9) == compute_share(plain, {}, 1.0, 1e9)
  assert compute_share(again, {}, 1.0, 1e9) > mfu(again, 1.0, 1e9)


def test_bytes_of_a_decoding_step() -> None:
  """All weights once (with the tied head), and keys and values of 10 + 6 slots of 3 rows, 2 c L K H each."""
  work = Work("d", "generate", TINY, rows=3, length=10, counted=1, max_new_tokens=6, param_dtype=2, compute_bytes=2)
  by_hand = 2 * (PRODUCTS + HEAD + 5 * 16) + 3 * 16 * (2 * 2 * 2 * 16)
  assert decode_bytes(work, {}) == by_hand
  assert bandwidth_share(work, {}, 1, 0.01, 1e6) == pytest.approx(by_hand / 1e4)
  untied = dataclasses.replace(TINY, tie_embeddings=False)  # of the embedding a token reads a row
  assert decode_bytes(dataclasses.replace(work, config=untied), {}) == by_hand


def test_shapes() -> None:
  assert shape_config("names") == model_config(PretrainSettings(), small.make_tokenizer())
  sizes = {name: count(leaves(shape_config(name))) for name in SHAPES}
  assert sizes["tiny"] == PRODUCTS + HEAD + 5 * 16 and sizes["small"] == 8_425_728
  assert sizes["llama_2_7b"] == 6_738_415_616 and sizes["phi_1_5"] == 1_418_270_720


def test_rows_are_ragged_and_their_tokens_are_counted() -> None:
  batch = make_batch(Work("t", "train", TINY, runs=2, rows=5, length=12))
  assert batch.rows.tokens.shape == (2, 5, 12) and batch.padded == 120
  lengths = (batch.rows.tokens != 0).sum(-1)
  assert (lengths[:, 0] == 12).all() and (lengths >= 6).all() and lengths.sum() == batch.real < 120
  assert (batch.rows.mask.sum(-1) == lengths - 1).all()  # a row's first token is not predicted


def test_works_of_training() -> None:
  works = train_works(Work("", "train", TINY, compute_bytes=2), ("full", "lora"), ("none", "full"), (1, 4))
  assert [work.name for work in works] == [
      "full", "full x 4", "full, remat full", "full x 4, remat full",
      "lora", "lora x 4", "lora, remat full", "lora x 4, remat full"]
  assert all(work.param_dtype == (2 if work.adapter == "lora" else 4) for work in works)


def test_calls_take_turns() -> None:
  order: list[str] = []
  took = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
  assert order == ["a", "b"] * 4 and [len(one) for one in took.values()] == [3, 3]


def test_ratios_are_of_pairs() -> None:
  """The machine was half as fast in the second pair: neither side's own range says so."""
  assert ratio([1.0, 2.0, 1.0], [2.0, 4.0, 2.5]) == (0.5, 0.4, 0.5, 3)
  assert spread([4.0, 1.0, 2.0]).map(lambda seconds: 8 / seconds) == (4.0, 2.0, 8.0, 3)
