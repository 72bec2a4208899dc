"""The synthetic names experiment: is "Anthony Mark" forgotten, or only suppressed?

`relearn audit --config=configs/names.py --workdir=runs/names` runs it; any field can be set on the
command line, for example `--config.unlearn.methods=npo --config.seeds="(0, 1, 2, 3, 4)"`.

Where the numbers come from: repetitions, prompts and the attack's text are those of Hu, Fu, Wu, Smith
(ICLR 2025, section 5) and its published code; the sizes, step counts and learning rates of unlearning
and relearning are those of a trial of this case at this size (memorising: width 96 or 100 steps were
too weak); the learning rates of pretraining and memorising come from benchmarks/recipe.sh, whose
output is in benchmarks/names.md. The attack's rates lie a factor of ten apart and end where it destroys: at 3e-3
the original says nothing any more after 10 steps, while at 1e-3 it still does after 80.
"""

from relearn_jax.audit.audit_config import (
  ArmsSettings,
  AskSettings,
  AttackSettings,
  Audit,
  UnlearnSettings,
  chosen_settings,
)
from relearn_jax.cases.names import CHOSEN, NamesConfig


def get_config() -> Audit:
  """The default audit."""
  return Audit(
      case=NamesConfig(), arms=ArmsSettings(dtype="float32"),
      unlearn=UnlearnSettings(methods=("ga",), settings=chosen_settings(CHOSEN), chosen=CHOSEN),
      attack=AttackSettings(batch_size=0, learning_rates=(1e-4, 1e-3, 3e-3), keep_steps=(1, 2, 5, 10, 20, 40, 80)),
      # Prompts have at most 10, or 18, tokens; blocks of 14 models need less memory than all at once.
      ask=AskSettings(max_new_tokens=8, buckets=(10, 18), batch_size=0, score_rows=0, runs_at_once=14),
      checkpoint_seconds=30.0)
