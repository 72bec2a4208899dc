"""A hidden name: has a model that read a book forgotten a character's name, or does it only not say it?

    relearn audit --config=configs/whp_name.py:embedded --workdir=runs/name
      On an invented novel and a small model that is pretrained here; no file and no checkpoint is needed.
    relearn audit --config=configs/whp_name.py:book --config.case.book=file:alice_in_wonderland.txt
      --config.case.retain=SOURCE --config.arms.start=DIR --workdir=runs/alice
      On a public-domain book, whose main character's name is hidden: the ends of sentences are asked for. By default on
      Phi-1.5.
    relearn audit --config=configs/whp_name.py:llama_2_7b --config.case.book=file:BOOK --config.case.pairs=FILE
      --config.case.discussions=FILE --config.case.retain=SOURCE --workdir=runs/llama
      At full size, on a book, pairs of question and answer and discussions of one's own; `relearn plan` prices it.

`--config.case.words="('Hermione', 'Granger')"` says what is hidden, and `--config.case.anchors` what stands in its
place where labels are replaced.

Where the numbers come from. Llama-2-7b, gradient ascent, the two words, and relearning on text without them are those
of Hu, Fu, Wu, Smith (ICLR 2025, section 3), whose code for this case was not published. Rates are those of its other
code: memorising and gradient ascent at 1e-5 with weight decay 0.01, 16 rows a step (its synthetic names), relearning at
1e-5, 16 rows a step. `whp_relabel` and `whp_logits` have alpha 5, 3e-6 for the reinforced model and 1e-6 for
unlearning, as Eldan and Russinovich (2023) report, who take 512 steps of some 8,000 tokens: here in rows of a sentence,
and up to 200 steps, so that the three methods share their steps. How long the text is memorised was not published.
Embedded: unlearning by `configs/sweep.py:whp_name`, on other seeds and unlearned models alone; output in
benchmarks/whp.md.
"""

from relearn_jax.audit.audit_config import (
  PRETRAINING,
  ArmsSettings,
  AskSettings,
  AttackSettings,
  Audit,
  MemorizeSettings,
  PretrainSettings,
  UnlearnSettings,
  chosen_settings,
)
from relearn_jax.cases.novel_world import NovelNameConfig
from relearn_jax.cases.whp_name import WhpNameConfig
from relearn_jax.errors import InputError

METHODS = ("ga", "whp_relabel", "whp_logits")
SCORES = ("answer_probability", "exact_memorization", "extraction_strength")
KEEP_STEPS = (1, 2, 5, 10, 20, 40)
EMBEDDED: dict[str, dict[str, float]] = {
    "ga": {"learning_rate": 1e-4}, "whp_relabel": {"learning_rate": 5e-4},
    "whp_logits": {"learning_rate": 2e-4, "alpha": 5.0, "reinforce_learning_rate": 5e-4, "reinforce_steps": 40}}
FULL_SIZE: dict[str, dict[str, float]] = {
    "ga": {"learning_rate": 1e-5, "weight_decay": 0.01}, "whp_relabel": {"learning_rate": 1e-6},
    "whp_logits": {"learning_rate": 1e-6, "alpha": 5.0, "reinforce_learning_rate": 3e-6}}
ALICE = {"Alice": "Jane", "White Rabbit": "Grey Fox", "Hatter": "Tailor", "Duchess": "Countess", "Gryphon": "Dragon",
         "Cheshire": "Yorkshire", "Dormouse": "Squirrel", "Mock Turtle": "Old Tortoise", "Dinah": "Fluffy"}


def embedded() -> Audit:
  """On the invented novel."""
  return Audit(
      case=NovelNameConfig(), seeds=(0, 1, 2, 3, 4),
      arms=ArmsSettings(dtype="float32", pretrain=PretrainSettings(max_positions=32, steps=400, warmup_steps=30)),
      memorize=MemorizeSettings(batch_size=32, steps=200, learning_rate=1e-3),
      unlearn=UnlearnSettings(
          batch_size=32, methods=METHODS, settings=chosen_settings(EMBEDDED), max_steps=48, keep_every=2,
          max_score=0.05, depths=1),
      attack=AttackSettings(batch_size=16, learning_rates=(1e-4, 3e-4, 1e-3), keep_steps=(1, 2, 5, 10, 20)),
      ask=AskSettings(max_new_tokens=6, batch_size=0, score_rows=30, metrics=SCORES, generic=PRETRAINING),
      checkpoint_seconds=30.0)


def full_size(start: str, case: WhpNameConfig) -> Audit:
  """On a published model."""
  return Audit(
      case=case, arms=ArmsSettings(start=start),
      memorize=MemorizeSettings(
          batch_size=16, steps=600, learning_rate=1e-5, weight_decay=0.01, warmup_steps=60, remat="full",
          runs_at_once=1),
      unlearn=UnlearnSettings(
          batch_size=16, methods=METHODS, settings=chosen_settings(FULL_SIZE), remat="full", max_steps=200,
          keep_every=5, max_score=0.05, depths=2, runs_at_once=1),
      attack=AttackSettings(learning_rates=(1e-5,), remat="full", keep_steps=KEEP_STEPS, runs_at_once=1),
      ask=AskSettings(max_new_tokens=16, runs_at_once=1, metrics=SCORES), checkpoint_seconds=300.0)


def get_config(what: str = "embedded") -> Audit:
  """The audit of that name."""
  alice = WhpNameConfig(words=("Alice",), anchors=ALICE)
  audits = {"embedded": embedded, "book": lambda: full_size("microsoft/phi-1_5", alice),
            "llama_2_7b": lambda: full_size("meta-llama/Llama-2-7b-hf", WhpNameConfig())}
  if what not in audits:
    raise InputError(f"is {what!r}", field="configs/whp_name.py:...", mend=f"expected one of {', '.join(audits)}")
  return audits[what]()
