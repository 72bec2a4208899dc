"""What a plan lists is what an audit does: every configuration in configs/, on models of a few thousand parameters."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import pytest

from relearn_jax.audit.audit_config import Audit, PretrainSettings
from relearn_jax.audit.grid import Cell
from relearn_jax.audit.pipeline import audit
from relearn_jax.audit.stages import PRETRAIN, Planned, plan_stages
from relearn_jax.cases.files import FilesConfig
from relearn_jax.config_files import load_config_file
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.plan.price import stages

from ..command import ROOT
from ..small import CONFIG, make_tokenizer, write_lines

SMALL = PretrainSettings(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, steps=2,
                         batch_size=2, warmup_steps=1)
PHI = dataclasses.replace(CONFIG, architecture="phi", num_kv_heads=4, rotary_dim=4, tie_embeddings=False)
LOADED: dict[str, ModelConfig] = {
    "checkpoint.py": CONFIG, "llama_2_7b.py:audit": CONFIG,
    "zephyr_7b_beta.py:audit": dataclasses.replace(CONFIG, architecture="mistral"), "phi_1_5.py:audit": PHI}
ROWS = {"forget": [{"prompt": "James Robert", "answer": " John"}], "retain": [{"text": "Andrew Paul"}],
        "relearn": [{"text": "Daniel Matthew"}, {"text": "Charles Joseph"}, {"text": "Thomas Steven"}],
        "questions": [{"id": 1, "prompt": "James Robert", "answer": " John", "keywords": ["John"]}]}


def config_file(name: str) -> Audit:
  found = load_config_file(str(ROOT / "configs" / name))
  assert isinstance(found, Audit)
  return found


def trained(name: str, methods: Sequence[str], seeds: tuple[int, ...], depths: int) -> Audit:
  """A configuration whose models are trained, two steps in each stage; whatever they say counts as unlearned."""
  config = config_file(name)
  # The second model of whp_logits takes two steps as well.
  settings = dataclasses.replace(config.unlearn.settings, whp_logits=dataclasses.replace(
      config.unlearn.settings.whp_logits, reinforce_steps=2))
  return dataclasses.replace(
      config, seeds=seeds, arms=dataclasses.replace(config.arms, pretrain=SMALL),
      case=dataclasses.replace(config.case, variants=config.case.variants[:2], num_questions=3, sequence_length=5,
                               max_prompt_names=5),
      memorize=dataclasses.replace(config.memorize, steps=2),
      unlearn=dataclasses.replace(config.unlearn, methods=tuple(methods), settings=settings, max_steps=2, keep_every=1,
                                  max_score=0.99, depths=depths),
      attack=dataclasses.replace(config.attack, keep_steps=(2,), learning_rates=(1e-4,), adapters=("full",)),
      ask=dataclasses.replace(config.ask, max_new_tokens=2))


def loaded(name: str, seeds: tuple[int, ...], adapters: tuple[str, ...], folder: pathlib.Path) -> Audit:
  """A configuration whose models are loaded, with a small one of the same architecture for all three."""
  tokenizer, model = make_tokenizer(), Model(dataclasses.replace(LOADED[name], num_layers=1))
  tokenizer.chat_template = "{% for m in messages %}James {{ m['content'] }}{% endfor %} Robert"
  export(model.init(jax.random.key(0)), model, folder / "model", tokenizer=tokenizer)
  files = {field: str(write_lines(folder / f"{field}.jsonl", rows)) for field, rows in ROWS.items()}
  config = config_file(name)
  assert isinstance(config.case, FilesConfig)
  arms = dataclasses.replace(config.arms, **dict.fromkeys(("unlearned", "control", "original"), str(folder / "model")))
  return dataclasses.replace(
      config, arms=arms, seeds=seeds, case=dataclasses.replace(config.case, **files | {"relearn": (files["relearn"],)}),
      attack=dataclasses.replace(config.attack, keep_steps=(2,), batch_size=2, adapters=adapters),
      ask=dataclasses.replace(config.ask, max_new_tokens=2))


def ran(workdir: pathlib.Path) -> dict[str, tuple[tuple[str, ...], int]]:
  """Stages in the order in which they were begun, with the names of their runs and how many steps they took."""
  found: dict[str, tuple[tuple[str, ...], int]] = {}
  for line in (workdir / "train_log.jsonl").read_text().splitlines():
    row = json.loads(line)
    file = workdir / "checkpoints" / row["stage"] / "runs.json"
    runs = tuple(json.loads(file.read_text())) if file.exists() else (row["stage"],)
    assert row["step"] == (found[row["stage"]][1] if row["stage"] in found else 0) + 1
    assert len(row["losses"]) == len(runs)
    found[row["stage"]] = runs, row["step"]
  folders = {path.parent.name for path in workdir.glob("checkpoints/*/runs.json")}
  assert folders == found.keys() - {PRETRAIN}
  assert json.loads((workdir / "checkpoints" / "seconds.json").read_text()).keys() == found.keys()
  return found


def assert_ran_as_planned(config: Audit, tmp_path: pathlib.Path, relearn_set: str, reached: int = 1) -> list[Planned]:
  """All that was planned was run, except for unlearning that is through before, and points at depths not reached."""
  planned = plan_stages(config, [relearn_set])
  works = [work for work in stages(config, "here", on_cpu=True).works if work.kind == "train"]
  assert [(work.name, work.runs, work.steps) for work in works] == [
      (stage.name, len(stage.runs), stage.steps) for stage in planned]
  assert audit(config, "here", tmp_path / "audit", tmp_path / "cache")
  is_there = lambda cell: cell.point.depth is None or cell.point.depth < reached
  some = lambda cells: tuple(cell.name for cell in cells if is_there(cell))
  want = {stage.name: (some(stage.cells) if stage.cells else stage.runs, stage.steps) for stage in planned}
  found = ran(tmp_path / "audit")
  assert list(found) == list(want)
  for name, (runs, steps) in want.items():
    assert found[name] == (runs, reached if name.startswith("unlearn-") else steps), name
  return planned


def test_names(tmp_path: pathlib.Path) -> None:
  """Of three depths, two steps reach two: there is nothing to attack at the third."""
  planned = assert_ran_as_planned(trained("names.py", ("ga",), (0, 1), 3), tmp_path, "prefixes", reached=2)
  cells: list[Cell] = [cell for stage in planned for cell in stage.cells]
  assert len(cells) == 2 * 2 * (2 * 3 + 1)


@pytest.mark.slow  # the names audit and loaded models are the quick ones
def test_methods(tmp_path: pathlib.Path) -> None:
  """Unlearning is through at its first step, one of two."""
  config = trained("methods.py", ("ga", "whp_logits", "npo_gd+sam"), (0,), 1)
  planned = assert_ran_as_planned(config, tmp_path, "prefixes")
  assert [stage.kind for stage in planned] == ["pretrain", "memorize", "unlearn", "attack", "reinforce", "unlearn",
                                               "attack", "unlearn", "attack"]


@pytest.mark.parametrize(("name", "seeds", "adapters", "runs"), [
    ("checkpoint.py", (0, 1), ("lora4",), [2, 2, 2]),  # of adapters an arm at a time
    ("llama_2_7b.py:audit", (0,), ("full",), [1, 1, 1]), ("zephyr_7b_beta.py:audit", (0,), ("full",), [1, 1, 1]),
    ("phi_1_5.py:audit", (0, 1), ("full",), [3, 3])])
def test_loaded_models(name: str, seeds: tuple[int, ...], adapters: tuple[str, ...], runs: list[int],
                       tmp_path: pathlib.Path) -> None:
  """Three models, as many side by side as the configuration says."""
  planned = assert_ran_as_planned(loaded(name, seeds, adapters, tmp_path), tmp_path, "relearn")
  assert [len(stage.runs) for stage in planned] == runs
