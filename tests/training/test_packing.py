"""Rows that share a sequence: the same losses and gradients, and only where a method does not look at rows."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.data.packing import best_fit, num_packed, pack_rows, packing_line
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import stack_rows
from relearn_jax.errors import InputError
from relearn_jax.objectives.combinators import add, ascend
from relearn_jax.objectives.core import Outputs, TokenRows
from relearn_jax.objectives.losses import kl_to_reference, nll
from relearn_jax.objectives.methods import METHODS
from relearn_jax.objectives.recipe import default_recipe
from relearn_jax.training import unlearn_rows
from relearn_jax.training.job import UnlearnJob, check_job
from relearn_jax.training.step import model_outputs, split_rows
from relearn_jax.training.unlearn import unlearn

from ..objectives import golden
from ..small import CONFIG, MODEL, params, write_checkpoint, write_lines

# Methods that look at whole rows, and the sets that may be packed all the same.
BY_ROW = {"npo": set(), "npo_gd": {"retain"}, "npo_kl": {"retain"}, "simnpo": {"retain"}, "idk_dpo": {"retain"},
          "altpo": {"retain"}, "ceu": set()}


def make_rows(seed: int, lengths: tuple[int, ...]) -> list[Encoded]:
  """Random rows, of which the first has no prompt, and each of the others a longer one."""
  rng = np.random.default_rng(seed)
  return [Encoded(rng.integers(4, CONFIG.vocab_size, length).tolist(), 1 + i) for i, length in enumerate(lengths)]


def one_run(rows: TokenRows) -> TokenRows:
  return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows)


def test_packed_rows_by_hand() -> None:
  rows = [Encoded([11, 12], 1), Encoded([21, 22, 23, 24, 25], 3), Encoded([31, 32, 33], 1, [31, -1, 39])]
  packed = pack_rows(rows, 2)
  assert packed.tokens.shape == (2, 2, 5) and packed.labels is not None and packed.segments is not None
  for found, wanted in ((packed.tokens, [[21, 22, 23, 24, 25], [31, 32, 33, 11, 12]]),
                        (packed.mask, [[0, 0, 0, 1, 1], [0, 0, 1, 0, 1]]),
                        (packed.labels, [[21, 22, 23, 24, 25], [31, 0, 39, 11, 12]]),
                        (packed.segments, [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2]])):
    np.testing.assert_array_equal(found, [wanted, wanted])
  np.testing.assert_array_equal(packed.positions, [[[3, 4], [2, 4]]] * 2)
  assert num_packed(packed) == 3
  assert packing_line("retain", packed) == (
      "retain: packed 3 rows in 2 sequences of 5 tokens, 0.67 -> 1.00 real tokens per padded")
  alone = pack_rows(rows[1:], 1)
  assert alone.segments is None and alone.tokens.shape == (1, 2, 5)  # no two fit into one sequence


def test_every_row_is_in_one_sequence_that_has_room() -> None:
  lengths = np.random.default_rng(0).integers(2, 65, 300).tolist()
  sequences = best_fit(lengths, 64)
  assert sorted(row for some in sequences for row in some) == list(range(300))
  assert max(sum(lengths[row] for row in some) for some in sequences) <= 64
  assert len(sequences) <= 11 / 9 * -(-sum(lengths) // 64) + 4


def test_losses_and_gradients_are_those_of_rows_apart() -> None:
  """To 2e-5 in fp32, with reference statistics of packed rows; a row alone, and one that fills its sequence, too."""
  data = {"forget": make_rows(0, (13, 4, 9, 5, 6)), "retain": make_rows(1, (12, 5, 7))}
  objective = add(ascend(nll("forget")), kl_to_reference("retain"))
  frozen = jax.tree.map(lambda leaf: leaf * 1.05, params())

  @jax.jit
  def run(at: Any, batch: dict[str, TokenRows]) -> Any:
    def loss(at: Any) -> Any:
      held = {name: rows._replace(reference=dict(zip(("hidden", "head"), model_outputs(MODEL, frozen, rows)[1:3],
                                                     strict=True))) for name, rows in batch.items()}
      return objective.value(lambda at, rows: model_outputs(MODEL, at, rows), at, held, objective.init(at))
    return jax.value_and_grad(loss, has_aux=True)(at)
  (_, apart), grads_apart = run(params(), {name: one_run(stack_rows(rows, 1)) for name, rows in data.items()})
  packed = {name: one_run(pack_rows(rows, 1)) for name, rows in data.items()}
  assert [len(rows.tokens) for rows in packed.values()] == [3, 2]
  (_, together), grads_together = run(params(), packed)
  assert all(float(together[name]) == pytest.approx(float(apart[name]), abs=2e-5) for name in apart)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads_apart))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), grads_together, grads_apart)
  parts = split_rows(jax.tree.map(lambda leaf: leaf[:2], packed), 2)  # micro-batches
  np.testing.assert_array_equal(parts["forget"].segments[1, 0], packed["forget"].segments[1])


def test_methods_pack_what_they_do_not_look_at_row_by_row() -> None:
  """The loss of the two rows of each set as one sequence is that of the rows apart, if and only if a method says so."""
  apart = golden.batch()
  join = lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:])

  def pack(rows: TokenRows) -> TokenRows:
    reference = {kind: x if kind in ("name", "head") else join(jnp.asarray(x)) for kind, x in rows.reference.items()}
    return TokenRows(join(rows.tokens), join(rows.mask), reference)

  def forward(params: Any, rows: TokenRows) -> Outputs:
    logits = params[golden.plain(rows.reference["name"])].reshape(*rows.tokens.shape, golden.V)
    return golden.outputs(logits, rows.tokens if rows.labels is None else rows.labels)

  def losses(objective: Any, packed: set[str]) -> float:
    batch = {name: pack(rows) if name in packed else rows for name, rows in apart.items()}
    return float(objective.value(forward, golden.PARAMS, batch, objective.init(golden.PARAMS))[0])
  for method in METHODS:
    objective = default_recipe(method).objective
    assert objective.packs == BY_ROW.get(method, objective.rows), method
    plain = losses(objective, set())
    assert losses(objective, set(objective.packs)) == pytest.approx(plain, rel=1e-5), method
    if (rest := objective.rows - objective.packs) and method != "simnpo":  # which differs here too, by 3e-6
      assert losses(objective, set(rest)) != pytest.approx(plain, rel=1e-4), method


def test_a_method_that_compares_rows_does_not_pack() -> None:
  job = UnlearnJob(model="m", forget="f.jsonl", retain="r.jsonl", method="npo", pack=True)
  with pytest.raises(InputError, match="`pack` is True; expected False: method 'npo' looks at rows one by one"):
    check_job(job, "here")
  check_job(dataclasses.replace(job, method="npo_gd", defence="sam"), "here")
  with pytest.raises(InputError, match="`attention` is 'flash'; expected auto or einsum"):
    check_job(dataclasses.replace(job, pack=False, attention="flash"), "here")


def test_prepared_rows_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
  job: Any = UnlearnJob(model="m", forget="prepared:rows", retain="r.jsonl", method="gd", pack=True)
  held: Any = None
  monkeypatch.setattr(unlearn_rows, "open_prepared", lambda job: {"forget": held})
  with pytest.raises(InputError, match="prepared:rows: `forget` is prepared, and rows that are prepared stay apart"):
    unlearn_rows.read_rows(job, held, None)


@pytest.mark.slow
def test_a_packed_job_is_the_job(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
  """Steps that see all rows are the same steps; smaller ones see sequences, each once an epoch."""
  write_checkpoint(tmp_path / "base")
  names = ["James", "Robert", "John", "Michael", "David", "William", "Joseph", "Thomas"]
  write_lines(tmp_path / "forget.jsonl", [{"text": " ".join(names[i:])} for i in range(6)])
  write_lines(tmp_path / "retain.jsonl", [{"prompt": name, "answer": f" {names[0]}"} for name in names]
              + [{"text": " ".join(names)}])
  base = UnlearnJob(model=str(tmp_path / "base"), forget=str(tmp_path / "forget.jsonl"), steps=3, learning_rate=1e-3,
                    retain=str(tmp_path / "retain.jsonl"), method="kl")
  logs = {}
  for name, changes in {"apart": {}, "packed": {"pack": True}, "small": {"pack": True, "batch_size": 3}}.items():
    assert unlearn(dataclasses.replace(base, **changes), "here", tmp_path / name)  # type: ignore[arg-type]
    logs[name] = [json.loads(line) for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()]
  assert "retain: packed 9 rows in 5 sequences of 9 tokens" in capsys.readouterr().out
  for apart, packed in zip(logs["apart"], logs["packed"], strict=True):
    assert packed["losses"] == pytest.approx(apart["losses"], abs=1e-5) and packed["tokens"] == apart["tokens"]
    assert packed["terms"] == pytest.approx(apart["terms"], abs=1e-5)
    assert packed["padded_tokens"] < 0.7 * apart["padded_tokens"]
  assert all(row["padded_tokens"] == 2 * 9 + 2 * 9 for row in logs["small"])
