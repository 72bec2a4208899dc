"""Tiny audits: the command line of one on names, configurations, and how they are run."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from relearn_jax.audit.audit_config import ArmsSettings, Audit
from relearn_jax.audit.pipeline import audit
from relearn_jax.cases.files import FilesConfig
from relearn_jax.config_files import load_config_file
from relearn_jax.report.render import report_from_rows

from ..command import CONFIG, TINY


def audit_flags(workdir: pathlib.Path, *more: str) -> list[str]:
  """The tiny audit, with `more` in place of its own settings of the same name."""
  settings = {flag.split("=")[0]: flag for flag in (*TINY, *more)}
  return ["audit", f"--config={CONFIG}", f"--workdir={workdir}", *settings.values()]


def changed(config: Audit, changes: Mapping[str, Any]) -> Audit:
  """A configuration with other values in dotted fields; it is changed itself."""
  for name, value in changes.items():
    *path, last = name.split(".")
    holder: Any = config
    for part in path:
      holder = getattr(holder, part)
    assert hasattr(holder, last), name
    setattr(holder, last, value)
  return config


def names_audit(**changes: Any) -> Audit:
  """The default audit of names, with `unlearn__depths=1` in place of the field `unlearn.depths`."""
  config: Audit = load_config_file(str(CONFIG))
  return changed(config, {name.replace("__", "."): value for name, value in changes.items()})


def tiny_names(**changes: Any) -> Audit:
  """An audit of names of seconds: one variant, two seeds, a model that knows little."""
  shape = {f"arms__pretrain__{name}": value for name, value in (
      ("hidden_size", 16), ("intermediate_size", 32), ("num_layers", 1), ("num_heads", 2), ("num_kv_heads", 2),
      ("steps", 20), ("warmup_steps", 2))}
  return names_audit(**{
      **shape, "case__variants": (7,), "case__num_questions": 6, "seeds": (0, 1), "memorize__steps": 10,
      "memorize__learning_rate": 3e-3, "unlearn__max_steps": 10, "unlearn__depths": 1,
      "unlearn__settings__ga__learning_rate": 1e-3, "attack__keep_steps": (1, 3), "verdict__draws": 100,
      "checkpoint_seconds": 0.0, **changes})


def loaded_audit(folder: pathlib.Path, models: Mapping[str, str], **changes: Any) -> Audit:
  """An audit of checkpoints of a folder, arm (a field of `arms`) -> name, with its four files."""
  files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "questions")}
  case = FilesConfig(relearn=(str(folder / "relearn.jsonl"),), **files)
  config = Audit(case=case, arms=ArmsSettings(**{arm: str(folder / name) for arm, name in models.items()}))
  return changed(config, {name.replace("__", "."): value for name, value in changes.items()})


def audited(config: Audit, workdir: pathlib.Path, cache: pathlib.Path, **more: Any) -> dict[str, Any]:
  """Runs an audit and renders its report, as the command does; returns the summary."""
  assert audit(config, "here", workdir, cache, **more)
  report_from_rows(workdir)
  found: dict[str, Any] = json.loads((workdir / "summary.json").read_text())
  return found
