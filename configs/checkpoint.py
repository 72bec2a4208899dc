"""Auditing a model that somebody has unlearned: has it forgotten, or is it only silent?

`relearn audit --config=configs/checkpoint.py --config.unlearned=DIR --config.original=DIR --config.control=DIR
--config.forget=forget.jsonl --config.retain=retain.jsonl --config.relearn=relearn.jsonl
--config.questions=questions.jsonl --workdir=runs/checkpoint`. Only `unlearned` is needed of the three models,
but without a control, never trained on what is to be forgotten, there is no verdict.
A model that is no chat model runs on: end its answers with `--config.interview.stop='("Question:",)'`. Lines of the
relearn file that may give something away are allowed, once read, with `--config.allowed_lines='(12, 40)'`.

Where the numbers come from: learning rate 1e-5 and 16 rows a step are those of the relearning code that was
published with Hu, Fu, Wu, Smith (ICLR 2025), which takes 9 to 17 steps; 40 look further. A checkpoint of another size
wants a learning rate of its own: audit with several, and believe the one that recovers most.
"""

from relearn_jax.audit.release import AttackSettings, ReleaseAudit


def get_config() -> ReleaseAudit:
  """The default audit of checkpoints; models and files have to be given."""
  return ReleaseAudit(attack=AttackSettings(batch_size=16))
