"""The search of attacks: what is drawn, and that the best is chosen on one half and reported on the other."""

import dataclasses

import numpy as np
import pytest

from relearn_jax.audit.audit_config import SearchSettings
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.evidence import RETAIN
from relearn_jax.audit.grid import attacks
from relearn_jax.audit.search import find_strongest, halves
from relearn_jax.audit.seed_tables import Key, Table
from relearn_jax.audit.thresholds import Design, VerdictSettings
from relearn_jax.audit.verdict import judge
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError

from ..command import ROOT
from .synthetic import CHECKED

SEEDS, QUESTIONS = tuple(range(6)), tuple(f"q{i:02d}" for i in range(40))
SEARCH = dataclasses.asdict(SearchSettings(trials=3))
SETTINGS, DESIGN = VerdictSettings(draws=200), Design(SEEDS)


def table(value: float | np.ndarray) -> Table:
  return Table(SEEDS, QUESTIONS, np.broadcast_to(value, (6, 40)).astype(float), (10,) * 6)


def tables(scores: dict[float, float | np.ndarray], kept: dict[float, float]) -> dict[Key, Table]:
  """Attacks by learning rate: U after each, and a token's log-probability on retained text."""
  def key(arm: str, point: str, depth: int | None, rate: float | None, metric: str) -> Key:
    attack = ("prefixes", "full", rate, 20) if rate else (None, None, None, 0)
    return Key("7", arm, None if arm == "O" else "ga", point, depth, *attack, metric)
  known = {"asr": 1.0, RETAIN: -0.5}
  found = {key("O", "original", None, None, metric): table(value) for metric, value in known.items()}
  for arm in "UN":
    found |= {key(arm, "unlearned", 0, None, "asr"): table(0.0), key(arm, "unlearned", 0, None, RETAIN): table(-0.5)}
    for rate, score in scores.items():
      found[key(arm, "relearned", 0, rate, "asr")] = table(score if arm == "U" else 0.0)
      found[key(arm, "relearned", 0, rate, RETAIN)] = table(kept[rate])
  return found


def test_the_strongest_that_spares_utility_is_chosen_and_reported_elsewhere() -> None:
  """The middle rate is best on the first half; the highest costs more utility than allowed."""
  first_seeds, other = halves(6, SEARCH["seed"])
  assert sorted([*first_seeds, *other]) == list(range(6)) and len(first_seeds) == len(other) == 3
  middle = np.full((6, 40), 0.2)
  middle[first_seeds] = 0.9
  scores: dict[float, float | np.ndarray] = {1e-4: 0.4, 1e-3: middle, 1e-2: 1.0}
  found = find_strongest(tables(scores, {1e-4: -0.5, 1e-3: -0.6, 1e-2: -3.0}), "7", "ga", SEARCH, SETTINGS, DESIGN)
  assert (found["learning_rate"], found["tried"], found["allowed"]) == (1e-3, 3, 2)
  assert found["chosen_excess"] == pytest.approx(0.9) and found["excess"] == pytest.approx(0.2)
  assert found["seeds"] == tuple(other) and found["unlearned"]["mean"] == pytest.approx(0.2)
  assert found["unlearned"]["low"] <= 0.2 <= found["unlearned"]["high"] and found["control"]["mean"] == 0.0


def test_no_range_of_rates_is_asked_of_drawn_attacks() -> None:
  """Each has a rate of its own; the grid's own attack spans none here, and is asked for one."""
  scores: dict[float, float | np.ndarray] = {1e-4: 0.0}
  grid = tables(scores, {1e-4: -0.5})
  drawn = {key._replace(adapter="full, batch 2"): one for key, one in grid.items() if key.adapter}
  alone, both = (judge(some, "7", "ga", CHECKED, SETTINGS, DESIGN).reason for some in (grid, grid | drawn))
  assert alone.count("rates still to be tried") == both.count("rates still to be tried") == 1
  assert "adapter full, batch 2" not in both


def test_where_there_is_nothing_to_choose_it_says_so() -> None:
  scores: dict[float, float | np.ndarray] = {1e-2: 1.0}
  found = find_strongest(tables(scores, {1e-2: -3.0}), "7", "ga", SEARCH, SETTINGS, DESIGN)
  assert found["depth"] is None and found["note"] == "no attack keeps enough of the utility"
  few = {key: dataclasses.replace(one, seeds=SEEDS[:5], values=one.values[:5], unlearn_steps=(10,) * 5)
         for key, one in tables(scores, {1e-2: -0.5}).items()}
  assert "5 seeds are too few" in find_strongest(few, "7", "ga", SEARCH, SETTINGS, DESIGN)["note"]
  assert "no run reached" in find_strongest(tables(scores, {1e-2: -0.5}), "7", "kl", SEARCH, SETTINGS, DESIGN)["note"]


def test_attacks_are_drawn_within_their_bounds_and_again_alike() -> None:
  config = load_config_file(str(ROOT / "configs" / "names.py"))
  config.attack.learning_rates = (1e-4,)
  config.attack.search = SearchSettings(trials=20, lowest_rate=1e-5, highest_rate=1e-2, adapters=("full", "lora4"),
                                        batch_sizes=(0, 2), seed=3)
  drawn = attacks(config, ("prefixes",))
  assert drawn == attacks(config, ("prefixes",)) and len(drawn) == len(set(drawn)) == 21
  rates = np.array([attack.learning_rate for attack in drawn[1:]])
  assert (rates >= 1e-5).all() and (rates <= 1e-2).all() and np.median(rates) < 1e-3  # evenly on a log scale
  assert {attack.adapter for attack in drawn} == {"full", "lora4"}
  assert {attack.trained for attack in drawn[1:]} <= {
      f"{adapter}, batch {size}" for adapter in ("full", "lora4") for size in ("of all rows", "2")}
  with pytest.raises(InputError, match=r"`seeds` is \(0, 1, 2\); expected at least 6"):
    check_audit(config, "here")
