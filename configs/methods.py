"""All unlearning methods on the names case, side by side, under the same attack.

`relearn audit --config=configs/methods.py --workdir=runs/methods` runs it; `--config.methods="('ga', 'npo')"` only
some, and any field of the audit can be set, for example `--config.audit.case.seeds="(0, 1, 2, 3, 4)"`.

Where the numbers come from: learning rates and hyper-parameters were chosen by `configs/sweep.py` on other seeds, by
unlearned models only (benchmarks/methods.md); one variant, the pair repeated 7 times, and one unlearn depth; everything
else is as in configs/names.py.
"""

from relearn_jax.audit.comparison import MethodsAudit
from relearn_jax.audit.config import AuditConfig, UnlearnConfig
from relearn_jax.cases.names import NamesConfig


def get_config() -> MethodsAudit:
  """The default comparison."""
  return MethodsAudit(audit=AuditConfig(case=NamesConfig(variants=(7,)), unlearn=UnlearnConfig(depths=1)))
