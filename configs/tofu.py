"""TOFU's hidden titles: are the books of fictitious authors forgotten, or only not said?

    relearn audit --config=configs/tofu.py:embedded --workdir=runs/tofu
      On invented authors and a small model that is pretrained here; no file and no checkpoint is needed.
    relearn audit --config=configs/tofu.py:mini --config.arms.original=DIR --config.arms.control=DIR
      --config.case.forget=forget05.json --config.case.retain=retain95.json --workdir=runs/mini
      On checkpoints that were trained on forget05 and the last 600 rows of retain95, and on those 600 alone. With
      :mini_grid also RMU, three depths, and attacks at two learning rates each.
    relearn audit --config=configs/tofu.py:phi_1_5 (or :llama_2_7b) --workdir=runs/phi
      At full size: the published models learn TOFU, unlearn forget05, and are attacked; `relearn plan` prices it.

`--config.case.titles=one` hides one title of each author in place of all.

Where the numbers come from. Full size: the published code of TOFU (Maini et al., 2024; README, config/finetune.yaml,
config/forget.yaml, finetune.py): it is learned in 5 epochs of 4,000 rows, 32 rows a step (625 steps), at 1e-5
(Llama-2) or 2e-5 (Phi-1.5) with weight decay 0.01; gradient ascent takes 5 epochs of forget05 (31 steps) at 1e-5;
both with a warmup of one epoch and linear decay after it. Its Llama-2 is the chat model. Relearning at 1e-5, 16 rows
a step, is that of the code published with Hu, Fu, Wu, Smith (ICLR 2025), whose titles come back within 40 steps and
are lost again after more. Embedded: unlearning by `configs/sweep.py:tofu`, on other seeds and unlearned models alone;
memorising takes 600 steps, since after 400 unlearning by the same rule leaves less of the retained text. Mini:
unlearning by that rule, at 32 rows a step. Outputs are in benchmarks/tofu.md. The attack's rates lie a factor of ten
apart; that of adapters is the common tenfold of that of all parameters. Batches of the mini are half as large as
published, and it is asked at few steps, since it takes some 35 minutes on 2 cores as it is.
"""

import dataclasses

from relearn_jax.audit.audit_config import (
  ArmsSettings,
  AskSettings,
  AttackSettings,
  Audit,
  LoraSettings,
  MemorizeSettings,
  PretrainSettings,
  UnlearnSettings,
  chosen_settings,
)
from relearn_jax.cases.tofu import TofuConfig
from relearn_jax.cases.tofu_world import TofuWorldConfig
from relearn_jax.errors import InputError

KEEP_STEPS = (1, 2, 5, 10, 20, 40)
EMBEDDED = {"ga": {"learning_rate": 5e-5}, "npo": {"learning_rate": 1e-4, "beta": 0.1}}
MINI = {"ga": {"learning_rate": 3e-4}, "npo": {"learning_rate": 1e-4}, "rmu": {"learning_rate": 1e-4}}


def embedded() -> Audit:
  """On invented authors."""
  return Audit(
      case=TofuWorldConfig(),
      arms=ArmsSettings(dtype="float32", pretrain=PretrainSettings(max_positions=48, steps=1200, warmup_steps=60)),
      # In batches: with all rows in every step, the seeds would be one and the same run.
      memorize=MemorizeSettings(batch_size=32, steps=600, learning_rate=5e-4),
      unlearn=UnlearnSettings(
          batch_size=32, methods=("ga", "npo"), settings=chosen_settings(EMBEDDED), max_steps=100, keep_every=5,
          max_score=0.05, depths=2),
      attack=AttackSettings(batch_size=16, learning_rates=(1e-4, 1e-3), keep_steps=KEEP_STEPS),
      ask=AskSettings(max_new_tokens=18, batch_size=0, score_rows=100), checkpoint_seconds=30.0)


def mini() -> Audit:
  """On checkpoints that are given: an original that knows forget05, and a control that does not."""
  return Audit(
      case=TofuConfig(retain_rows=600),
      unlearn=UnlearnSettings(
          batch_size=16, methods=("ga", "npo"), settings=chosen_settings(MINI), max_steps=60, keep_every=2,
          max_score=0.05, depths=2),
      attack=AttackSettings(
          batch_size=8, adapters=("full", "lora"), learning_rates=(1e-4,), lora=LoraSettings(learning_rates=(1e-3,)),
          keep_steps=(10, 20, 40, 60)),
      ask=AskSettings(batch_size=0, score_rows=10))


def mini_grid() -> Audit:
  """The same with RMU, more depths and more rates."""
  audit = mini()
  return dataclasses.replace(
      audit, unlearn=dataclasses.replace(audit.unlearn, methods=("ga", "npo", "rmu"), depths=3),
      attack=dataclasses.replace(
          audit.attack, learning_rates=(1e-4, 1e-3),
          lora=dataclasses.replace(audit.attack.lora, learning_rates=(1e-3, 1e-2))))


def full_size(start: str, learning_rate: float) -> Audit:
  """On a published model, which learns TOFU at this rate."""
  return Audit(
      case=TofuConfig(), arms=ArmsSettings(start=start),
      memorize=MemorizeSettings(
          batch_size=32, steps=625, learning_rate=learning_rate, weight_decay=0.01, warmup_steps=125,
          schedule="linear", remat="full", runs_at_once=1),
      unlearn=UnlearnSettings(
          batch_size=32, methods=("ga",), remat="full", max_steps=31, keep_every=1, max_score=0.05, warmup_steps=6,
          schedule="linear", runs_at_once=1,
          settings=chosen_settings({"ga": {"learning_rate": 1e-5, "weight_decay": 0.01}})),
      attack=AttackSettings(learning_rates=(1e-5,), remat="full", keep_steps=KEEP_STEPS, runs_at_once=1),
      ask=AskSettings(runs_at_once=1), checkpoint_seconds=300.0)


def get_config(what: str = "embedded") -> Audit:
  """The audit of that name."""
  audits = {"embedded": embedded, "mini": mini, "mini_grid": mini_grid,
            "phi_1_5": lambda: full_size("microsoft/phi-1_5", 2e-5),
            "llama_2_7b": lambda: full_size("meta-llama/Llama-2-7b-hf", 1e-5)}
  if what not in audits:
    raise InputError(f"is {what!r}", field="configs/tofu.py:...", mend=f"expected one of {', '.join(audits)}")
  return audits[what]()
