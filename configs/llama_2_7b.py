"""Llama-2-7b at full size, with the settings of the names case.

`--config=configs/llama_2_7b.py` is the unlearning (`relearn unlearn`), `--config=configs/llama_2_7b.py:audit` the
audit of its result (`relearn audit`); `relearn plan` takes both. Files, and the unlearned model and the control of
the audit, have to be given.

Where the numbers come from: the code published with Hu, Fu, Wu, Smith (ICLR 2025) for its synthetic names: gradient
ascent at 1e-5 with weight decay 0.01, 16 rows a step, 10 steps of which every second is kept; relearning with 16 rows
a step, up to 17 steps. Rematerialisation is what `relearn plan` needs to fit one H200.
"""

from relearn_jax.audit.audit_config import ArmsSettings, AttackSettings, Audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.training.job import UnlearnJob

MODEL = "meta-llama/Llama-2-7b-hf"


def get_config(what: str = "unlearn") -> UnlearnJob | Audit:
  """The unlearning job, or the audit ("audit")."""
  if what == "unlearn":
    return UnlearnJob(
        model=MODEL, method="ga", learning_rate=1e-5, weight_decay=0.01, batch_size=16, steps=10, keep_every=2,
        remat="full")
  if what == "audit":
    return Audit(
        case=FilesConfig(name="names"), arms=ArmsSettings(original=MODEL, method="ga"),
        checkpoint_seconds=300.0,
        attack=AttackSettings(
            learning_rates=(1e-5,), batch_size=16, remat="full", runs_at_once=1, keep_steps=(1, 2, 5, 9, 17)))
  raise InputError(f"is {what!r}", field="configs/llama_2_7b.py:...", mend="expected unlearn or audit")
