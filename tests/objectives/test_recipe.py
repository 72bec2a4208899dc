"""The tables of methods and defences, their settings and what help says of them."""

import dataclasses
import math

import pytest

from relearn_jax.errors import InputError
from relearn_jax.objectives.methods import DEFENCES, METHODS, get_defence, get_method
from relearn_jax.objectives.recipe import (
  DefenceSettings,
  MethodSettings,
  Recipe,
  default_recipe,
  make_recipe,
  method_help,
)


def test_unknown_methods_name_the_nearest() -> None:
  with pytest.raises(InputError, match="'nop', which is no unlearning method.*nearest: npo.*one of ga, gd") as got:
    get_method("nop")
  assert got.value.field == "method"
  with pytest.raises(InputError, match="'smooth', which is no defence.*nearest: smoothing.*one of none, sam") as got:
    get_defence("smooth")
  assert got.value.field == "defence" and get_defence("none") is None


@pytest.mark.parametrize("name,hyper,field", [
    ("npo", {"beta": 0.0}, "beta"), ("npo", {"beta": math.nan}, "beta"), ("npo", {"beta": math.inf}, "beta"),
    ("gd", {"retain_weight": -1.0}, "retain_weight"), ("kl", {"retain_weight": math.inf}, "retain_weight"),
    ("rmu", {"depth": 1.5}, "depth"), ("rmu", {"depth": 0.0}, "depth"), ("scrub", {"period": 0.5}, "period"),
    ("ceu", {"skip_first": 2.0}, "skip_first"), ("pdu", {"dual": -1.0}, "dual"),
    ("task_vector", {"alpha": 0.0}, "alpha"), ("whp_logits", {"reinforce_steps": 0}, "reinforce_steps")])
def test_hyper_parameters_outside_their_domain_are_named(name: str, hyper: dict[str, float], field: str) -> None:
  values = dataclasses.replace(getattr(MethodSettings(), name), **hyper)
  with pytest.raises(InputError, match="expected an? (finite number|integer)") as caught:
    make_recipe(name, values)
  assert caught.value.field == f"methods.{name}.{field}"


def test_a_defence_has_settings_of_its_own() -> None:
  defences = DefenceSettings()
  made = make_recipe("npo", MethodSettings().npo, "sam", defences.sam)
  assert made.name == "npo+sam" and made.hyper == {"beta": 0.1, "rho": 0.01} and not made.objective.divisible
  with pytest.raises(InputError, match="expected an integer above 0") as caught:
    make_recipe("npo", MethodSettings().npo, "smoothing", dataclasses.replace(defences.smoothing, draws=0))
  assert caught.value.field == "defences.smoothing.draws"
  for method, entry in METHODS.items():  # or one would overwrite the other
    assert not any(entry.settings.keys() & defence.settings.keys() for defence in DEFENCES.values()), method


@pytest.mark.parametrize("name", METHODS)
def test_published_defaults_are_in_their_domain(name: str) -> None:
  recipe = make_recipe(name, getattr(MethodSettings(), name))
  assert recipe == Recipe(name, default_recipe(name).hyper) and recipe.objective.rows
  assert set(recipe.traced) == {key for key, s in METHODS[name].settings.items() if not s.static}


def test_what_is_fixed_is_not_replaced_by_what_is_traced() -> None:
  recipe = default_recipe("rmu", depth=0.5)
  needs = recipe.build({"depth": object(), "steering": 1.0}).needs
  assert [need.setting for need in needs] == [0.5]


def test_help_tells_formula_needs_defaults_and_source() -> None:
  text = method_help()
  for name, entry in {**METHODS, **DEFENCES}.items():
    part = text.split(f"\n  {name}\n")[1].split("\n\n")[0]
    assert entry.formula in part and f"source: {entry.source}" in part
    for key, setting in entry.settings.items():
      assert f"{key} = {setting.default:g}: " in part
  assert "reads: forget, retain; cached: hidden on forget, hidden on retain" in text.split("\n  scrub\n")[1]
  assert max(map(len, text.splitlines())) < 200
