"""Llama-2-7b-chat at full size, with TOFU's settings.

`--config=configs/llama_2_7b_chat.py` is the unlearning (`relearn unlearn`),
`--config=configs/llama_2_7b_chat.py:audit` the audit of its result (`relearn audit`); `relearn plan` takes both.
Files, and the unlearned model and the control of the audit, have to be given.

Where the numbers come from: TOFU (Maini et al., 2024): 1e-5 with weight decay 0.01, 32 rows a step, 5 epochs (31
steps for the 200 rows of forget05) after a warmup of one (6 steps); NPO's beta 0.1 is that of Zhang et al. (2024).
Relearning is as in the code published with Hu, Fu, Wu, Smith (ICLR 2025): 1e-5, 16 rows a step, 9 to 17 steps.
Rematerialisation is what `relearn plan` needs to fit one H200.
"""

from relearn_jax.audit.audit_config import ArmsSettings, AskSettings, AttackSettings, Audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.errors import InputError
from relearn_jax.training.job import UnlearnJob

MODEL = "meta-llama/Llama-2-7b-chat-hf"


def get_config(what: str = "unlearn") -> UnlearnJob | Audit:
  """The unlearning job, or the audit ("audit")."""
  if what == "unlearn":
    return UnlearnJob(
        model=MODEL, method="npo", learning_rate=1e-5, weight_decay=0.01, batch_size=32, steps=31, warmup_steps=6,
        chat_template=True, remat="full")
  if what == "audit":
    return Audit(
        case=FilesConfig(name="tofu"), arms=ArmsSettings(original=MODEL, method="npo"),
        ask=AskSettings(chat_template=True), checkpoint_seconds=300.0,
        attack=AttackSettings(
            learning_rates=(1e-5,), batch_size=16, remat="full", runs_at_once=1, keep_steps=(1, 2, 5, 9, 17)))
  raise InputError(f"is {what!r}", field="configs/llama_2_7b_chat.py:...", mend="expected unlearn or audit")
