"""`relearn audit`: the three audits, and which of them a configuration is of."""

import pathlib

from relearn_jax.audit.command import audit, audit_release
from relearn_jax.audit.comparison import MethodsAudit, compare
from relearn_jax.audit.config import AuditConfig
from relearn_jax.audit.release import ReleaseAudit
from relearn_jax.report.command import closing
from relearn_jax.workdir import nothing_left

KINDS = (AuditConfig, ReleaseAudit, MethodsAudit)


def audit_any(config: AuditConfig | ReleaseAudit | MethodsAudit, where: str, workdir: pathlib.Path,
              cache: pathlib.Path, *, allow_leakage: bool, mesh: str) -> str:
  """Runs or continues the audit that a configuration describes; returns what the terminal shows at the end.

  Arguments and errors are those of `command.audit`.
  """
  if isinstance(config, MethodsAudit):
    done = compare(config, where, workdir, cache, allow_leakage=allow_leakage, mesh=mesh)
  elif isinstance(config, ReleaseAudit):
    done = audit_release(config, where, workdir, allow_leakage=allow_leakage, mesh=mesh)
  else:
    done = audit(config, where, workdir, cache, allow_leakage=allow_leakage, mesh=mesh)
  return nothing_left(workdir, done) + closing(workdir)
