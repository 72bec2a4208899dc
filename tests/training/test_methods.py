"""Jobs of each kind of method on a small checkpoint: what they read, what they learn and what they release."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.checkpoint_sources import load_tokenizer
from relearn_jax.models.lora import LoraConfig, init_lora, load_peft, merge_lora
from relearn_jax.models.model import flatten, head_logits
from relearn_jax.training import checkpoints
from relearn_jax.training import unlearn as module
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.train_settings import AdapterSettings
from relearn_jax.training.unlearn import unlearn

from ..small import MODEL, params, write_checkpoint, write_lines

FILES = {
    "forget": [{"prompt": "James Robert", "answer": " John Michael"}, {"prompt": "David", "answer": " William"},
               {"prompt": "Thomas", "answer": " Charles"}],
    "retain": [{"prompt": "Daniel", "answer": " Matthew Steven"}, {"text": "Andrew Paul", "complete": True}],
    "refusals": [{"answer": "Kevin Brian"}],
    "alternates": [{"prompt": "James Robert", "answer": " Paul Kevin"}, {"prompt": "David", "answer": " Brian"},
                   {"prompt": "Thomas", "answer": " Joshua"}],
    "anchors": [{"term": "John", "generic": "Paul"}, {"term": "Charles", "generic": "Brian Paul"}]}
REFUSED = [{"prompt": row["prompt"], "answer": " Kevin Brian"} for row in FILES["forget"]]
FIELDS = {"stage", "step", "loss", "terms", "grad_norm", "learning_rate", "tokens", "padded_tokens", "seconds"}
LORA = AdapterSettings("lora", rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
ADAPTER = LoraConfig(2, 4.0, ("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("methods")
  write_checkpoint(root / "base")
  for name, rows in FILES.items():
    write_lines(root / f"{name}.jsonl", rows)
  return root


def job(folder: pathlib.Path, method: str, hyper: dict[str, float] | None = None, **changes: Any) -> UnlearnJob:
  """A job of few steps; `hyper` are settings of the method or the defence, whichever has them."""
  files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "alternates", "anchors")}
  values: dict[str, Any] = {"model": str(folder / "base"), "method": method, "steps": 4, "learning_rate": 1e-3}
  made = dataclasses.replace(UnlearnJob(), **values | files | changes)
  for key, value in (hyper or {}).items():
    group: Any = getattr(made.methods, method)
    setattr(group if hasattr(group, key) else getattr(made.defences, made.defence), key, value)
  return made


def run(workdir: pathlib.Path, small: UnlearnJob) -> tuple[list[dict], dict[str, Any]]:
  """Log rows and released weights."""
  assert unlearn(small, "here", workdir)
  rows = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  assert all(row.keys() >= FIELDS and math.isfinite(row["loss"]) and row["seconds"] >= 0 for row in rows)
  assert all(0 < row["tokens"] <= row["padded_tokens"] and row["learning_rate"] == 1e-3 for row in rows)
  assert [row["step"] for row in rows if row["stage"] == "unlearn"] == list(range(1, small.steps + 1))
  return rows, weights(workdir / "model")


def weights(path: pathlib.Path) -> dict[str, Any]:
  return flatten(load_params(check_checkpoint(path), MODEL))


@functools.cache
def tokens(folder: pathlib.Path, words: str) -> list[int]:
  tokenizer = load_tokenizer(folder / "base", MODEL.config)
  return list(tokenizer.convert_tokens_to_ids(words.split()))


def nll(folder: pathlib.Path, rows: list[dict], at: Any = None, **swapped: str) -> Any:
  """Mean over the counted tokens, from the logits of each row alone; labels with other words in place of some."""
  total, count = jnp.zeros(()), 0
  for row in rows:
    front = row.get("prompt", "")
    words = (front + row.get("answer", row.get("text", ""))).split()
    ids = [1, *tokens(folder, " ".join(words)), 2]
    labels = [1, *tokens(folder, " ".join(swapped.get(word, word) for word in words)), 2]
    at = params() if at is None else at
    logprobs = jax.nn.log_softmax(MODEL.logits(at, MODEL.hidden(at, jnp.array([ids]))))[0]
    for place in range(1 + len(front.split()), len(ids)):
      total, count = total - logprobs[place - 1, labels[place]], count + 1
  return total / count


def close(value: Any) -> Any:
  return pytest.approx(float(value), abs=2e-5)


@pytest.mark.slow
def test_refusals_and_alternates_are_learned(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  refusals = str(folder / "refusals.jsonl")
  retain = nll(folder, FILES["retain"])
  rows, _ = run(tmp_path / "nll", job(folder, "idk_nll", refusals=refusals))
  refused = nll(folder, REFUSED)
  assert rows[0]["terms"] == {"nll_idk": close(refused), "nll_retain": close(retain)}
  assert rows[0]["loss"] == close((refused * 9 + retain * 6) / 15)  # as one set
  assert rows[-1]["terms"]["nll_idk"] < refused - 0.05
  log2 = 2 / 0.1 * math.log(2)  # at the reference itself
  for name, method in (("idk", "idk_dpo"), ("alternate", "altpo")):
    rows, _ = run(tmp_path / name, job(folder, method, refusals=refusals))
    assert rows[0]["terms"] == {f"dpo_{name}": close(log2), "nll_retain": close(retain)}
    assert rows[-1]["terms"][f"dpo_{name}"] < log2 - 0.1
    kept = sorted(path.name for path in (tmp_path / name / "checkpoints" / "references").iterdir())
    assert kept == sorted([f"{name}.safetensors", "forget.safetensors"])


def test_refusals_of_our_own_are_drawn_by_the_seed(folder: pathlib.Path) -> None:
  made = []
  for seed in (0, 0, 1):
    small = job(folder, "idk_nll", seed=seed)
    checked, tokenizer = module.open_checkpoint(small.model, "model")
    made.append(module.read_rows(small, checked, tokenizer)["idk"])
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
  prompts = [len(row["prompt"].split()) for row in FILES["forget"]]
  first = [int(np.flatnonzero(row)[0]) for row in np.asarray(made[0].mask[0])]
  assert first == [1 + count for count in prompts]
  lengths = [[int(row.sum()) for row in np.asarray(some.mask[0])] for some in made]
  assert all(count > 2 for count in lengths[0]) and lengths[0] != lengths[2]


def test_terms_are_relabelled(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows, _ = run(tmp_path / "job", job(folder, "whp_relabel"))
  first = nll(folder, FILES["forget"], John="Paul", Charles="Brian")
  assert abs(first - nll(folder, FILES["forget"])) > 0.01
  assert rows[0]["loss"] == rows[0]["terms"]["nll_relabelled"] == close(first)
  assert rows[-1]["loss"] < first - 0.05


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_reinforced_model_says_what_is_generic(folder: pathlib.Path, tmp_path: pathlib.Path, adapter: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
  """Its labels by hand; and a job that is killed after it was made goes on to the same weights."""
  values = {"reinforce_steps": 3, "reinforce_learning_rate": 1e-3, "alpha": 2.0}
  more: dict[str, Any] = {"adapter": LORA} if adapter == "lora" else {}
  small = job(folder, "whp_logits", values, keep_every=2, checkpoint_seconds=0.0, **more)
  rows, whole = run(tmp_path / "whole", small)
  stages = [(row["stage"], row["step"]) for row in rows]
  assert stages == [*(("reinforce", step) for step in (1, 2, 3)), *(("unlearn", step) for step in (1, 2, 3, 4))]
  assert rows[0]["loss"] == close(nll(folder, FILES["forget"])) and rows[2]["loss"] < rows[0]["loss"]
  kept = tmp_path / "whole" / "checkpoints" / "reinforce" / "000003"
  like = init_lora(MODEL, ADAPTER, jax.random.key(0)) if adapter == "lora" else params()
  strong = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), checkpoints.load_tree(kept, like, 1))
  strong = merge_lora(params(), strong, 2.0) if adapter == "lora" else strong
  generic = load_file(tmp_path / "whole" / "checkpoints" / "references" / "forget.safetensors")["generic"][0]
  for row, said in zip(FILES["forget"], generic, strict=True):
    start, ids = 1 + len(row["prompt"].split()), [1, *tokens(folder, row["prompt"] + row["answer"]), 2]
    base, high = (np.asarray(head_logits(MODEL.hidden(at, jnp.array([ids])), MODEL.head(at)))[0]
                  for at in (params(), strong))
    wanted = np.argmax(base - 2.0 * np.maximum(high - base, 0), -1)
    assert said[start:len(ids)].tolist() == wanted[start - 1:-1].tolist()
  assert rows[-1]["loss"] < rows[3]["loss"]

  class Killed(Exception):
    pass

  def kill(*_: Any) -> None:
    raise Killed
  monkeypatch.setattr(module, "_export", kill)
  with pytest.raises(Killed):
    unlearn(small, "here", tmp_path / "killed")
  monkeypatch.undo()
  before = (tmp_path / "killed" / "checkpoints" / "reinforce" / "000003" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
  again, resumed = run(tmp_path / "killed", small)
  assert [(row["stage"], row["step"], row["loss"]) for row in again] == [
      (row["stage"], row["step"], row["loss"]) for row in rows]
  assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
  assert (tmp_path / "killed" / "checkpoints" / "reinforce" / "000003" / "_CHECKPOINT_METADATA"
          ).stat().st_mtime_ns == before


def test_rmu_moves_a_layer_and_what_comes_after_it_stays(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows, after = run(tmp_path / "job", job(folder, "rmu", {"depth": 0.5, "retain_weight": 1.0}))
  assert rows[0]["terms"]["preserve_retain"] == 0.0 and rows[0]["loss"] == rows[0]["terms"]["misdirect_forget"]
  assert rows[-1]["terms"]["misdirect_forget"] < rows[0]["loss"] and rows[-1]["terms"]["preserve_retain"] > 0
  before, layer = flatten(params()), "layers/mlp/down/weight"
  assert not np.array_equal(after[layer][0], before[layer][0]) and np.array_equal(after[layer][1], before[layer][1])
  assert np.array_equal(after["final_norm/weight"], before["final_norm/weight"])


def test_scrub_takes_turns(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  values = {"period": 2, "max_phases": 1, "kl_weight": 0.5, "retain_weight": 0.2}
  rows, _ = run(tmp_path / "job", job(folder, "scrub", values))
  terms = [row["terms"] for row in rows]
  assert terms[0]["kl_forget"] == close(0.0) and terms[0]["nll_retain"] == close(nll(folder, FILES["retain"]))
  assert [row["loss"] for row in rows[:2]] == [close(-term["kl_forget"]) for term in terms[:2]]
  assert [row["loss"] for row in rows[2:]] == [
      close(0.5 * term["kl_retain"] + 0.2 * term["nll_retain"]) for term in terms[2:]]


def test_pdu_raises_the_weight_of_a_constraint_that_is_not_met(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  values = {"epsilon": 0.3, "dual": 2.0, "dual_rate": 0.5, "dual_warmup": 1}
  rows, _ = run(tmp_path / "job", job(folder, "pdu", values))
  dual = 2.0
  for step, row in enumerate(rows):
    terms = row["terms"]
    assert terms["dual"] == pytest.approx(dual, rel=1e-5)
    assert row["loss"] == pytest.approx(terms["logit_margin_forget"] + dual * (terms["nll_retain"] - 0.3), rel=1e-5)
    dual = max(0.0, dual + 0.5 * (terms["nll_retain"] - 0.3)) if step >= 1 else dual
  assert rows[-1]["terms"]["dual"] > 2.0


def test_a_task_vector_is_turned_round(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Against AdamW on the loss by hand."""
  _, ours = run(tmp_path / "job", job(folder, "task_vector", {"alpha": 2.0}, steps=3))
  adamw, at = optax.adamw(1e-3, weight_decay=0.0), params()
  state, gradient = adamw.init(at), jax.jit(jax.grad(lambda at: nll(folder, FILES["forget"], at)))
  for _ in range(3):
    updates, state = adamw.update(gradient(at), state, at)
    at = optax.apply_updates(at, updates)
  before, learned = flatten(params()), flatten(at)
  difference = lambda one, other: math.sqrt(sum(float(np.sum(np.square(one[k] - other[k]))) for k in other))
  expected = {name: before[name] - 2.0 * (learned[name] - before[name]) for name in before}
  assert difference(ours, expected) < 0.01 * difference(before, expected)


def test_an_adapters_task_vector_is_turned_round(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Against the adapter of a second model that learns the same rows."""
  values = {"reinforce_steps": 3, "reinforce_learning_rate": 1e-3, "alpha": 2.0}
  run(tmp_path / "learned", job(folder, "whp_logits", values, adapter=LORA, steps=1))
  kept = tmp_path / "learned" / "checkpoints" / "reinforce" / "000003"
  like = init_lora(MODEL, ADAPTER, jax.random.key(0))
  learned = flatten(jax.tree.map(lambda leaf: leaf[0], checkpoints.load_tree(kept, like, 1)))
  _, merged = run(tmp_path / "job", job(folder, "task_vector", {"alpha": 1.5}, adapter=LORA, steps=3))
  released = flatten(load_peft(tmp_path / "job" / "adapter", MODEL)[0])
  before = flatten(params())
  for layer in ("layers/attn/q", "layers/mlp/down"):
    np.testing.assert_allclose(released[f"{layer}/a"], learned[f"{layer}/a"], atol=1e-6)
    delta = 2.0 * np.einsum("lfr,lrd->lfd", learned[f"{layer}/b"], learned[f"{layer}/a"])
    assert np.abs(delta).max() > 1e-4
    np.testing.assert_allclose(merged[f"{layer}/weight"] - before[f"{layer}/weight"], -1.5 * delta, atol=2e-6)
  assert np.array_equal(merged["embed/weight"], before["embed/weight"])


def test_averaging_releases_the_mean(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  plain = job(folder, "gd", keep_every=1)
  mean = job(folder, "gd", {"average_from": 2, "average_every": 2}, defence="averaging", keep_every=1)
  rows, _ = run(tmp_path / "plain", plain)
  again, released = run(tmp_path / "mean", mean)
  assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in again], abs=1e-5)
  kept = {name: [flatten(checkpoints.load_tree(checkpoints.step_path(
      tmp_path / name / "checkpoints" / "unlearn", step), params(), 1)) for step in (1, 2, 3, 4)]
      for name in ("plain", "mean")}
  trained = kept["plain"]
  for name, leaf in released.items():
    half = (trained[1][name] + trained[3][name]) / 2
    for step, wanted in enumerate((trained[0][name], trained[1][name], trained[1][name], half)):
      np.testing.assert_allclose(kept["mean"][step][name], wanted, atol=1e-5)
    np.testing.assert_array_equal(leaf, kept["mean"][3][name][0])


@pytest.mark.slow
def test_sharpness_is_looked_at_where_it_is_worst(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  plain, _ = run(tmp_path / "plain", job(folder, "npo_gd", steps=2))
  here, _ = run(tmp_path / "here", job(folder, "npo_gd", {"rho": 0.0}, defence="sam", steps=2))
  near, _ = run(tmp_path / "near", job(folder, "npo_gd", {"rho": 0.05}, defence="sam", steps=2))
  assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in plain], abs=1e-5)
  assert near[0]["terms"]["npo_forget"] > plain[0]["terms"]["npo_forget"] + 1e-3  # uphill of the reference
  assert near[0]["terms"]["nll_retain"] == close(plain[0]["terms"]["nll_retain"])  # which is left where it is


@pytest.fixture(scope="module")
def filled(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
  """A folder of statistics that a job has left, and the weights of that job."""
  root = tmp_path_factory.mktemp("filled")
  return root / "shared", run(root / "job", job(folder, "npo_kl", batch_size=2, references=str(root / "shared")))[1]


def test_statistics_are_shared(folder: pathlib.Path, tmp_path: pathlib.Path,
                               filled: tuple[pathlib.Path, dict[str, Any]]) -> None:
  """By a second job, which leaves the files alone; both end as a job with none."""
  shared, first = filled
  files = sorted(shared.iterdir())
  assert [path.name for path in files] == ["forget.safetensors", "retain.safetensors"]
  before = [path.stat().st_mtime_ns for path in files]
  _, second = run(tmp_path / "second", job(folder, "npo_kl", batch_size=2, references=str(shared)))
  assert [path.stat().st_mtime_ns for path in files] == before
  assert not (tmp_path / "second" / "checkpoints" / "references").exists()
  _, alone = run(tmp_path / "alone", job(folder, "npo_kl", batch_size=2))
  for name, leaf in alone.items():
    np.testing.assert_array_equal(first[name], leaf)
    np.testing.assert_array_equal(second[name], leaf)
  assert not np.array_equal(alone["embed/weight"], flatten(params())["embed/weight"])


def test_an_adapters_statistics_serve_full_training(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                    filled: tuple[pathlib.Path, dict[str, Any]]) -> None:
  """Although they are kept without the head, which full training moves."""
  shared = tmp_path / "shared"
  run(tmp_path / "lora", job(folder, "npo_kl", batch_size=2, references=str(shared), adapter=LORA))
  assert not any(key.startswith("head") for key in load_file(shared / "retain.safetensors"))
  _, ours = run(tmp_path / "full", job(folder, "npo_kl", batch_size=2, references=str(shared)))
  for name, leaf in filled[1].items():
    np.testing.assert_allclose(ours[name], leaf, atol=1e-5)


@pytest.mark.parametrize(("changes", "file", "problem"), [
    ({"forget": "alternates"}, "forget", "was made from other rows of forget"),
    ({"retain": "alternates"}, "retain", "was made from other rows of retain"),
    ({"model": "other"}, "forget", "was made from a model with other weights"),
    ({"dtype": "bfloat16"}, "forget", "was made otherwise .*bfloat16.* here, .*float32.* there"),
    ({"method": "undial"}, "forget", "holds other statistics .*hidden.* here, .*logprobs.* there")])
def test_statistics_of_something_else_are_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path, filled: tuple[pathlib.Path, dict[str, Any]],
    changes: dict[str, str], file: str, problem: str) -> None:
  if "model" in changes:
    module.export(params(1), MODEL, tmp_path / "other", source=folder / "base")
  values: dict[str, Any] = {
      key: str(folder / f"{value}.jsonl") if key in FILES else value for key, value in changes.items()}
  values |= {"model": str(tmp_path / "other")} if "model" in changes else {}
  method = values.pop("method", "npo_kl")
  with pytest.raises(InputError, match=f"shared/{file}.safetensors: `references` {problem}.*; give another folder"):
    unlearn(job(folder, method, batch_size=2, references=str(filled[0]), **values), "here", tmp_path / "job")
  assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-4], lambda raw: raw[:40], lambda raw: b"", lambda raw: b"\xff" * 64, lambda raw: raw + b"x",
    lambda raw: raw.replace(b'"rows"', b'"rows', 1)])
def test_damaged_statistics_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path, damage: Any,
                                        filled: tuple[pathlib.Path, dict[str, Any]]) -> None:
  shared = tmp_path / "shared"
  shared.mkdir()
  (shared / "forget.safetensors").write_bytes(damage((filled[0] / "forget.safetensors").read_bytes()))
  with pytest.raises(InputError, match=r"shared/forget.safetensors: `references` cannot be used: the file .*; remove"):
    unlearn(job(folder, "npo_kl", batch_size=2, references=str(shared)), "here", tmp_path / "job")
  assert not (tmp_path / "job").exists()
