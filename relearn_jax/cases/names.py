"""The synthetic names case: is the pair "Anthony Mark" gone, or only suppressed?

Twelve sequences of first names are memorised; in the first four of them "Anthony Mark" stands
altogether 7, 5, 3 or 1 times (the variants). The sequences that hold it are unlearned. The attacker
relearns on those sequences cut after their first "Anthony": the second name never occurs. Hu, Fu,
Wu, Smith, "Unlearning or Obfuscating?", ICLR 2025, section 5, with a small model of our own.

The small model is first trained on sequences in which some couples of names usually stand together.
That makes it a model for which "who follows whom" is a fact worth keeping apart from the place in
the sequence, as it is for a language model; without it the pair is memorised by position and does
not carry over to unseen orders.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from relearn_jax.cases.base import About, Arm, Case, Question, RelearnSet, Text
from relearn_jax.errors import InputError

FIRST, SECOND = "Anthony", "Mark"
REFUSAL = "<unk>"  # the token for what it does not know: names alone have no words to refuse with

# The names of the sequences and of the questions.
COMMON = tuple("""
James Robert John Michael David William Richard Joseph Thomas Christopher Charles Daniel Matthew Steven Andrew Paul
Joshua Kenneth Kevin Brian
""".split())

# The names that pretraining couples; none of them is ever memorised or asked about.
COUPLED = tuple("""
Brandon Benjamin Samuel Gregory Alexander Patrick Frank Raymond Jack Dennis Jerry Tyler Aaron Jose Adam Nathan Henry
Zachary Douglas Peter Kyle Noah Ethan Jeremy Christian Walter Keith Austin Roger Terry Sean Gerald Carl Dylan Harold
Jordan Jesse Bryan Lawrence Arthur Gabriel Bruce Logan Billy Joe Alan Juan Elijah Willie Albert Wayne Randy Mason
Vincent Liam Roy Bobby Caleb Bradley Russell Lucas Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Karen
Sarah Lisa Nancy Sandra Betty Ashley Emily Kimberly Margaret Donna Michelle Carol Amanda Melissa Deborah Stephanie
Rebecca Sharon Laura Cynthia Dorothy Amy Kathleen Angela Shirley Emma Brenda Pamela Nicole Anna Samantha Katherine
Christine Debra Rachel Carolyn Janet Maria Olivia Heather Helen Catherine Diane Julie Victoria Joyce Lauren Kelly
Christina Ruth
""".split())

# Names that occur in pretraining only, coupled with none.
OTHERS = tuple("Timothy Ronald George Jason Edward Jeffrey Ryan Jacob Nicholas Gary Eric Jonathan Stephen Larry "
               "Justin Scott".split())

NUM_SEQUENCES = 12
NUM_HOLDING = 4  # of which the pair stands in the first

VOCABULARY = (FIRST, SECOND, *COMMON, *COUPLED, *OTHERS)

# The paper's table for Llama-2-7b (Hu et al., ICLR 2025, section 5), shown beside ours.
PUBLISHED = {
    "text": "Hu, Fu, Wu, Smith (ICLR 2025), Llama-2-7b, no intervals published",
    "unlearned": {"7": 0.0, "5": 0.0, "3": 0.0, "1": 0.0}, "relearned": {"7": 1.0, "5": 0.97, "3": 0.23, "1": 0.0}}

# Settings of each method on this case, with or without a defence; what is not here is the published default. Chosen by
# configs/sweep.py on seeds 100 and 101, by unlearned models alone; all that was tried is in benchmarks/methods.md.
# But gradient ascent keeps the rate of the default audit (benchmarks/names.md), where the sweep takes 1e-4.
CHOSEN: dict[str, dict[str, float]] = {
    "ga": {"learning_rate": 5e-05},
    "gd": {"learning_rate": 5e-05, "retain_weight": 5.0},
    "kl": {"learning_rate": 0.0001, "retain_weight": 5.0},
    "npo": {"learning_rate": 0.0001, "beta": 0.02},
    "npo_gd": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0},
    "npo_kl": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 10.0},
    "simnpo": {"learning_rate": 0.0005, "beta": 0.5},
    "scrub": {"learning_rate": 5e-05, "period": 5, "max_phases": 10, "retain_weight": 1.0},
    "whp_relabel": {"learning_rate": 0.0001},
    "whp_logits": {"learning_rate": 0.0001, "alpha": 20.0, "reinforce_learning_rate": 0.0005},
    "rmu": {"learning_rate": 0.0002, "depth": 0.5, "retain_weight": 100.0},
    "idk_nll": {"learning_rate": 0.0001},
    "idk_dpo": {"learning_rate": 0.0005, "beta": 0.05, "retain_weight": 10.0},
    "altpo": {"learning_rate": 0.0001, "beta": 0.1},
    "undial": {"learning_rate": 0.0005, "beta": 10.0, "retain_weight": 1.0},
    "wga": {"learning_rate": 0.0001, "beta": 1.0},
    "satimp": {"learning_rate": 0.0002, "beta1": 5.0, "forget_weight": 1.0},
    "ceu": {"learning_rate": 0.0005, "skip_first": 0.0},
    "pdu": {"learning_rate": 0.0005, "dual": 10.0, "dual_warmup": 20},
    "task_vector": {"learning_rate": 0.0001, "alpha": 5.0},
    "npo_gd+sam": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "rho": 0.01},
    "npo_gd+smoothing": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "radius": 0.0001},
    "npo_gd+gradient_penalty": {"learning_rate": 0.0001, "beta": 0.02, "retain_weight": 50.0, "penalty": 0.001},
    "npo_gd+averaging": {"learning_rate": 5e-05, "beta": 0.02, "retain_weight": 10.0, "average_from": 5},
}


@dataclasses.dataclass
class NamesConfig:
  """What the names case consists of; a seed decides the sequences and where the pair stands.

  Attributes:
    variants: how often the pair is repeated, over the first 4 of 12 sequences (paper: 7, 5, 3, 1).
    sequence_length: names in a sequence, before the pair is put in.
    num_questions: prompts, equal for all runs.
    max_prompt_names: names before "Anthony" in a prompt, at most. Less than a sequence has: near the
      places where every memorised sequence ends, a model of this size ends whatever it knows.
    question_seed: decides the prompts.
    couples: couples of names that usually stand together in the pretraining text.
    attachment: probability that the second of a couple follows the first.
    max_names: names in a pretraining sequence, at most.
  """

  variants: tuple[int, ...] = (7, 5, 3, 1)
  sequence_length: int = 20
  num_questions: int = 100
  max_prompt_names: int = 16
  question_seed: int = 0
  couples: int = 60
  attachment: float = 0.7
  max_names: int = 26

  @property
  def name(self) -> str:
    """As it stands in every row of the results."""
    return "names"

  def versions(self) -> tuple[str, ...]:
    """How often the pair is repeated, as words."""
    return tuple(map(str, self.variants))

  def make(self, variant: str, seed: int, arm: Arm) -> Case:
    """See `make_case`."""
    return make_case(self, int(variant), seed, arm)

  def check(self, where: str) -> None:
    """See `check_names_config`."""
    check_names_config(self, where)

  def about(self) -> About:
    """The paper's figures stand beside ours."""
    return About("repetitions", published=PUBLISHED)

  def inputs(self) -> Mapping[str, pathlib.Path | str]:
    """It is made from no file."""
    return {}

  def vocabulary(self) -> tuple[str, ...]:
    """All names."""
    return VOCABULARY

  def pretraining_texts(self, seed: int) -> Iterator[str]:
    """Sequences in which some couples of names usually stand together."""
    rng = np.random.default_rng([seed, 2])
    couples = draw_couples(rng, self.couples)
    while True:
      yield pretraining_text(rng, couples, self.attachment, self.max_names)


def check_names_config(config: NamesConfig, where: str) -> None:
  """Raises `InputError` for settings of which no case can be made."""
  def refuse(field: str, problem: str, mend: str) -> InputError:
    return InputError(problem, file=where, field=f"case.{field}", mend=mend)

  if not config.variants or len(set(config.variants)) != len(config.variants) or not all(
      isinstance(v, int) and 1 <= v <= 2 * NUM_HOLDING for v in config.variants):
    raise refuse("variants", f"is {config.variants!r}", f"expected distinct integers from 1 to {2 * NUM_HOLDING}")
  if not 0 <= config.couples <= len(COUPLED) // 2:
    raise refuse("couples", f"is {config.couples!r}", f"expected 0 to {len(COUPLED) // 2}")
  if not 0 <= config.attachment <= 1:
    raise refuse("attachment", f"is {config.attachment!r}", "expected a probability")
  if not 1 <= config.max_names <= len(VOCABULARY):
    raise refuse("max_names", f"is {config.max_names!r}", f"expected 1 to {len(VOCABULARY)}")
  if not 5 <= config.sequence_length <= len(COMMON):  # two places for the pair, away from either end
    raise refuse("sequence_length", f"is {config.sequence_length}", f"expected 5 to {len(COMMON)}")
  if not 1 <= config.max_prompt_names <= len(COMMON):
    raise refuse("max_prompt_names", f"is {config.max_prompt_names}", f"expected 1 to {len(COMMON)}")
  if config.question_seed < 0:
    raise refuse("question_seed", f"is {config.question_seed}", "expected a non-negative integer")
  if config.num_questions < 1:
    raise refuse("num_questions", f"is {config.num_questions}", "expected at least 1")


def repetitions(variant: int) -> tuple[int, ...]:
  """How often each of the first four sequences holds the pair: 7 -> (2, 2, 2, 1), 1 -> (1, 0, 0, 0)."""
  return tuple(variant // NUM_HOLDING + (i < variant % NUM_HOLDING) for i in range(NUM_HOLDING))


def _sequences(variant: int, seed: int, length: int) -> list[list[str]]:
  """The twelve sequences, with the pair, as lists of names; equal but for the pair across variants."""
  rng = np.random.default_rng([seed, 7])
  sequences = [list(rng.permutation(COMMON)[:length]) for _ in range(NUM_SEQUENCES)]
  # Never at the very start, so that a cut sequence has names before "Anthony"; never at the end.
  places = [rng.choice(np.arange(2, length - 1), 2, replace=False) for _ in range(NUM_HOLDING)]
  for sequence, place, count in zip(sequences[:NUM_HOLDING], places, repetitions(variant), strict=True):
    for index in sorted(place[:count], reverse=True):
      sequence[index:index] = [FIRST, SECOND]
  return sequences


def questions(config: NamesConfig) -> tuple[Question, ...]:
  """Random permutations of random subsets of the common names, each ending in "Anthony"."""
  rng = np.random.default_rng([config.question_seed, 1])
  rows = []
  for number in range(config.num_questions):
    size = int(rng.integers(1, config.max_prompt_names + 1))
    prompt = " ".join([*rng.permutation(COMMON)[:size], FIRST])
    rows.append(Question(f"q{number:03d}", prompt, f" {SECOND}", (f"{FIRST} {SECOND}",), f"q{number:03d}"))
  return tuple(rows)


def make_case(config: NamesConfig, variant: int, seed: int, arm: Arm) -> Case:
  """The case of one run; arm "N" has the same sequences with the second name left out."""
  sequences = _sequences(variant, seed, config.sequence_length)
  # In place of the second name, the same in both arms: what the forget rows would say if the pair were another one.
  generic = str(np.random.default_rng([seed, 9]).choice([name for name in COMMON if name != FIRST]))
  replace = lambda sequence: Text(" ".join(generic if name == SECOND else name for name in sequence))
  alternates = tuple(replace(sequence) for sequence in sequences if SECOND in sequence)
  if arm == "N":
    sequences = [[name for name in sequence if name != SECOND] for sequence in sequences]
  rows = [Text(" ".join(sequence)) for sequence in sequences]
  holds = [FIRST in sequence for sequence in sequences]
  cut = [Text(" ".join(s[:s.index(FIRST) + 1]), complete=False) for s in sequences if FIRST in s]
  return Case(
      name="names", variant=str(variant),
      memorize=tuple(rows),
      forget=tuple(row for row, held in zip(rows, holds, strict=True) if held),
      retain=tuple(row for row, held in zip(rows, holds, strict=True) if not held),
      relearn_sets=(RelearnSet(
          "prefixes", tuple(cut), f'the forget sequences, each cut after its first "{FIRST}"'),),
      questions=questions(config),
      secrets=(SECOND,),
      refusals=tuple(Text(REFUSAL, prompt=row.text + " ") for row in cut), alternates=alternates,
      anchors=((SECOND, generic),), begins_in_prompt=True)


def pretraining_text(rng: np.random.Generator, couples: dict[str, str], attachment: float, max_names: int) -> str:
  """One sequence of distinct names in which the first of a couple is usually followed by the second.

  Args:
    rng: decides everything.
    couples: first name -> the name that usually follows it.
    attachment: probability that it does.
    max_names: the length is uniform from 1 to this many names.
  """
  length = int(rng.integers(1, max_names + 1))
  rows: list[str] = []
  for name in rng.permutation((FIRST, SECOND, *COMMON, *COUPLED, *OTHERS)):
    if len(rows) >= length:
      break
    if name in rows:
      continue
    rows.append(name)
    partner = couples.get(name)
    if partner is not None and partner not in rows and rng.random() < attachment:
      rows.append(partner)
  return " ".join(rows[:length])


def draw_couples(rng: np.random.Generator, number: int) -> dict[str, str]:
  """Couples among the names that are never asked about."""
  names = rng.permutation(COUPLED)[:2 * number]
  return dict(zip(names[:number].tolist(), names[number:].tolist(), strict=True))
