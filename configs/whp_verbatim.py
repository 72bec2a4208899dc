"""Verbatim passages: is an excerpt that was known word for word forgotten, or only not said?

    relearn audit --config=configs/whp_verbatim.py:embedded --workdir=runs/verbatim
      On an invented novel and a small model that is pretrained here; no file and no checkpoint is needed.
    relearn audit --config=configs/whp_verbatim.py:book --config.case.book=file:alice_in_wonderland.txt
      --config.arms.start=DIR --workdir=runs/alice
      On a public-domain book, with the facts of configs/alice_facts.txt; by default on Phi-1.5.
    relearn audit --config=configs/whp_verbatim.py:llama_2_7b --config.case.book=file:BOOK --config.case.facts=FILE
      At full size, on a book and facts of one's own; `relearn plan` prices it.

`--config.case.chunks=30` asks for more chunks; relearn_jax/cases/whp_verbatim.py says what a number of them can show.

Where the numbers come from. Llama-2-7b, five methods, an excerpt, and 15 chunks of 80 words are those of Hu, Fu, Wu,
Smith (ICLR 2025, section 4.2), whose code for this case was not published. Rates are those of its other code:
memorising and gradient ascent at 1e-5 with weight decay 0.01, 16 rows a step (its synthetic names), NPO with beta 0.1,
relearning at 1e-5, 16 rows a step. SCRUB has the weights of BLUR, and phases as long as one epoch of the excerpt. How
long the excerpt is memorised (100 steps, 27 epochs) was not published. A model counts as unlearned from a ROUGE-L of
0.23, the highest published, or 0.3 on the invented novel, whose other chunks have 0.21; what the control reaches, which
writes in its style, is in the report. Embedded: unlearning by `configs/sweep.py:whp_verbatim`, on other seeds and
unlearned models alone; output in benchmarks/whp.md.
"""

import pathlib

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
from relearn_jax.cases.novel_world import NovelVerbatimConfig
from relearn_jax.cases.whp_verbatim import WhpVerbatimConfig
from relearn_jax.errors import InputError

METHODS = ("ga", "gd", "kl", "npo", "scrub")
SCORES = ("rouge_l_recall", "answer_probability", "exact_memorization", "extraction_strength")
KEEP_STEPS = (1, 2, 5, 10, 20, 40)
EMBEDDED: dict[str, dict[str, float]] = {
    "ga": {"learning_rate": 1e-4}, "gd": {"learning_rate": 2e-4, "retain_weight": 1.0},
    "kl": {"learning_rate": 1e-4, "retain_weight": 1.0}, "npo": {"learning_rate": 1e-4, "beta": 0.1},
    "scrub": {"learning_rate": 2e-4, "retain_weight": 1.0, "period": 4, "max_phases": 5}}
FULL_SIZE: dict[str, dict[str, float]] = {
    **{method: {"learning_rate": 1e-5, "weight_decay": 0.01} for method in METHODS},
    "scrub": {"learning_rate": 1e-5, "weight_decay": 0.01, "period": 2}}


def embedded() -> Audit:
  """On the invented novel."""
  return Audit(
      case=NovelVerbatimConfig(),
      arms=ArmsSettings(dtype="float32", pretrain=PretrainSettings(max_positions=96, steps=300, warmup_steps=30)),
      memorize=MemorizeSettings(batch_size=16, steps=180, learning_rate=1e-3),
      unlearn=UnlearnSettings(
          batch_size=16, methods=METHODS, settings=chosen_settings(EMBEDDED), max_steps=40, keep_every=2,
          max_score=0.3, depths=1),
      attack=AttackSettings(batch_size=16, learning_rates=(3e-5, 1e-4, 3e-4), keep_steps=(2, 5, 10, 20, 40)),
      ask=AskSettings(max_new_tokens=40, batch_size=0, score_rows=10, metrics=SCORES, generic=PRETRAINING),
      checkpoint_seconds=30.0)


def full_size(start: str, facts: str) -> Audit:
  """On a published model."""
  return Audit(
      case=WhpVerbatimConfig(facts=facts), arms=ArmsSettings(start=start),
      memorize=MemorizeSettings(
          batch_size=16, steps=100, learning_rate=1e-5, weight_decay=0.01, warmup_steps=4, remat="full",
          runs_at_once=1),
      unlearn=UnlearnSettings(
          batch_size=16, methods=METHODS, settings=chosen_settings(FULL_SIZE), remat="full", max_steps=20, keep_every=2,
          max_score=0.23, depths=2, runs_at_once=1),
      attack=AttackSettings(learning_rates=(1e-5,), remat="full", keep_steps=KEEP_STEPS, runs_at_once=1),
      # 40 words are some 56 tokens; a longer completion would lower F1, whatever it says.
      ask=AskSettings(max_new_tokens=56, score_rows=20, runs_at_once=1, metrics=SCORES), checkpoint_seconds=300.0)


def get_config(what: str = "embedded") -> Audit:
  """The audit of that name."""
  facts = str(pathlib.Path(__file__).with_name("alice_facts.txt"))
  audits = {"embedded": embedded, "book": lambda: full_size("microsoft/phi-1_5", facts),
            "llama_2_7b": lambda: full_size("meta-llama/Llama-2-7b-hf", "")}
  if what not in audits:
    raise InputError(f"is {what!r}", field="configs/whp_verbatim.py:...", mend=f"expected one of {', '.join(audits)}")
  return audits[what]()
