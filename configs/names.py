"""The synthetic names experiment: is "Anthony Mark" forgotten, or only suppressed?

`relearn audit --config=configs/names.py --workdir=runs/names` runs it; any field can be set on the
command line, for example `--config.method=npo --config.case.seeds="(0, 1, 2, 3, 4)"`.

Where the numbers come from: repetitions, prompts and the attack's text are those of Hu, Fu, Wu, Smith
(ICLR 2025, section 5) and its published code; the sizes, step counts and learning rates of unlearning
and relearning are those of a trial of this case at this size (memorising: width 96 or 100 steps were
too weak); the learning rates of pretraining and memorising come from benchmarks/recipe.sh, whose
output is in benchmarks/names.md.
"""

from relearn_jax.audit.config import AuditConfig


def get_config() -> AuditConfig:
  """The default audit."""
  return AuditConfig()
