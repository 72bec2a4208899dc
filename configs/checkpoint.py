"""Auditing a model that somebody has unlearned: has it forgotten, or is it only silent?

`relearn audit --config=configs/checkpoint.py --config.arms.unlearned=DIR --config.arms.original=DIR
--config.arms.control=DIR --config.case.forget=forget.jsonl --config.case.retain=retain.jsonl
--config.case.relearn=relearn.jsonl --config.case.questions=questions.jsonl --workdir=runs/checkpoint`. Only
`arms.unlearned` is needed of the three models,
but without a control, never trained on what is to be forgotten, there is no verdict.
A model that is no chat model runs on: end its answers with `--config.ask.stop='("Question:",)'`. Lines of the
relearn file that may give something away are allowed, once read, with `--config.allowed_lines='(12, 40)'`.
Text may come from the hub too, as `hf:locuslab/TOFU:forget05`, with `--config.case.columns` for its columns.

Where the numbers come from: learning rate 1e-5 and 16 rows a step are those of the relearning code that was
published with Hu, Fu, Wu, Smith (ICLR 2025), which takes 9 to 17 steps; 40 look further. A checkpoint of another size
wants a learning rate of its own: audit with several, and believe the one that recovers most.
"""

from relearn_jax.audit.audit_config import Audit
from relearn_jax.cases.files import FilesConfig


def get_config() -> Audit:
  """The default audit of checkpoints; models and files have to be given."""
  return Audit(case=FilesConfig(), checkpoint_seconds=300.0)
