"""Jobs on adapters and what they write: an adapter that is read back over its base, and weights in fewer bits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.audit_config import ArmsSettings, Audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.lora import LoraConfig, export_peft, init_lora
from relearn_jax.models.model import Params, flatten
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.settings import AdapterSettings
from relearn_jax.training.unlearn import rounding, unlearn

from ..small import MODEL, write_checkpoint, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A base, an adapter on it, and rows."""
  root = tmp_path_factory.mktemp("adapters")
  write_checkpoint(root / "base")
  config = LoraConfig(2, 4.0, ("q_proj",))
  adapter = jax.tree.map(lambda leaf: leaf + 0.5, init_lora(MODEL, config, jax.random.key(0)))
  export_peft(adapter, MODEL, config, root / "adapter", base="../base")
  write_lines(root / "rows.jsonl", [{"prompt": "James Robert", "answer": " John"}, {"text": "Joseph Thomas"}])
  write_lines(root / "questions.jsonl", [{"id": 1, "prompt": "David", "answer": " William", "keywords": ["William"]}])
  return root


def read(folder: pathlib.Path) -> Params:
  return flatten(load_params(check_checkpoint(folder), MODEL))


def test_an_adapter_unlearns_and_what_it_leaves_is_read_back(folder: pathlib.Path, tmp_path: pathlib.Path,
                                                             capsys: pytest.CaptureFixture) -> None:
  job = UnlearnJob(model=str(folder / "adapter"), method="ga", forget=str(folder / "rows.jsonl"), steps=2,
                   learning_rate=1e-2, adapter=AdapterSettings("lora", 2, 4.0, ("down_proj",)), save_dtype="bfloat16")
  assert unlearn(job, "here", tmp_path / "job")
  start, end, layered = read(folder / "adapter"), read(tmp_path / "job" / "model"), read(tmp_path / "job" / "adapter")
  np.testing.assert_allclose(end["layers/attn/q/weight"], start["layers/attn/q/weight"], rtol=2**-8)
  assert not np.allclose(start["layers/attn/q/weight"], read(folder / "base")["layers/attn/q/weight"], atol=0.1)
  for path, leaf in layered.items():  # the adapter in full precision, the model rounded
    np.testing.assert_array_equal(leaf.astype(jnp.bfloat16).astype(np.float32), end[path])
  assert not np.array_equal(layered["layers/mlp/down/weight"], start["layers/mlp/down/weight"])
  assert "Rounded to bfloat16, the weights lie" in capsys.readouterr().out
  # It is refused over other weights.
  write_checkpoint(tmp_path / "other")
  file = tmp_path / "job" / "adapter" / "adapter_config.json"
  file.write_text(file.read_text().replace(str(folder / "adapter"), str(tmp_path / "other")))
  with pytest.raises(InputError, match="`base_fingerprint` was trained on a base with other weights"):
    check_checkpoint(tmp_path / "job" / "adapter")


def test_an_audit_takes_adapters_and_names_their_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows = str(folder / "rows.jsonl")
  case = FilesConfig(forget=rows, retain=rows, relearn=(rows,), questions=str(folder / "questions.jsonl"))
  arms = ArmsSettings(unlearned=str(folder / "adapter"), original=str(folder / "base"))
  audit = Experiment(Audit(case, seeds=(0,), arms=arms), "here", tmp_path)
  digests = audit.digests()
  assert {"unlearned/adapter_model.safetensors", "unlearned/adapter_config.json", "unlearned/base/model.safetensors",
          "unlearned/base/config.json", "original/model.safetensors"} <= set(digests)
  assert digests["unlearned/base/model.safetensors"] == digests["original/model.safetensors"]
  u, o = (flatten(load_params(audit.checked[arm], MODEL))["layers/attn/q/weight"] for arm in "UO")
  np.testing.assert_allclose(u - o, 0.5 * 2 * np.asarray(added(folder)), rtol=1e-4, atol=1e-5)


def added(folder: pathlib.Path) -> np.ndarray:
  """The sum of the rows of `a`, for each of the columns: `b` is 0.5 everywhere."""
  fresh = flatten(init_lora(MODEL, LoraConfig(2, 4.0, ("q_proj",)), jax.random.key(0)))["layers/attn/q/a"]
  total = (np.asarray(fresh) + 0.5).sum(1)
  return np.broadcast_to(total[:, None], (total.shape[0], 32, total.shape[1]))


def test_the_share_that_rounding_leaves_by_hand() -> None:
  before = {"a/weight": np.ones((2, 2), np.float32), "b/weight": np.full(3, 2.0, np.float32)}
  after: Params = {"a": {"weight": before["a/weight"] + np.float32(2**-10)},  # rounded away: 1 has steps of 2^-7
                   "b": {"weight": before["b/weight"] + np.float32(0.0625)}}  # kept: 2 has steps of 2^-6
  moved, kept = (4 * 2**-20 + 3 * 0.0625**2) ** 0.5, (3 * 0.0625**2) ** 0.5
  said = rounding(after, before.items(), "bfloat16")
  assert f"lie {kept:.3g} from those before: {kept / moved:.1%} of the {moved:.3g} that unlearning moved" in said
  after["b"]["weight"] = before["b/weight"]
  assert "lie 0 from those before: 0.0% of the" in rounding(after, before.items(), "bfloat16")
  assert "lie 0 from those before: the 0 that" in rounding({"a": {"weight": before["a/weight"]}, "b": after["b"]},
                                                         before.items(), "bfloat16")
