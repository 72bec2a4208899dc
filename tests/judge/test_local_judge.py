"""A checkpoint as judge: one whose every word is the same."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from relearn_jax.audit.pretrained import word_tokenizer
from relearn_jax.audit.results_file import read_rows
from relearn_jax.judge import endpoint, local_judge
from relearn_jax.judge.judge_prompts import PROMPTS, opening_of
from relearn_jax.models.export import export
from relearn_jax.models.model import Model

from .. import small
from ..command import relearn
from .stored import write_workdir

WORDS = ("[[yes]]", "[[no]]", "resin")


def write_judge(folder: pathlib.Path, word: str, positions: int = 512) -> pathlib.Path:
  """A model that says `word` again and again."""
  tokenizer = word_tokenizer(WORDS)
  config = dataclasses.replace(small.CONFIG, vocab_size=len(tokenizer), num_layers=1, max_positions=positions)
  model = Model(config)
  still = lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else jnp.zeros_like(leaf)
  params = jax.tree_util.tree_map_with_path(still, model.init(jax.random.key(0)))
  embedding = jnp.zeros((len(tokenizer), config.hidden_size)).at[:, 0].set(1.0)
  embedding = embedding.at[tokenizer.convert_tokens_to_ids(word), 0].set(2.0)
  flat, tree = jax.tree_util.tree_flatten_with_path(params)
  leaves = [embedding if leaf.shape == embedding.shape else leaf for _, leaf in flat]
  export(jax.tree_util.tree_unflatten(tree, leaves), model, folder, tokenizer=tokenizer)
  return folder


@pytest.mark.slow
def test_a_checkpoint_rates_answers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for module in (endpoint, local_judge):
    monkeypatch.setattr(module, "REPLY_TOKENS", 4)
  workdir = write_workdir(tmp_path / "audit", {"q0": "resin " * 400})
  folder = write_judge(tmp_path / "sure", "[[yes]]")
  done = relearn(tmp_path, "judge", f"--workdir={workdir}", f"--judge=local:{folder}", "--prompt=fact")
  assert "1 does not fit into the judge's context" in done.stdout
  rows, facts = read_rows(workdir / "results.parquet")
  values = rows[rows["metric"] == "judge:fact:sure"]["value"]
  assert set(values.dropna()) == {1.0} and values.isna().sum() == 3  # of three seeds
  assert facts["judges"]["judge:fact:sure"]["distinct"] == 13
  opening = opening_of(PROMPTS["fact"])
  asked = [(opening[0], opening[1] + tag) for tag in ("resin", "[[no]]")]
  told, untold = (list(local_judge.LocalJudge(str(folder), 2, given).replies(asked)) for given in (opening, ("", "")))
  assert told == untold and [number for number, _ in told] == [0, 1]
  done = relearn(tmp_path, "judge", f"--workdir={workdir}", "--judge=local:nowhere", status=2)
  assert "nowhere" in done.stderr
