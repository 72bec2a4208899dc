"""What is not finite ends its run, by name and step, and leaves the others alone."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.audit_config import PretrainSettings
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.cases.names import NamesConfig
from relearn_jax.errors import InputError
from relearn_jax.generation.decode import decode, prefill
from relearn_jax.models.export import export
from relearn_jax.models.model import Model, Params
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh, to_host
from relearn_jax.training.ended import AllEnded, Ended, Ledger, finite_runs, read_ended
from relearn_jax.training.log import TrainLog
from relearn_jax.training.stage import Stage, run_stage

from ..small import MODEL, params
from .test_step import DATA, model_and_params

ROWS = jax.tree.map(lambda leaf: np.repeat(leaf[None], 3, 0), DATA["forget"])
RATES = np.array([1e-3, 1e38, 2e-3], np.float32)  # of runs a, b, c


class Stop(Exception):
  """A kill."""


def run(folder: pathlib.Path, rates: np.ndarray = RATES, keep: tuple[int, ...] = (1, 2, 4, 6), stop: int = 0,
        poison: bool = False, save_every: float = 0) -> dict[int, Params]:
  """What `on_keep` saw at each kept step, of a stage whose runs have these learning rates."""
  model, weights = model_and_params()
  stage = Stage("relearn", ["a", "b", "c"], lambda _: nll("forget"), {"forget": ROWS},
                {"learning_rate": rates, "weight_decay": 0.0}, keep)
  seen: dict[int, Params] = {}

  def on_keep(step: int, params: Params) -> bool:
    if step == stop:
      raise Stop
    seen[step] = to_host(params, 3)
    return False

  def start() -> Params:
    stacked = repeat_runs(weights, 3, runs_mesh())
    bad = lambda leaf: leaf.at[1].set(3e38)  # finite, what comes of it is not
    return jax.tree.map(bad, stacked) if poison else stacked
  run_stage(stage, model, start, runs_mesh(), folder / "relearn", TrainLog(folder / "log.jsonl"), on_keep=on_keep,
            save_every=save_every)
  return seen


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_run_ends_and_the_others_do_not_notice(tmp_path: pathlib.Path) -> None:
  (tmp_path / "plain").mkdir()
  plain, seen = run(tmp_path / "plain", np.array([1e-3, 1e-3, 2e-3], np.float32)), run(tmp_path)
  assert read_ended(tmp_path / "plain" / "relearn") == {}
  ended = read_ended(tmp_path / "relearn")
  assert set(ended) == {"b"} and ended["b"].step == 2 and ended["b"].what in ("loss", "gradient")
  assert str(ended["b"]).startswith("b ended in stage 'relearn' at step 2: ")
  assert set(seen) == set(plain) == {1, 2, 4, 6}
  for step in plain:
    for ours, theirs in zip(jax.tree.leaves(seen[step]), jax.tree.leaves(plain[step]), strict=True):
      np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])
  for row, other in zip(lines(tmp_path), lines(tmp_path / "plain"), strict=True):
    assert row["left_out"] == ([] if row["step"] < 2 else ["b"]) and other["left_out"] == []
    assert [row["losses"][i] for i in (0, 2)] == [other["losses"][i] for i in (0, 2)]
    if row["left_out"]:
      assert row["loss"] == pytest.approx(np.mean([row["losses"][0], row["losses"][2]]), abs=1e-5)


def test_a_stage_that_was_killed_says_the_same(tmp_path: pathlib.Path) -> None:
  for stop, name in ((1, "before"), (4, "after")):  # before and after the step at which the run ends
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(Stop):
      run(folder, stop=stop)
    run(folder)
    assert [row["step"] for row in lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert (one := read_ended(folder / "relearn")["b"]).step == 2 and one.what in ("loss", "gradient")


def test_weights_that_overflow_end_at_the_first_step(tmp_path: pathlib.Path) -> None:
  run(tmp_path, np.array([1e-3, 1e-3, 1e-3], np.float32), keep=(2,), poison=True)
  assert {name: one.step for name, one in read_ended(tmp_path / "relearn").items()} == {"b": 1}


def test_weights_are_looked_at_where_no_loss_has_seen_them(tmp_path: pathlib.Path) -> None:
  run(tmp_path, np.array([1e-3, np.inf, 1e-3], np.float32), keep=(1,))
  assert read_ended(tmp_path / "relearn") == {"b": Ended("b", "relearn", 1, "weights")}


def test_no_run_left_is_an_error_with_a_mend(tmp_path: pathlib.Path) -> None:
  messages = set()
  for stop in (1, 0, 0):  # killed, resumed, and once more
    with pytest.raises((Stop, AllEnded)) as caught:
      run(tmp_path, np.full(3, 1e38, np.float32), stop=stop)
    messages |= {str(caught.value)} - {""}
  message, = messages
  assert message.startswith("`learning_rate` was 1e+38 when a ended in stage 'relearn' at step 2: ")
  assert "and so did 2 other runs: none is left; lower it" in message


def test_a_ledger_counts_what_is_used(tmp_path: pathlib.Path) -> None:
  make = lambda: Ledger(tmp_path, "unlearn", ["a", "b", "c"], "rate", [0.1, 0.2, 0.1], idle=["c"])
  ledger = make()
  ledger.look(3, "weights", {"a": True, "c": False})  # c only keeps its place
  ledger.finish(["a"])
  ledger.look(4, "answers", {"a": False})  # nothing of it is used any more
  assert not ledger.ended and not (tmp_path / "ended.json").exists()
  assert [ledger.has_ended(name, 9) for name in "abc"] == [False, False, True]
  ledger = make()
  ledger.look(5, "loss", {"b": False})
  ledger.look(6, "gradient", {"b": False})
  assert make().ended == ledger.ended == {"b": Ended("b", "unlearn", 5, "loss")}
  assert not ledger.has_ended("b", 4) and ledger.has_ended("b", 5)
  with pytest.raises(AllEnded, match="`rate` was 0.1 to 0.2 when b ended .* and so did another run: none is left"):
    ledger.look(7, "answers", {"a": False})
  ledger = make()
  ledger.rewind(4)
  assert make().ended == {}


def test_runs_are_told_apart() -> None:
  tree = {"x": jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [1.0, 1.0]]), "y": jnp.array([1.0, 1.0, jnp.inf])}
  assert finite_runs(tree).tolist() == [True, False, False]


def test_a_base_that_diverges_is_named(tmp_path: pathlib.Path) -> None:
  config = PretrainSettings(hidden_size=8, num_heads=2, num_kv_heads=2, num_layers=1, steps=4, warmup_steps=0,
                            batch_size=2, learning_rate=1e38)
  with pytest.raises(InputError, match="`arms.pretrain.learning_rate` was 1e.38 when base ended in stage "
                                       "'pretrain' at step 2"):
    cached_base(config, NamesConfig(), tmp_path)
  assert not list((tmp_path / "base").glob("*/model.safetensors"))


def test_decoding_says_where_its_logits_were_not_finite() -> None:
  """The state after the prompt is sound, the embedding of one token that may follow is not."""
  prompt, lengths = jnp.array([[1, 7], [1, 9]]), jnp.array([2, 2])

  def sound(weights: Params) -> list[bool]:
    prompted = prefill(MODEL, weights, prompt, lengths, 3)
    return decode(MODEL, weights, prompted, max_new_tokens=4, eos_ids=()).sound.tolist()
  assert sound(params()) == [True, True]
  head = params()["embed"]["weight"]
  assert sound({**params(), "embed": {"weight": head.at[7].set(1e38)}}) != [True, True]


def test_nothing_is_written_that_is_not_finite(tmp_path: pathlib.Path) -> None:
  bad = {**params(), "final_norm": {"weight": jnp.full_like(params()["final_norm"]["weight"], 3.4e38)}}
  with pytest.raises(InputError, match="`model.norm.weight` would be written with values that are NaN or infinite in "
                                       "bfloat16"):
    export(bad, Model(MODEL.config), tmp_path / "model", dtype=jnp.bfloat16)
  assert not (tmp_path / "model").exists()
