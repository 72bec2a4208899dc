"""Arms, settings and interviews: who is attacked where, and what is refused before any work."""

import concurrent.futures
import dataclasses
import json
import pathlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from relearn_jax.audit import pretrained
from relearn_jax.audit.acquire import ask_once
from relearn_jax.audit.audit_config import AskSettings, Audit, recorded
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain, Point, chains, select_points, trained_points
from relearn_jax.audit.interview import Answers, Interviewer, load_answers, save_answers
from relearn_jax.audit.pipeline import AXES, prepare
from relearn_jax.audit.shelf import open_folder
from relearn_jax.audit.unlearning import resolved
from relearn_jax.cases import names
from relearn_jax.cases.base import Text
from relearn_jax.cases.files import FilesConfig
from relearn_jax.config_files import load_config_file, moved_fields
from relearn_jax.data.rows import stack_runs
from relearn_jax.data.texts import encode_texts
from relearn_jax.data.tokens import completion_text
from relearn_jax.errors import InputError
from relearn_jax.metrics.scores import Asked, Stored, judged, keyword_success
from relearn_jax.parallel.beside import Beside
from relearn_jax.parallel.mesh import lay_out, repeat_runs, runs_mesh, weight_shardings
from relearn_jax.workdir import claim_workdir, differences, to_dict

from ..command import ROOT
from ..small import MODEL, make_tokenizer, params
from .tiny import names_audit


def answers(runs: list[str], texts: list[list[str]]) -> Answers:
  """What runs said, with nothing else that matters."""
  shape = len(runs), len(texts[0])
  return Answers(np.array(runs), np.array(texts), np.zeros((*shape, 2), np.int32), np.zeros(shape, np.float32),
                 np.full(shape, "0"), np.ones(len(runs), bool))


def test_u_and_n_pair_up(tmp_path: pathlib.Path) -> None:
  exp = Experiment(names_audit(), "here", tmp_path)
  runs = chains(exp.config)
  assert len(runs) == 24 and [run.arm for run in runs] == ["U"] * 12 + ["N"] * 12
  assert runs[0].name == "U-7-0" and len({run.name for run in runs}) == 24 and exp.chains == runs
  for run in runs:
    control = exp.cases[dataclasses.replace(run, arm="N")]
    assert control.relearn_sets == exp.cases[run].relearn_sets and control.questions == exp.cases[run].questions


def test_unlearned_points_are_each_runs_own(tmp_path: pathlib.Path) -> None:
  early, late, never = Chain("U", "7", 0), Chain("U", "7", 1), Chain("U", "5", 0)
  curves = {early: {0: 0.0, 5: 0.01, 10: 0.5, 15: 0.0}, late: {0: 1.0, 5: 0.02, 10: 0.3, 15: 0.0},
            never: {0: 1.0, 5: 0.9, 10: 0.9, 15: 0.011}}
  # Step 0 never counts: what did not know from the start has not unlearned.
  assert select_points(curves, 0.01, 3) == {early: [5, 10, 15], late: [15], never: []}
  exp = Experiment(names_audit(), "here", tmp_path)
  said = [[" Mark"] + [" James"] * 99, [" James"] * 100]
  assert exp.mean_scores(answers(["U-7-0", "U-7-1"], said)).tolist() == [0.01, 0.0]  # exactly at the threshold


def test_controls_are_attacked_at_their_partners_step(tmp_path: pathlib.Path) -> None:
  config = names_audit(case__variants=(7, 1), unlearn__depths=2, seeds=(4,))
  points = trained_points(config, "ga", 4, original=True)
  assert [point.name for point in points] == [
      "U-7-4-depth0", "N-7-4-depth0", "U-7-4-depth1", "N-7-4-depth1", "O-7-4",
      "U-1-4-depth0", "N-1-4-depth0", "U-1-4-depth1", "N-1-4-depth1", "O-1-4"]
  steps = {"ga": {Chain("U", "7", 4): [20, 25], Chain("U", "1", 4): [5]}}
  exp = Experiment(config, "here", tmp_path)
  there = [resolved(exp, point, steps, {None: {}, "ga": {}}) for point in points]
  assert [point.unlearn_step if point else None for point in there] == [20, 20, 25, 25, 0, 5, 5, None, None, 0]
  assert points[4].chain == points[0].chain and points[4].arm == "O" and points[4].method is None
  assert not any(point.arm == "O" for point in trained_points(config, "npo", 4, original=False))


def test_the_original_and_loaded_models_are_points_without_a_trajectory(tmp_path: pathlib.Path) -> None:
  exp = Experiment(names_audit(), "here", tmp_path)
  original = Point("O", "7", 0, None, None, 0)
  assert resolved(exp, original, {}, {None: {}}) == original and original.name == "O-7-0"
  assert resolved(exp, original, {}, {None: {original.chain: 0}}) is None  # it never memorised


@pytest.mark.parametrize("field,value", [
    ("arms.pretrain.hidden_size", 0), ("arms.pretrain.hidden_size", 30), ("arms.pretrain.num_kv_heads", 3),
    ("case.couples", 61), ("case.attachment", 1.1), ("arms.pretrain.warmup_steps", 600),
    ("arms.pretrain.learning_rate", float("nan")), ("memorize.steps", 0), ("memorize.weight_decay", -1.0),
    ("unlearn.settings.ga.learning_rate", 0.0), ("unlearn.max_steps", 0), ("unlearn.keep_every", -5),
    ("unlearn.depths", 0), ("unlearn.max_score", 1.0), ("unlearn.methods", ()), ("unlearn.methods", ("ga", "ga")),
    ("unlearn.methods", ("gaa",)), ("unlearn.methods", ("ga+smooth",)),
    ("attack.keep_steps", ()), ("attack.keep_steps", (5, 5)), ("attack.keep_steps", (0, 5)),
    ("attack.learning_rates", ()), ("attack.learning_rates", (1e-3, 1e-4)), ("attack.adapters", ()),
    ("attack.adapters", ("full", "full")), ("attack.adapters", ("lora0",)), ("attack.lora.rank", 0),
    ("attack.runs_at_once", -1), ("attack.search.trials", -1), ("attack.search.lowest_rate", 0.1),
    ("attack.search.batch_sizes", (2.5,)), ("attack.search.adapters", ("none",)),
    ("ask.max_new_tokens", 0), ("ask.buckets", (18, 10)), ("ask.buckets", (2.5,)), ("ask.metrics", ("acc",)),
    ("arms.pretrain.seed", -1), ("seeds", ()), ("seeds", (1, 1)), ("ask.runs_at_once", -1),
    ("checkpoint_seconds", -1.0), ("verdict.draws", 0), ("verdict.alpha", 0.0), ("verdict.alpha", 1.0),
    ("verdict.delta", -0.1)])
def test_settings_that_cannot_work_are_named(field: str, value: Any) -> None:
  with pytest.raises(InputError) as caught:
    check_audit(names_audit(**{field.replace(".", "__"): value}), "names.py")
  assert caught.value.field == field and caught.value.file == "names.py" and caught.value.mend


def test_positions_that_are_too_few_are_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(InputError) as caught:
    prepare(names_audit(arms__pretrain__max_positions=20), "names.py", tmp_path, False)
  assert caught.value.field == "arms.pretrain.max_positions" and caught.value.mend


def test_the_default_is_fine_and_differences_are_listed(tmp_path: pathlib.Path) -> None:
  prepare(names_audit(), "names.py", tmp_path, False)
  ours, theirs = (to_dict(recorded(config)) for config in (
      names_audit(), names_audit(attack__learning_rates=(1.0,), seeds=(4,))))
  del theirs["unlearn"]["methods"]
  assert differences(ours, theirs) == [
      "attack.learning_rates: [0.0001, 0.001, 0.003] here, [1.0] there", "seeds: [0, 1, 2] here, [4] there",
      "unlearn.methods: ['ga'] here, '(absent)' there"]


def test_a_leaking_relearn_set_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
                                                         ) -> None:
  make = names.make_case

  def leaky(*arguments: Any) -> Any:
    case = make(*arguments)
    planted = dataclasses.replace(case.relearn_sets[0], rows=(Text("Gary Mark"), *case.relearn_sets[0].rows))
    return dataclasses.replace(case, relearn_sets=(planted,))
  monkeypatch.setattr(names, "make_case", leaky)
  with pytest.raises(InputError, match="line 1 of relearn set 'prefixes'.*'mark'.*--allow_leakage"):
    prepare(names_audit(), "names.py", tmp_path, False)
  prepare(names_audit(), "names.py", tmp_path, True)


def test_a_workdir_belongs_to_one_configuration(tmp_path: pathlib.Path) -> None:
  config, folder = recorded(names_audit()), tmp_path / "new"
  assert not claim_workdir(folder, config, axes=AXES) and claim_workdir(folder, config, axes=AXES)
  assert json.loads((folder / "config.json").read_text()) == to_dict(config)
  with pytest.raises(InputError, match=r"unlearn.methods: \['kl'\] here, \['ga'\] there"):
    claim_workdir(folder, recorded(names_audit(unlearn__methods=("kl",))), axes=AXES)
  (folder / "config.json").write_text("{")
  with pytest.raises(InputError, match="is no JSON"):
    claim_workdir(folder, config, axes=AXES)


def test_pretraining_rows_are_whole() -> None:
  audit = names_audit(arms__pretrain__steps=3)
  config, case = audit.arms.pretrain, audit.case_config
  tokenizer = make_tokenizer()
  batches = pretrained.pretraining_batches(config, case, tokenizer)
  assert len(batches) == 3 and all(batch.shape == (32, 28) for batch in batches)
  for row in np.concatenate(batches):
    real = row[row != tokenizer.pad_token_id]
    assert real[0] == tokenizer.bos_token_id and real[-1] == tokenizer.eos_token_id
    assert not set(real[1:-1]) & {0, 1, 2, 3}
  key = pretrained.content_key(config, batches)
  assert key == pretrained.content_key(config, batches)
  assert key != pretrained.content_key(dataclasses.replace(config, learning_rate=0.1), batches)
  assert key != pretrained.content_key(config, batches[:2])


def test_a_base_that_two_want_at_once_is_trained_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  shape = {"steps": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "num_layers": 1, "warmup_steps": 0}
  config = dataclasses.replace(Audit(None).arms.pretrain, **shape)
  trained, both = [], threading.Barrier(2, timeout=60)
  batches = pretrained.pretraining_batches

  def wanted(*arguments: Any) -> Any:
    made = batches(*arguments)
    both.wait()  # neither looks for the folder before both are here
    return made

  def slow(model: Any, *_: Any, **__: Any) -> Any:
    trained.append(model)
    time.sleep(0.5)  # the other is at the lock by now
    return model.init(jax.random.key(0))
  monkeypatch.setattr(pretrained, "pretraining_batches", wanted)
  monkeypatch.setattr(pretrained, "pretrain", slow)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first, second = pool.map(lambda _: pretrained.cached_base(config, names.NamesConfig(), tmp_path), range(2))
  assert first == second and len(trained) == 1 and (first / "model.safetensors").exists()
  assert [path.name for path in first.parent.iterdir() if path.is_dir()] == [first.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="file/base: `RELEARN_CACHE` cannot be written .*that you may write to"):
    pretrained.cached_base(dataclasses.replace(Audit(None).arms.pretrain, steps=1), names.NamesConfig(),
                           tmp_path / "file")


def test_answers_survive_a_restart(tmp_path: pathlib.Path) -> None:
  said = Answers(np.array(["U-7-0"]), np.array([[" Mark", ""]]), np.ones((1, 2, 3), np.int32),
                 np.zeros((1, 2), np.float32), np.array([["01", "1"]]), np.ones(1, bool),
                 np.full((1, 1), np.nan, np.float32), retain_tokens=np.full((1, 1), 3, np.int32))
  calls, folder = [], open_folder(tmp_path / "checkpoints", "stage", {"U-7-0": "key"})
  unread = dataclasses.replace(said, texts=np.array([], str))
  exp: Any = SimpleNamespace(beside=Beside(), interviewer=lambda scale: SimpleNamespace(
      read=lambda got: dataclasses.replace(got, texts=said.texts)))

  def compute() -> Answers:
    calls.append(1)
    return unread
  for _ in range(2):
    with exp.beside:
      once = ask_once(exp, folder, 5, compute)
    found = once.answers()
    assert once.finite == {"U-7-0": True}
    for field in dataclasses.fields(Answers):
      np.testing.assert_array_equal(getattr(found, field.name), getattr(said, field.name))
  assert calls == [1] and folder.asked() == [5] and found.forget is None
  path = folder.answers(5)
  save_answers(path, said)
  assert load_answers(path).tokens.shape == (1, 2, 3) and [p.name for p in path.parent.iterdir()] == [path.name]


def test_interviews_give_every_model_its_own_answers() -> None:
  """Three models, two a call: the same as each of them alone."""
  tokenizer, mesh = make_tokenizer(), runs_mesh()
  prompts = [" ".join(names.COMMON[i:i + n]) + " Anthony" for i, n in enumerate((1, 4, 9, 12))]
  mark, = tokenizer.convert_tokens_to_ids(["Mark"])
  questions = [(tokenizer(prompt)["input_ids"], [mark]) for prompt in prompts]
  models = [params(seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *models)
  retain = stack_runs([encode_texts(tokenizer, [Text("James Robert John"), Text("Kevin")], pathlib.Path("names"),
                                    160)] * 3)
  make = lambda runs: Interviewer(MODEL, tokenizer, questions, mesh, max_new_tokens=6, buckets=(8, 16),
                                  runs_per_call=runs)
  together = make(2)(stacked, {"retain": retain}, ["a", "b", "c"])
  assert together.tokens.shape == (3, 4, 6) and together.texts.shape == together.logprob.shape == (3, 4)
  assert together.runs.tolist() == ["a", "b", "c"] and together.forget is together.relearn is None
  assert len({texts.tobytes() for texts in together.texts}) == 3
  one = jax.tree.map(lambda leaf: leaf[:1], retain)
  for index, model in enumerate(models):
    alone = make(1)(repeat_runs(model, 1, mesh), {"retain": one}, ["alone"])
    for field in ("tokens", "texts", "logprob", "retain"):
      np.testing.assert_array_equal(getattr(alone, field)[0], getattr(together, field)[index])
    for tokens, text in zip(together.tokens[index], together.texts[index], strict=True):
      words = tokenizer.convert_ids_to_tokens([token for token in tokens.tolist() if token])
      assert text.split() == [word for word in words if word not in ("<s>", "</s>")]
  twice = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), stacked)
  laid = lay_out(twice, weight_shardings(twice, MODEL.axes(), mesh, stacked=True))
  here = make(2)(laid, {"retain": jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:2]]), retain)}, list("abcde"))
  for field in ("tokens", "texts", "logprob", "matched", "retain", "retain_tokens"):
    whole = getattr(together, field)
    np.testing.assert_array_equal(getattr(here, field), np.concatenate([whole, whole[:2]]))
  asked = make(2)
  assert asked._text(1, np.array([mark, 2, 0, 0, 0, 0], np.int32)) == " Mark"  # the space in front is its own
  assert asked._text(1, np.array([mark, 2, mark, 0, 0, 0], np.int32)) == " Mark"  # nothing after its end


@pytest.mark.parametrize("number,held", [(2, 12), (6, 12), (10, 12), (5, 12), (4, 4)])
def test_devices_are_asked_the_runs_that_they_hold(number: int, held: int) -> None:
  """Every run is in a block, those of a block in equal parts from every device, and no block is padding alone."""
  mesh = runs_mesh()
  devices = mesh.shape["runs"]
  ask = Interviewer(MODEL, make_tokenizer(), [([1, 2], [3])], mesh, max_new_tokens=1, buckets=None,
                    runs_per_call=devices)
  ask.block = number * devices  # as elsewhere than on CPU
  size, named = held * devices, held * devices - devices // 2
  blocks = list(ask._blocks({size}, named))
  assert len(blocks) == -(-held // number) and {place for index, _ in blocks for place in index} == set(range(size))
  for index, start in blocks:
    assert (index // held == np.repeat(np.arange(devices), number)).all() and index.min() % held == start
  assert [start for _, start in ask._blocks({size - 1}, named)] == [None] * -(-named // (number * devices))


@pytest.mark.parametrize("change,problem", [
    ({"ask": AskSettings(stop=("",))}, r"`ask.stop` is \(''"),
    ({"ask": AskSettings(stop=(1,))}, "`ask.stop` is"),  # type: ignore[arg-type]
    ({"ask": AskSettings(stop="Q:")}, "`ask.stop` is 'Q:'"),  # type: ignore[arg-type]
    ({"allowed_lines": (0,)}, r"`allowed_lines` is \(0,\)"), ({"allowed_lines": (True,)}, "`allowed_lines` is")])
def test_stop_strings_and_allowed_lines_are_checked(change: dict[str, Any], problem: str) -> None:
  given = Audit(FilesConfig(forget="f", retain="r", relearn=("a",), questions="q"))
  given.arms.unlearned = "m"
  check_audit(dataclasses.replace(given, ask=AskSettings(stop=("Q:",)), allowed_lines=(1, 7)), "here")
  with pytest.raises(InputError, match=f"here: {problem}"):
    check_audit(dataclasses.replace(given, **change), "here")


def test_what_is_judged_ends_at_a_stop_string_and_in_the_completion() -> None:
  tokenizer = make_tokenizer()
  prompt = tokenizer("James Anthony")["input_ids"]
  asked = Asked("q", "James Anthony", " Mark", ("Anthony Mark", "James"), "q", begun="James Anthony")
  ids = lambda text: tokenizer.convert_tokens_to_ids(text.split())
  shown = lambda question, text: judged(question, completion_text(tokenizer, prompt, ids(text)))
  hit = lambda text, **more: keyword_success(
      dataclasses.replace(asked, **more), Stored(completion_text(tokenizer, prompt, ids(text)), 0.0, "0")) == 1
  assert hit("Mark Kevin") and not hit("Kevin Mark")  # "James" stands in the prompt alone
  assert not hit("Mark Kevin", begun="") and hit("Kevin James", begun="")
  for stop in (("Kevin",), ("Brian", "Kevin"), ("Kevin", "Brian")):
    assert hit("Mark Kevin", stop=stop) and not hit("Kevin James", stop=stop)
    assert shown(dataclasses.replace(asked, stop=stop), "Mark Kevin James").rstrip() == " Mark"
  both = dataclasses.replace(asked, stop=("Kevin", "Brian"))
  assert shown(both, "Mark Brian Kevin").rstrip() == shown(both, "Mark Kevin Brian").rstrip() == " Mark"
  assert hit("Mark", case=True) and not hit("Mark", case=True, keywords=("anthony mark",))


def test_a_question_has_its_own_stop_strings_and_those_of_the_audit(tmp_path: pathlib.Path) -> None:
  exp, alone = (Experiment(names_audit(ask__stop=("Kevin",)), "here", tmp_path) for _ in range(2))
  first = exp.first.questions[0]
  exp.first = dataclasses.replace(exp.first, questions=(
      dataclasses.replace(first, stop=("Brian",)), *exp.first.questions[1:]))
  own, other, *_ = exp.questions
  assert own.stop == ("Kevin", "Brian") and other.stop == ("Kevin",)
  assert own.begun == first.prompt and judged(own, " Mark Kevin") == " Mark "
  alone.first = dataclasses.replace(alone.first, begins_in_prompt=False)
  assert {question.begun for question in alone.questions} == {""}


def test_fields_are_understood_by_their_former_names() -> None:
  """Commands that were written for audits before they were one go on to work; what is unknown stays, to be refused."""
  names, files = (load_config_file(str(ROOT / "configs" / f"{name}.py")) for name in ("names", "checkpoint"))
  old = ["unlearned=a", "relearn=b", "interview.max_new_tokens=2", "method=x", "attack.adapter.kind=lora",
         "attack.adapter.rank=4", "chat.date=c", "seeds=(7,)", "nope=1"]
  now = ["arms.unlearned=a", "case.relearn=b", "ask.max_new_tokens=2", "arms.method=x", "attack.adapters=lora",
         "attack.lora.rank=4", "ask.chat.date=c", "seeds=(7,)", "nope=1"]
  form = lambda fields: [f"--config.{field}" for field in fields]
  assert moved_fields(["--config=f", *form(old)], files) == ["--config=f", *form(now)]
  old = ["method=npo", "methods.ga.learning_rate=1", "relearn.keep_steps=(1,)", "audit.case.seeds=(1,)",
         "methods=('ga',)", "base.couples=3", "base.steps=3", "evaluate.runs_per_call=2", "unlearn.max_asr=0.1"]
  now = ["unlearn.methods=npo", "unlearn.settings.ga.learning_rate=1", "attack.keep_steps=(1,)", "seeds=(1,)",
         "unlearn.methods=('ga',)", "case.couples=3", "arms.pretrain.steps=3", "ask.runs_at_once=2",
         "unlearn.max_score=0.1"]
  assert moved_fields(form(old), names) == form(now)
  job = load_config_file(str(ROOT / "configs" / "unlearn.py"))
  assert moved_fields(form(["method=npo", "methods.npo.beta=1", "forget=f"]), job) == form(
      ["method=npo", "methods.npo.beta=1", "forget=f"])
