"""What stands before every prompt is read once: rows get what they get when it is read with each of them."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.batches import bucketize
from relearn_jax.data.chat import ChatSettings
from relearn_jax.errors import InputError
from relearn_jax.generation import prompt_files, slots
from relearn_jax.generation.decode import prefill, prefill_after
from relearn_jax.generation.prefix import LEAST, bucketize_after, read_prefix, shared_ids
from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.generation.prompts import read_prefix_text
from relearn_jax.models.model import Model, split_layers
from relearn_jax.parallel.mesh import make_mesh, use_mesh

from ..small import CONFIG, MODEL, params, write_lines
from .small import make_tokenizer, read_rows, write_checkpoint

rng = np.random.default_rng(0)
PREFIX = [1, *rng.integers(4, CONFIG.vocab_size, LEAST + 2).tolist()]
PROMPTS = [rng.integers(4, CONFIG.vocab_size, size).tolist() for size in (3, 9, 1, 16, 5)]
TEXT = " ".join(f"w{i}" for i in range(LEAST + 3)) + " "
ROWS = [{"id": i, "prompt": text} for i, text in enumerate(("w7 w8 w9", "w1", "w5 w5", ""))]
SLOW = pytest.mark.slow
TEMPLATE = ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} w3 {% endfor %}"
            "{% if add_generation_prompt %}w4{% endif %}")


@pytest.mark.parametrize("window", [pytest.param(None, marks=SLOW), pytest.param(5, marks=SLOW), 40])
def test_a_row_reads_on_where_the_prefix_ends(window: int | None) -> None:
  """States and keys of prefix and prompts together, to 1e-5; and of a row to the bit what it is beside others."""
  model, weights = Model(dataclasses.replace(CONFIG, sliding_window=window)), split_layers(params())
  prefix = read_prefix(weights, np.array(PREFIX, np.int32), model=model)
  read = jax.jit(lambda tokens, lengths: prefill_after(
      model, weights, jax.tree.map(lambda leaf: jnp.repeat(leaf, len(tokens), 0), prefix), tokens, lengths))
  (rows,), (joined,) = bucketize(PROMPTS, buckets=(16,)), bucketize([PREFIX + own for own in PROMPTS], buckets=(64,))
  got = read(rows.tokens, rows.lengths)
  expected = jax.jit(lambda *given: prefill(model, weights, *given, 1))(joined.tokens, joined.lengths)
  np.testing.assert_array_equal(got.lengths, expected.lengths)
  np.testing.assert_allclose(got.last_hidden, expected.last_hidden, atol=1e-5)
  for mine, theirs in zip(got.cache, expected.cache, strict=True):
    keys = theirs.prompt_k[3, :, len(PREFIX):len(PREFIX) + 16]
    np.testing.assert_allclose(mine.new_k[3], keys, atol=1e-4, rtol=1e-4)
  turned = read(np.roll(rows.tokens, 1, 0), np.roll(rows.lengths, 1))
  np.testing.assert_array_equal(np.roll(got.last_hidden, 1, 0), turned.last_hidden)


def completed(batch_size: int, prefix: Any = None, keys: Any = None) -> dict[tuple[int, int], list[int]]:
  """New tokens of each sample of each row."""
  (rows,) = bucketize(PROMPTS if prefix else [PREFIX + own for own in PROMPTS], buckets=(16 if prefix else 64,))
  return {(done.row, done.sample): done.tokens for done in slots.complete_rows(
      split_layers(params()), rows, keys, 1.0, model=MODEL, batch_size=batch_size, max_new_tokens=8,
      eos_ids=tuple(range(0, CONFIG.vocab_size, 9)), prefix=prefix)}


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("samples", [0, 2])
def test_rows_take_turns_behind_a_prefix(samples: int) -> None:
  """Sampled ones too, in slots of two sizes, and over two devices."""
  keys = jax.random.split(jax.random.key(3), (len(PROMPTS), samples)) if samples else None
  read = lambda: read_prefix(split_layers(params()), np.array(PREFIX, np.int32), model=MODEL)
  expected = completed(4, keys=keys)
  assert len({len(tokens) for tokens in expected.values()}) > 2  # they end at different steps, or nothing is shown
  assert completed(4, read(), keys) == expected
  if samples:
    assert completed(2, read(), keys) == expected
  else:
    with use_mesh(make_mesh({"runs": 1, "data": 2, "fsdp": 1, "tensor": 1}, config=CONFIG)):
      assert completed(4, read()) == expected


def test_what_is_shared_depends_on_what_is_declared() -> None:
  """Of a tokenizer that joins pairs of letters, the last one's fellow is not known."""
  def pairs(text: str) -> list[int]:
    if "1" in text:
      raise InputError("has no token", mend="")
    return [sum(map(ord, text[i:i + 2])) for i in range(0, len(text), 2)]
  even, odd = "xy" * LEAST, "xy" * LEAST + "z"
  assert shared_ids(lambda text: pairs(even + text)) == pairs(even) == shared_ids(lambda text: pairs(odd + text))
  assert shared_ids(lambda text: pairs(even[2:] + text)) == []  # too few
  shared = pairs(even)
  batches = list(bucketize_after([shared + [5], shared, shared[1:] + [5], shared + [6, 7]], shared))
  assert [(batch.indices.tolist(), begins) for batch, begins in batches] == [([0, 3], True), ([1, 2], False)]
  assert batches[0][0].tokens[1, :3].tolist() == [6, 7, 0]
  assert [begins for _, begins in bucketize_after([[1], [2, 3]], [])] == [False]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
  tokenizer = make_tokenizer()
  tokenizer.chat_template = TEMPLATE
  return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", tokenizer))


@pytest.mark.parametrize("system", ["", pytest.param(TEXT, marks=SLOW)])
def test_a_file_of_prompts_behind_a_prefix(system: str, checkpoint: str, tmp_path: pathlib.Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
  """A text, or a system's turn of a chat template: completions of prompts that it is written into, or read whole."""
  reads = []
  monkeypatch.setattr(prompt_files, "read_prefix", lambda *args, **more: reads.append(args[1].tolist()) or read_prefix(
      *args, **more))

  def generate(rows: list[dict], size: int = 4, **more: Any) -> list[dict]:
    prompts = write_lines(tmp_path / "prompts.jsonl", rows)
    generate_file(checkpoint, prompts, tmp_path / "out.jsonl", max_new_tokens=6, batch_size=size,
                  chat=ChatSettings(system=system) if system else None, **more)
    return read_rows(tmp_path / "out.jsonl")
  rows = ROWS if system else ROWS[:3]  # the last has no token of its own behind a text, and would be read whole
  got = generate(rows, **({} if system else {"prefix": TEXT}))
  assert [row["prompt"] for row in got] == [row["prompt"] for row in rows]
  assert len(reads) == 1 and len(reads[0]) >= LEAST
  monkeypatch.setattr(prompt_files, "shared_ids", lambda encode: [])
  whole = generate([row | {"prompt": ("" if system else TEXT) + row["prompt"]} for row in rows])
  assert len(reads) == 1 and [row["token_ids"] for row in got] == [row["token_ids"] for row in whole]
  assert [row["completion"] for row in got] == [row["completion"] for row in whole]


def test_a_prefix_is_a_text_with_something_in_it(tmp_path: pathlib.Path) -> None:
  (tmp_path / "prefix.txt").write_bytes(b"Q: a\r\n\n")
  assert read_prefix_text(tmp_path / "prefix.txt") == "Q: a\r\n\n"
  for content, problem in ((b"", "is empty"), (b"\xff", "cannot be read")):
    (tmp_path / "prefix.txt").write_bytes(content)
    with pytest.raises(InputError, match=problem):
      read_prefix_text(tmp_path / "prefix.txt")
