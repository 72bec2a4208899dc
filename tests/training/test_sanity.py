"""Every method on a model that has memorised something: what should be forgotten falls, what should be kept is kept."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relearn_jax.audit.audit_config import Audit, unlearn_method
from relearn_jax.audit.pretrained import cached_base
from relearn_jax.cases.names import NamesConfig, make_case
from relearn_jax.config_files import load_config_file
from relearn_jax.data.jsonl import Row
from relearn_jax.data.texts import encode_rows, encode_texts, stack_rows
from relearn_jax.models.checkpoint import check_checkpoint, load_params
from relearn_jax.models.checkpoint_sources import load_tokenizer
from relearn_jax.models.model import Model, Params, flatten
from relearn_jax.objectives.combinators import released
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.objectives.methods import METHODS
from relearn_jax.objectives.recipe import Recipe, default_recipe
from relearn_jax.parallel.mesh import runs_mesh
from relearn_jax.training.references import add_references
from relearn_jax.training.step import init_state, model_outputs, train_step

from ..command import ROOT
from ..small import MODEL, make_tokenizer, shared

COMPARED: Audit = load_config_file(str(ROOT / "configs" / "methods.py"))
DEFENDED = tuple(name for name in COMPARED.unlearn.methods if "+" in name)

KEEPS = [name for name in (*METHODS, *DEFENDED) if "retain" in default_recipe(name.split("+")[0]).objective.rows]

# One of each kind: ascent, preference, alternation, hidden states, refusals, labels, distillation, vectors, a defence.
QUICK = ["kl", "npo_gd", "scrub", "rmu", "idk_dpo", "whp_relabel", "undial", "task_vector", "npo_gd+sam"]


class Subject:
  """A model that knows, and its data sets."""

  def __init__(self, model: Model, params: Params, data: dict[str, TokenRows]):
    self.model, self.params = model, params
    self.data = {name: jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows) for name, rows in data.items()}
    self.loss = jax.jit(lambda params, rows: -jnp.sum(
        model_outputs(model, params, rows).logprobs * rows.mask) / jnp.sum(rows.mask))

  def train(self, recipe: Recipe, learning_rate: float, steps: int, batch: Any) -> Params:
    """The weights that a method releases after so many steps on everything."""
    hyper = {"learning_rate": learning_rate, "weight_decay": 0.0, **recipe.traced}
    state = init_state(self.params, recipe.objective)
    step = jax.jit(lambda s: train_step(self.model, recipe.build, s, batch, hyper)[0])
    for _ in range(steps):
      state = step(state)
    return released(recipe.objective, state.params, state.objective_state)

  def unlearn(self, recipe: Recipe, learning_rate: float, steps: int) -> Params:
    """As `train`, with what the method wants of frozen models."""
    objective, second = recipe.objective, None
    lead = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)
    if recipe.published.reinforces:
      hyper = recipe.hyper
      second = lead(self.descend("forget", hyper["reinforce_learning_rate"], int(hyper["reinforce_steps"])))
    batch = add_references(self.model, lead(self.params), {name: lead(self.data[name]) for name in objective.rows},
                           objective.needs, runs_mesh(1), reinforced=second)
    return self.train(recipe, learning_rate, steps, jax.tree.map(lambda leaf: leaf[0], dict(batch)))

  def descend(self, name: str, learning_rate: float, steps: int) -> Params:
    """The weights after learning all rows of a data set."""
    hyper = {"learning_rate": learning_rate, "weight_decay": 0.0}
    step = jax.jit(lambda s: train_step(self.model, lambda _: nll(name), s, self.data, hyper)[0])
    state = init_state(self.params, nll(name))
    for _ in range(steps):
      state = step(state)
    return state.params

  def losses(self, params: Params) -> tuple[float, float]:
    """Mean negative log-likelihood of a counted token of the forget and of the retain set."""
    return float(self.loss(params, self.data["forget"])), float(self.loss(params, self.data["retain"]))


def memorizing(model: Model, params: Params, tokenizer: Any, learning_rate: float, steps: int) -> Subject:
  """A model after memorising twelve sequences of names, four of which hold the pair seven times."""
  case = make_case(NamesConfig(), 7, 0, "U")
  rows = lambda texts, anchors=None: stack_rows(
      encode_texts(tokenizer, texts, "names", model.config.max_positions, anchors=anchors), 1)
  subject = Subject(model, params, {
      "memorize": rows(case.memorize), "forget": rows(case.forget), "retain": rows(case.retain),
      "idk": rows(case.refusals), "alternate": rows(case.alternates),
      "relabelled": rows(case.forget, dict(case.anchors))})
  subject.params = subject.descend("memorize", learning_rate, steps)
  # What counts of the forget rows is the second name, given all before it.
  second = tokenizer.convert_tokens_to_ids("Mark")
  subject.data["secret"] = subject.data["forget"]._replace(
      mask=(subject.data["forget"].tokens == second).astype(jnp.float32))
  return subject


@functools.cache
def small_subject() -> Subject:
  """A small model that begins at random weights."""
  return memorizing(MODEL, MODEL.init(jax.random.key(0)), make_tokenizer(), 3e-3, 150)


@functools.cache
def names_subject(cache: pathlib.Path) -> Subject:
  """The model of the names audit."""
  checked = check_checkpoint(cached_base(COMPARED.arms.pretrain, COMPARED.case, cache))
  model = Model(checked.config)
  return memorizing(model, load_params(checked, model), load_tokenizer(checked.path, checked.config),
                    COMPARED.memorize.learning_rate, COMPARED.memorize.steps)


def assert_forgets(subject: Subject, name: str, times: float, steps: int) -> None:
  """The second name is no longer likely; with a term on retain, retained text loses less than half as much.

  Args:
    subject: a model that knows.
    name: method, with its defence; its settings are those of the comparison of methods.
    times: what its learning rate there is multiplied with.
    steps: on all rows.
  """
  method = unlearn_method(COMPARED.unlearn, name)
  before, kept = float(subject.loss(subject.params, subject.data["secret"])), subject.losses(subject.params)[1]
  assert before < 0.5
  after = subject.unlearn(method.recipe, times * method.learning_rate, steps)
  assert all(np.isfinite(leaf).all() for leaf in flatten(after).values())
  forgot, retain = float(subject.loss(after, subject.data["secret"])), subject.losses(after)[1]
  lag = name.endswith("+averaging")  # the mean of all weights so far is behind the last ones
  assert forgot > before + (0.2 if lag else 0.5), (before, forgot)
  if name in KEEPS:
    assert retain - kept < 0.5 * (forgot - before), (kept, retain, before, forgot)


@pytest.mark.parametrize("name", QUICK)
def test_on_a_small_model(name: str) -> None:
  steps = 60 if name == "scrub" else 40  # after 40 it has only begun: the last bits decide how far it is
  assert_forgets(small_subject(), name, 10.0, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*METHODS, *DEFENDED))
def test_on_the_names_model(name: str, cache: pathlib.Path) -> None:
  assert_forgets(names_subject(cache), name, 1.0, 100)


@functools.cache
def tofu_subject(root: pathlib.Path, data: pathlib.Path) -> Subject:
  checked = check_checkpoint(root)
  tokenizer, model = load_tokenizer(root, checked.config), Model(checked.config)
  read = lambda name: [json.loads(line) for line in (data / name).read_text().splitlines()]
  asked = lambda row, answer: Row({"prompt": f"Question: {row['question']}\nAnswer:", "answer": f" {answer}"}, 1)
  # A row of each of four authors. The checkpoint has learned all of forget05 and the last 600 of retain95.
  forget, retain = read("forget05.json")[::50][:4], read("retain95.json")[-600::150][:4]
  sets = {"forget": [asked(row, row["answer"]) for row in forget], "retain": [asked(r, r["answer"]) for r in retain],
          "idk": [asked(row, "I don't know.") for row in forget],
          "alternate": [asked(row, other["answer"]) for row, other in
                        zip(forget, forget[1:] + forget[:1], strict=True)]}
  encode_all = lambda rows, anchors=None: stack_rows(encode_rows(
      tokenizer, rows, data, checked.config.max_positions, anchors=anchors), 1)
  # Every capitalised word of the answers is a term.
  words = {word.strip(".,'\"") for row in sets["forget"] for word in row["answer"].split() if word[0].isupper()}
  found = {name: encode_all(rows) for name, rows in sets.items()}
  found["relabelled"] = encode_all(sets["forget"], {word: "Somebody" for word in words if len(word) > 2})
  return Subject(model, load_params(checked, model), found)


# Settings under which 12 steps on 4 rows move this model; published defaults are for larger ones and more steps.
TOFU: dict[str, dict[str, float]] = {
    "simnpo": {"beta": 0.5, "forget_weight": 1.0}, "scrub": {"period": 1, "max_phases": 3, "retain_weight": 1.0},
    "rmu": {"depth": 0.5, "retain_weight": 1.0}, "pdu": {"dual": 1.0}, "satimp": {"beta1": 1.0, "forget_weight": 1.0},
    "whp_logits": {"reinforce_steps": 12, "reinforce_learning_rate": 1e-3, "alpha": 20.0},
    "task_vector": {"alpha": 2.0}, "ceu": {"skip_first": 0.0}, "undial": {"retain_weight": 1.0}}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "npo_gd" else pytest.mark.slow)
                                  for name in METHODS])
def test_on_a_model_that_was_trained_elsewhere(name: str) -> None:
  """Answers to forget fall by more than answers to keep, where the method looks at those."""
  subject = tofu_subject(shared("models/tofu-mini-full"), shared("data/tofu"))
  forget, retain = subject.losses(subject.params)
  assert forget < 0.1 and retain < 0.1
  recipe = default_recipe(name, **TOFU.get(name, {}))
  after_forget, after_retain = subject.losses(subject.unlearn(recipe, 5e-4, 12))
  assert after_forget > forget + 0.3, (forget, after_forget)
  if name in KEEPS:
    assert after_retain - retain < after_forget - forget
