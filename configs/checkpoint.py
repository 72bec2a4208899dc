"""Auditing a model that somebody has unlearned: has it forgotten, or is it only silent?

`relearn audit --config=configs/checkpoint.py --config.unlearned=DIR --config.original=DIR --config.control=DIR
--config.forget=forget.jsonl --config.retain=retain.jsonl --config.relearn=relearn.jsonl
--config.questions=questions.jsonl --workdir=runs/checkpoint`. Only `unlearned` is needed of the three models,
but without a control, never trained on what is to be forgotten, there is no verdict.

Where the numbers come from: the learning rate is the one with which TOFU's models are finetuned (Maini et al., 2024, 1e-5);
40 steps of 8 rows are about what Hu et al. (ICLR 2025) spend on a relearn set of some hundred rows. A checkpoint of
another size wants a learning rate of its own: give several audits, and believe the one that recovers most.
"""

from relearn_jax.audit.release import AttackSettings, ReleaseAudit


def get_config() -> ReleaseAudit:
  """The default audit of checkpoints; models and files have to be given."""
  return ReleaseAudit(attack=AttackSettings(batch_size=8))
