"""Zephyr-7b-beta at full size, with the settings of the WMDP case.

`--config=configs/zephyr_7b_beta.py` is the unlearning (`relearn unlearn`), `--config=configs/zephyr_7b_beta.py:audit`
the audit of its result (`relearn audit`); `relearn plan` takes both. Files, and the unlearned model and the control
of the audit, have to be given.

Where the numbers come from: the code published with Hu, Fu, Wu, Smith (ICLR 2025) for WMDP: 2e-7 with weight decay
0.01, 16 rows a step, 125 steps with a warmup of 12 and cosine decay; relearning at 1e-5 with 16 rows a step, 9 steps.
Rematerialisation is what `relearn plan` needs to fit one H200.
"""

from relearn_jax.audit.audit_config import ArmsSettings, AskSettings, AttackSettings, Audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.training.job import UnlearnJob

MODEL = "HuggingFaceH4/zephyr-7b-beta"


def get_config(what: str = "unlearn") -> UnlearnJob | Audit:
  """The unlearning job, or the audit ("audit")."""
  if what == "unlearn":
    return UnlearnJob(
        model=MODEL, method="ga", learning_rate=2e-7, weight_decay=0.01, batch_size=16, steps=125, warmup_steps=12,
        schedule="cosine", chat_template=True, remat="full")
  if what == "audit":
    return Audit(
        case=FilesConfig(name="wmdp"), arms=ArmsSettings(original=MODEL, method="ga"),
        ask=AskSettings(chat_template=True), checkpoint_seconds=300.0,
        attack=AttackSettings(
            learning_rates=(1e-5,), batch_size=16, remat="full", runs_at_once=1, keep_steps=(1, 2, 5, 9)))
  raise InputError(f"is {what!r}", field="configs/zephyr_7b_beta.py:...", mend="expected unlearn or audit")
