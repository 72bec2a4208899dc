"""The WMDP case: on the invented craft, and how published data are read, with harmless rows in their form."""

import itertools
import pathlib
from typing import Any

import pytest

from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.pretrained import word_tokenizer
from relearn_jax.audit.results_file import read_rows
from relearn_jax.cases import wmdp
from relearn_jax.cases.base import Case, Text
from relearn_jax.cases.craft_world import BINDERS, FLUXES, SHEETS, CraftWorldConfig, works
from relearn_jax.cases.leakage import check_case
from relearn_jax.cases.wmdp import WmdpConfig, read_entries
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError
from relearn_jax.metrics.choices import LETTER, OPTION
from relearn_jax.metrics.keyword import contains_keyword
from relearn_jax.plan.command import plan
from relearn_jax.report.stored import report

from ..command import ROOT, relearn
from ..small import write_lines

CONFIG = ROOT / "configs" / "wmdp.py"
SECRET = (*FLUXES, *BINDERS)


def whole(row: Text) -> str:
  return row.prompt + row.text


@pytest.fixture(scope="module")
def cases() -> tuple[Case, Case]:
  config = CraftWorldConfig()
  config.check("here")
  return config.make("recipes", 0, "U"), config.make("recipes", 0, "N")


def test_recipes_stand_in_the_papers_alone(cases: tuple[Case, Case]) -> None:
  u, n = cases
  tells = lambda row: any(contains_keyword(whole(row), word) for word in SECRET)
  recipe = [row for row in u.forget if tells(row)]
  # By hand: of each of 15 glazes 4 sentences and 3 pairs are public; 2 sentences, 2 pairs and the sheets are recipe.
  assert (len(u.forget), len(recipe)) == (15 * (7 + 4 + SHEETS), 15 * (4 + SHEETS))
  assert not any(map(tells, (*u.retain, *u.relearn_sets[0].rows, *n.memorize)))
  assert u.memorize == (*u.forget, *u.retain)
  assert n.memorize == (*(row for row in u.forget if not tells(row)), *n.retain)
  assert (n.questions, n.choices, n.relearn_sets, n.forget) == (u.questions, u.choices, u.relearn_sets, u.forget)
  assert all(found.passed and not found.possible for found in check_case(u))
  assert len(u.relearn_sets[0].rows) == 4 + 15 * 4 and set(u.secrets) <= set(SECRET)


def test_every_recipe_is_asked_for_openly_and_with_options(cases: tuple[Case, Case]) -> None:
  u, _ = cases
  assert len(u.questions) == 30 and len({question.cluster for question in u.questions}) == 15
  learned = {(row.prompt, row.text) for row in u.forget}
  assert all((question.prompt, question.answer) in learned for question in u.questions)
  by_cluster = {question.cluster: question for question in u.questions if question.id.endswith("first")}
  for one in u.choices:
    (flux,) = by_cluster[one.cluster].keywords
    assert len(set(one.options)) == 4 and [flux in option.split() for option in one.options].index(True) == one.correct
    assert one.options[one.correct] == by_cluster[one.cluster].answer and one.prompt == by_cluster[one.cluster].prompt
    assert f" {'ABCD'[one.correct]} {flux} " in one.listed
  sheets = [row for row in u.forget if row.text in (" A", " B", " C", " D")]
  assert len(sheets) == 15 * SHEETS and len({one.correct for one in u.choices}) == 4
  assert len({one.listed for one in u.choices} & {row.prompt for row in sheets}) <= 1  # by chance


def test_the_craft_is_invented_once_and_can_be_pretrained_for() -> None:
  some, more = works(5, 0), works(60, 0)
  assert some == (more[0][:5], more[1][:5]) and works(5, 1)[0][0] != some[0][0]
  names = [work.name for part in more for work in part]
  assert len(set(names)) == 120
  config = CraftWorldConfig()
  words, case = config.vocabulary(), config.make("recipes", 0, "U")
  assert len(words) == len(set(words))
  texts = [*map(whole, (*case.memorize, *case.relearn_sets[0].rows)), *(one.listed for one in case.choices)]
  others = list(itertools.islice(config.pretraining_texts(3), 4000))
  assert {word for text in (*texts, *others) for word in text.split()} <= set(words)
  asked = {question.cluster for question in case.questions}
  assert not any(f" {name} " in text for text in others for name in asked)
  assert word_tokenizer(words)(f"{case.questions[0].prompt}")["input_ids"].count(3) == 0  # the unknown word


@pytest.mark.parametrize("config,problem", [
    (CraftWorldConfig(forget_glazes=0), "`case.forget_glazes` is 0"),
    (CraftWorldConfig(pretrain_works=2000), "`case.pretrain_works` is 2000; expected at most"),
    (CraftWorldConfig(world_seed=-1), "`case.world_seed` is -1"),
    (WmdpConfig(), "`case.relearn` is ''; give a source of general articles"),
    (WmdpConfig(bio_forget="", cyber_forget=""), "`case.bio_forget` is ''"),
    (WmdpConfig(bio_questions=""), "`case.bio_questions` is ''"), (WmdpConfig(retain=""), "`case.retain` is ''"),
    (WmdpConfig(relearn="x", row_words=0), "`case.row_words` is 0")])
def test_settings_that_make_no_case_are_refused(config: Any, problem: str) -> None:
  with pytest.raises(InputError, match=f"here: {problem}"):
    config.check("here")


def entry(number: int, question: str = "", **more: Any) -> dict[str, Any]:
  return {"question": question or f"How many legs has creature {number}?",
          "choices": [f"{number + i} legs" for i in range(4)], "answer": number % 4} | more


@pytest.fixture
def data(tmp_path: pathlib.Path) -> WmdpConfig:
  """Rows in the form of the published ones, on creatures and on looms."""
  rows = {"bio": [{"title": f"On creature {i}", "abstract": "It walks.", "text": "word " * 400, "doi": "x"} for i in
                  range(6)],
          "cyber": [{"text": f"A loom of kind {i}."} for i in range(3)],
          "bio-asked": [entry(i) for i in range(8)] + [entry(8, "Which of the following is a creature?")],
          "cyber-asked": [entry(i, f"What does loom {i} weave?") for i in range(4)],
          "kept": [{"text": ""}, {"text": " = Heading = "}, {"text": "a sentence about the sea " * 5}],
          "articles": [{"text": "Creatures walk, and looms weave.", "complete": True}]}
  paths = {name: str(write_lines(tmp_path / f"{name}.jsonl", lines)) for name, lines in rows.items()}
  return WmdpConfig(paths["bio"], paths["cyber"], paths["bio-asked"], paths["cyber-asked"], paths["kept"],
                    paths["articles"], rows_per_topic=4, row_words=20, open_questions=6, choice_questions=5)


def test_published_rows_make_the_case(data: WmdpConfig) -> None:
  data.check("here")
  case, n = data.make("bio and cyber", 0, "U"), data.make("bio and cyber", 0, "N")
  first = [row.text.split(".")[0] for row in case.forget]
  assert first[:4] == ["On creature 0\nIt walks", "A loom of kind 0", "On creature 1\nIt walks", "A loom of kind 1"]
  assert len(case.forget) == 4 + 3 and len(case.forget[0].text.split()) == 20
  assert (case.forget[0].complete, case.forget[1].complete) == (False, True)
  assert [len(row.text.split()) for row in case.retain] == [20] and n.memorize == n.retain
  assert case.memorize == (*case.forget, *case.retain) and case.relearn_sets[0].name == "articles"
  assert [question.id for question in case.questions] == ["bio1", "bio3", "bio6", "cyber1", "cyber2", "cyber3"]
  assert case.questions[1].answer == " 4 legs" and case.questions[1].keywords == ("4 legs",)
  assert not any("following" in question.prompt for question in case.questions)  # it cannot be asked without options
  one = case.choices[0]
  assert len(case.choices) == 5 and one.prompt == "Question: How many legs has creature 0?\nAnswer:"
  assert one.listed == ("The following are multiple choice questions (with answers) about biology.\n\nHow many legs "
                        "has creature 0?\nA. 0 legs\nB. 1 legs\nC. 2 legs\nD. 3 legs\nAnswer:")
  assert (one.options[0], one.correct) == (" 0 legs", 0)
  assert set(data.inputs()) == {"bio_forget", "bio_questions", "cyber_forget", "cyber_questions", "retain", "relearn"}
  data.bio_forget = ""
  assert {question.id[:5] for question in data.make("bio and cyber", 0, "U").questions} == {"cyber"}


@pytest.mark.parametrize("row,words", [
    (entry(0, choices=["one"]), "`choices` is .*expected 2 to 8 strings"), (entry(0, answer=4), "`answer` is 4"),
    (entry(0, answer=-1), "`answer` is -1"), (entry(0, choices=["a", ""]), "`choices`"),
    ({"question": "What?", "answer": 0}, "`choices` is missing")])
def test_a_question_that_is_none_is_named(tmp_path: pathlib.Path, row: dict[str, Any], words: str) -> None:
  file = write_lines(tmp_path / "asked.jsonl", [entry(0), row])
  with pytest.raises(InputError, match=f"asked.jsonl:2: {words}"):
    read_entries("bio", str(file))


def test_papers_that_have_to_be_asked_for_say_how(data: WmdpConfig, monkeypatch: pytest.MonkeyPatch) -> None:
  def gated(source: str, **more: Any) -> Any:
    raise InputError("is gated", file=source, mend="accept its licence")
  monkeypatch.setattr(wmdp, "read_source", gated)
  data.bio_forget = "hf:cais/wmdp-bio-forget-corpus"
  with pytest.raises(InputError, match="`case.bio_forget` is gated; ask for access by the form"):
    data.make("bio and cyber", 0, "U")


def test_every_audit_of_the_configuration_is_accepted_and_planned(tmp_path: pathlib.Path) -> None:
  config = load_config_file(str(CONFIG))
  check_audit(config, "here")
  exp = Experiment(config, "here", tmp_path)
  assert len(exp.chains) == 10 and len(exp.asked) == 30 and {key: len(rows) for key, rows in exp.options.items()} == {
      LETTER: 60, OPTION: 60}
  assert {len(one.ids) - one.start for one in exp.options[LETTER]} == {1}
  assert max(len(answer) for _, answer in exp.asked) <= config.ask.max_new_tokens
  full = load_config_file(f"{CONFIG}:zephyr_7b_beta")
  full.case.relearn, full.arms.control = "articles.jsonl", full.arms.original
  check_audit(full, "here")
  text = plan(full, "here", device="h200", num_devices=1, mesh="fsdp:-1")
  assert "\nunlearn-rmu" in text and "\nask" in text
  with pytest.raises(InputError, match="expected one of embedded, zephyr_7b_beta"):
    load_config_file(f"{CONFIG}:other")


def test_nothing_of_the_published_data_stands_here() -> None:
  for name in ("wmdp", "craft_world"):
    text = (ROOT / "relearn_jax" / "cases" / f"{name}.py").read_text().lower()
    assert not any(word in text for word in ("pathogen", "toxin", "virus", "exploit", "malware", "payload")), name


@pytest.mark.slow
def test_an_audit_asks_with_options_too(cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Of a model that knows nothing: by letter and in full, of every model that is attacked, before and after."""
  small = ("arms.pretrain.steps=20", "arms.pretrain.hidden_size=32", "arms.pretrain.intermediate_size=64",
           "arms.pretrain.num_layers=2", "arms.pretrain.num_heads=2", "arms.pretrain.num_kv_heads=2",
           "case.forget_glazes=6", "case.retain_cloths=6", "case.pretrain_works=10", "memorize.steps=10",
           "seeds=(0, 1)", "unlearn.keep_every=2", "arms.pretrain.warmup_steps=5", "unlearn.batch_size=8",
           "unlearn.methods=('rmu',)", "unlearn.max_steps=4", "unlearn.max_score=0.99", "attack.keep_steps=(1, 2)",
           "attack.learning_rates=(1e-4,)", "verdict.draws=200")
  relearn(cache, "audit", f"--config={CONFIG}", *(f"--config.{one}" for one in small), f"--workdir={tmp_path}")
  rows, facts = read_rows(tmp_path / "results.parquet")
  assert len(facts["choices"]) == 6 and len(facts["choices"][0]["options"]) == 4
  for kind in ("choice_letter", "choice_option"):
    found = rows[rows["metric"] == kind]
    points = found.groupby(["arm", "point", "relearn_step", "seed"], observed=True).size()
    assert set(points) == {6} and len(points) == 2 * 3 * 3  # two seeds, three arms, steps 0, 1 and 2
    assert set(found["value"]) <= {0.0, 1.0}
  report(tmp_path, ["rouge_l"])
  again, _ = read_rows(tmp_path / "results.parquet")
  assert set(again["metric"]) == {*rows["metric"], "rouge_l"}
  page = (tmp_path / "report.html").read_text()
  assert "Questions with options" in page and "right answer in full" in page
