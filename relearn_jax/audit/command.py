"""`relearn audit`: all stages in order, each timed, each skipped when its files are there."""

import json
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.sharding import Mesh

from relearn_jax.audit import release_results, results
from relearn_jax.audit.arms import all_cases, cells_of_seed, select_points
from relearn_jax.audit.base import make_tokenizer, model_config
from relearn_jax.audit.config import AuditConfig, check_config
from relearn_jax.audit.release import PATHS, ReleaseAudit, check_release
from relearn_jax.audit.release_run import Release
from relearn_jax.audit.rows import write_rows
from relearn_jax.audit.run import Audit, memorize, relearn, unlearn
from relearn_jax.cases.base import Case
from relearn_jax.cases.leakage import Leakage, check_case
from relearn_jax.cases.spelling import AS_IT_IS
from relearn_jax.errors import InputError
from relearn_jax.parallel.mesh import DEFAULT, check_mesh, make_mesh
from relearn_jax.report.render import report_from_rows
from relearn_jax.training.checkpoints import remove_resumes
from relearn_jax.workdir import claim_workdir, only_process

MAX_LISTED = 20  # possible leaks in a message
OUTPUTS = ("results.parquet", "summary.json", "report.html", "report.md")


class Clock:
  """Seconds spent in each stage, kept across restarts in `checkpoints/seconds.json`."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  @contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - begin, 2)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = self.path.with_suffix(".tmp")
    temporary.write_text(json.dumps(self.seconds))
    temporary.replace(self.path)


def check(config: AuditConfig, where: str, allow_leakage: bool) -> None:
  """Everything that can be wrong with an audit, before any device work.

  Raises:
    InputError: a setting is wrong, or a relearn set holds what is asked about (unless allowed).
  """
  check_config(config, where)
  for run, case in all_cases(config).items():
    refuse_leaks(case, where, "case", allow_leakage, f" ({run.name})")


def refuse_leaks(case: Case, file: Any, field: str, allow_leakage: bool, which: str = "",
                 allowed_lines: tuple[int, ...] | None = None) -> None:
  """`InputError` for a relearn set that holds what is asked about, unless that is allowed.

  `allowed_lines` may be None where the audit has no such setting.
  """
  for found in check_case(case, allowed_lines or ()):
    if not allow_leakage and not found.passed:
      raise _leak(found, file, field, which, allowed_lines)
    if idle := sorted(set(allowed_lines or ()) - {hit.line for hit in (*found.possible, *found.hits)}):
      raise InputError(f"names line {idle[0]}, in which nothing is found", file=file, field="allowed_lines",
                       mend="remove it: lines that were read have changed, or are other ones")


def _leak(found: Leakage, file: Any, field: str, which: str, allowed_lines: tuple[int, ...] | None) -> InputError:
  """What is said of a relearn set that did not pass: the first certain finding, or all lines of possible ones."""
  hit = next((hit for hit in found.hits if hit.certain), found.hits[0])
  how = "" if hit.how == AS_IT_IS else f" ({hit.how})"
  where = f"line {hit.line} of relearn set {found.relearn_set!r}{which} contains {hit.found!r}{how}"
  flag = "pass --allow_leakage (the verdict will be INCONCLUSIVE)"
  if hit.certain or allowed_lines is None:
    return InputError(f"{where}, which is asked about", file=file, field=field, mend=f"remove it, or {flag}")
  others = [f"line {hit.line} {hit.found!r}" for hit in found.hits[1:]]
  more = "" if not others else "; so do " + ", ".join(others[:MAX_LISTED]) + (
      f" and {len(others) - MAX_LISTED} more" if len(others) > MAX_LISTED else "")
  return InputError(
      f"{where}, which may give away what is asked about{more}", file=file, field=field,
      mend=f"read the lines; remove what tells, name the others in allowed_lines, such as ({hit.line},), or {flag}")


def audit(config: AuditConfig, where: str, workdir: pathlib.Path, cache: pathlib.Path, *, allow_leakage: bool = False,
          mesh: str = DEFAULT) -> bool:
  """Runs or continues an audit; returns False where nothing was left to do.

  Args:
    config: the configuration, overrides applied.
    where: the file it came from, for messages.
    workdir: everything is written here; with another configuration in it, it is refused.
    cache: the base model is taken from here, or trained and put here.
    allow_leakage: go on although a relearn set leaks.
    mesh: over which runs, and the devices of a run, are spread; results do not depend on it, up to rounding.
  """
  check(config, where, allow_leakage)
  decoder = model_config(config.base, make_tokenizer())
  sizes = check_mesh(mesh, decoder)
  known = claim_workdir(workdir, config)
  with only_process(workdir):
    if known and all((workdir / name).exists() for name in OUTPUTS):
      return False
    if not (workdir / "results.parquet").exists():
      _compute(config, workdir, cache, make_mesh(sizes, config=decoder))
    report_from_rows(workdir)
  return True


def memorized(config: AuditConfig, workdir: pathlib.Path, cache: pathlib.Path, mesh: str = DEFAULT) -> Audit:
  """The part of an audit that does not depend on the method: the base, and the models that have memorised the case."""
  decoder = model_config(config.base, make_tokenizer())
  state = Audit(config, workdir, make_mesh(check_mesh(mesh, decoder), config=decoder))
  state.checkpoints.mkdir(parents=True, exist_ok=True)
  state.load_base(cache)
  memorize(state)
  return state


def _compute(config: AuditConfig, workdir: pathlib.Path, cache: pathlib.Path, mesh: Mesh) -> None:
  clock = Clock(workdir / "checkpoints" / "seconds.json")
  state = Audit(config, workdir, mesh)
  with clock("base"):
    state.load_base(cache)
  with clock("memorize"):
    memorize(state)
  with clock("unlearn"):
    curves = unlearn(state)
  gone = state.gone()
  points = select_points(curves, config.unlearn.max_asr, config.unlearn.depths, gone)
  last = max((max(curve) for curve in curves.values() if curve), default=0)
  with clock("relearn"):
    for seed in config.case.seeds:
      relearn(state, seed, cells_of_seed(config, seed, points, last, gone))
  remove_resumes(state.checkpoints)
  with clock("results"):
    tables: list[Any] = results.result_tables(state, points, last)
    facts = results.make_facts(state, points, last, clock.seconds)
  write_rows(workdir / "results.parquet", tables, facts)


def audit_release(config: ReleaseAudit, where: str, workdir: pathlib.Path, *, allow_leakage: bool = False,
                  mesh: str = DEFAULT) -> bool:
  """Runs or continues an audit of somebody's checkpoints; returns False where nothing was left to do.

  Args:
    config: what to do.
    where: the file it came from, for messages.
    workdir: everything is written here; with another configuration, or made from other contents of files, it is
      refused.
    allow_leakage: go on although the relearn set holds what is asked about.
    mesh: over which runs, and the devices of a run, are spread.
  """
  check_release(config, where)
  state = Release(config, where, workdir)
  refuse_leaks(state.case, state.files["relearn"], "relearn", allow_leakage, allowed_lines=config.allowed_lines)
  sizes = check_mesh(mesh, state.checked["U"].config)
  digests = state.digests()
  known = claim_workdir(workdir, config, digests, PATHS)
  with only_process(workdir):
    if known and all((workdir / name).exists() for name in OUTPUTS):
      return False
    if not (workdir / "results.parquet").exists():
      clock = Clock(workdir / "checkpoints" / "seconds.json")
      with clock("attack"):
        state.attack(make_mesh(sizes, config=state.checked["U"].config))
      remove_resumes(workdir / "checkpoints")
      write_rows(workdir / "results.parquet", release_results.result_tables(state),
                 release_results.make_facts(state, digests, clock.seconds))
    report_from_rows(workdir)
  return True
