"""Phi-1.5 at full size, with TOFU's settings.

`--config=configs/phi_1_5.py` is the unlearning (`relearn unlearn`), `--config=configs/phi_1_5.py:audit` the audit of
its result (`relearn audit`); `relearn plan` takes both. Files, and the unlearned model and the control of the audit,
have to be given.

Where the numbers come from: TOFU (Maini et al., 2024): 1e-5 with weight decay 0.01, 32 rows a step, 5 epochs (31
steps for the 200 rows of forget05) after a warmup of one (6 steps), by gradient ascent as Hu, Fu, Wu, Smith (ICLR
2025) do with this model. Relearning is as in their published code: 1e-5, 16 rows a step, 9 to 17 steps. Three models
are attacked side by side, which is what `relearn plan` finds room for on one H200.
"""

from relearn_jax.audit.audit_config import ArmsSettings, AttackSettings, Audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.training.job import UnlearnJob

MODEL = "microsoft/phi-1_5"


def get_config(what: str = "unlearn") -> UnlearnJob | Audit:
  """The unlearning job, or the audit ("audit")."""
  if what == "unlearn":
    return UnlearnJob(
        model=MODEL, method="ga", learning_rate=1e-5, weight_decay=0.01, batch_size=32, steps=31, warmup_steps=6,
        remat="full")
  if what == "audit":
    return Audit(
        case=FilesConfig(name="tofu"), arms=ArmsSettings(original=MODEL, method="ga"),
        checkpoint_seconds=300.0,
        attack=AttackSettings(
            learning_rates=(1e-5,), batch_size=16, remat="full", runs_at_once=3, keep_steps=(1, 2, 5, 9, 17)))
  raise InputError(f"is {what!r}", field="configs/phi_1_5.py:...", mend="expected unlearn or audit")
