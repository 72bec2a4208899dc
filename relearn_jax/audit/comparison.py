"""All unlearning methods on the names case, by the same attack: one audit each on one memorised model, side by side."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from relearn_jax.audit.command import OUTPUTS, audit, check, memorized
from relearn_jax.audit.config import CHOSEN, AuditConfig
from relearn_jax.audit.results import ended_notes
from relearn_jax.audit.rows import read_rows
from relearn_jax.errors import InputError
from relearn_jax.objectives.methods import METHODS, NO_DEFENCE, get_defence, get_method
from relearn_jax.parallel.mesh import DEFAULT
from relearn_jax.progress import progress
from relearn_jax.report.comparison import write_comparison
from relearn_jax.training.ended import AllEnded, in_words, read_ended
from relearn_jax.workdir import claim_workdir, only_process

DEFENDED = ("npo_gd+sam", "npo_gd+smoothing", "npo_gd+gradient_penalty", "npo_gd+averaging")
SHARED = "shared"


@dataclasses.dataclass
class MethodsAudit:
  """A comparison of methods.

  Attributes:
    methods: names of methods, "npo_gd+sam" with a defence.
    audit: what is the same for all; its own `method` and `defence` are not read.
    keep_weights: keep the checkpoints of audits that are through; their rows and answers are kept in any case.
  """

  methods: tuple[str, ...] = (*METHODS, *DEFENDED)
  audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
  keep_weights: bool = False


def one_audit(config: AuditConfig, name: str) -> AuditConfig:
  """The audit of one method or "method+defence", with the settings that were chosen for that pair.

  Raises:
    InputError: there is no such method or defence.
  """
  method, _, defence = name.partition("+")
  defence = defence or NO_DEFENCE
  get_method(method, "methods")
  found = get_defence(defence, "methods")
  if found is None:
    return dataclasses.replace(config, method=method)
  plain, own = AuditConfig(), found.settings
  settings = _chosen(name, getattr(config.methods, method), getattr(plain.methods, method), lambda key: key not in own)
  around = _chosen(name, getattr(config.defences, defence), getattr(plain.defences, defence), own.__contains__)
  return dataclasses.replace(
      config, method=method, defence=defence, methods=dataclasses.replace(config.methods, **{method: settings}),
      defences=dataclasses.replace(config.defences, **{defence: around}))


def _chosen(name: str, settings: Any, defaults: Any, mine: Callable[[str], bool]) -> Any:
  """Settings with what was chosen for this pair in place of what nobody has set."""
  return dataclasses.replace(settings, **{
      key: value for key, value in CHOSEN.get(name, {}).items()
      if mine(key) and getattr(settings, key) == getattr(defaults, key)})


def compare(config: MethodsAudit, where: str, workdir: pathlib.Path, cache: pathlib.Path, *,
            allow_leakage: bool = False, mesh: str = DEFAULT) -> bool:
  """Runs or continues a comparison; returns False where nothing was left to do.

  Every method has an audit of its own in `methods/NAME`, with a report of its own; `comparison.json`,
  `comparison.md` and `comparison.html` set them side by side.

  Args:
    config: which methods, and the audit.
    where: the file it came from, for messages.
    workdir: with another configuration in it, it is refused.
    cache, allow_leakage, mesh: see `command.audit`.
  """
  if not config.methods or len(set(config.methods)) < len(config.methods):
    raise InputError(f"is {config.methods!r}", file=where, field="methods", mend="expected distinct names of methods")
  audits = {}
  for name in config.methods:
    try:
      audits[name] = one_audit(config.audit, name)
    except InputError as error:
      raise InputError(error.problem, file=where, field=error.field, mend=error.mend) from None
    check(audits[name], where, allow_leakage)
  known = claim_workdir(workdir, config)
  with only_process(workdir):
    if known and (workdir / "comparison.html").exists():
      return False
    shared = dataclasses.replace(audits[config.methods[0]], method="ga", defence=NO_DEFENCE)
    if not all(_finished(workdir / "methods" / name) for name in audits):
      memorized(shared, workdir / SHARED, cache, mesh)
    with progress(len(audits), "methods", "method") as bar:
      for name, one in audits.items():
        folder = workdir / "methods" / name
        if not _finished(folder):
          _share(workdir / SHARED / "checkpoints", folder / "checkpoints")
          with contextlib.suppress(AllEnded):  # of one method; its row says so, and the others go on
            audit(one, where, folder, cache, allow_leakage=allow_leakage, mesh=mesh)
        if not config.keep_weights and _finished(folder):
          for stage in (path for path in (folder / "checkpoints").iterdir() if path.is_dir() and path.name != "scores"):
            shutil.rmtree(stage)
        bar.update(1)
    rows = [row(workdir / "methods" / name, name) for name in audits]
    if not any(_finished(workdir / "methods" / name) for name in audits):
      raise InputError(f"has no method of which a run is left: {rows[0]['ended'][0]}", file=where, field="methods",
                       mend="lower the learning rates, in another --workdir")
    if not config.keep_weights:
      shutil.rmtree(workdir / SHARED, ignore_errors=True)
    write_comparison(workdir, rows)
  return True


def _finished(folder: pathlib.Path) -> bool:
  return all((folder / name).exists() for name in OUTPUTS)


def _share(source: pathlib.Path, destination: pathlib.Path) -> None:
  """The base, the memorised models and which of them ended, as links to the same files; complete or not at all."""
  for file in ("memorize/ended.json", "scores/memorize.npz"):
    if (source / file).exists() and not (destination / file).exists():
      (destination / file).parent.mkdir(parents=True, exist_ok=True)
      os.link(source / file, destination / file)
  for part in ("base", "unlearn/000000"):
    if not (destination / part).exists():
      temporary = destination / (part.replace("/", "-") + ".tmp")
      shutil.rmtree(temporary, ignore_errors=True)
      shutil.copytree(source / part, temporary, copy_function=os.link)
      (destination / part).parent.mkdir(parents=True, exist_ok=True)
      temporary.rename(destination / part)


def row(workdir: pathlib.Path, name: str) -> dict[str, Any]:
  """What a comparison shows of one audit, from its files.

  Returns:
    name, settings, seconds (of unlearning and of everything), step_ms (median of an unlearning step of all runs), and
    per variant: original, unlearned, relearned, control (the highest mean of its cells), retain (mean token
    log-probability of retained text, unlearned) and retain_original, each a cell of summary.json or None; unlearn_steps
    of the seeds; half: relearn steps until half of what was lost is back, None if never; verdict. Of a method of which
    no run was left, None in place of the cells, and the verdict "not finite". ended: a sentence a run that ended.
  """
  config = json.loads((workdir / "config.json").read_text())
  logged = [json.loads(line) for line in (workdir / "train_log.jsonl").read_text().splitlines()]
  unlearning = [entry["seconds"] for entry in logged if entry["stage"] == "unlearn"]
  settings = {**config["methods"][config["method"]],
              **(config["defences"][config["defence"]] if config["defence"] != NO_DEFENCE else {})}
  if _finished(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    seconds, ended = summary["seconds"], ended_notes(read_rows(workdir / "results.parquet")[1]["ended"])
    variants = {variant: _variant(summary, variant) for variant in summary["verdicts"]}
  else:
    none = dict.fromkeys(("original", "unlearned", "relearned", "control", "retain", "retain_original", "half"))
    variants = {str(variant): {**none, "unlearn_steps": [None] * len(config["case"]["seeds"]),
                               "verdict": {"verdict": "not finite"}} for variant in config["case"]["variants"]}
    found = [one for path in sorted((workdir / "checkpoints").iterdir()) for one in read_ended(path).values()]
    seconds, ended = {}, [f"{in_words(found)}."]
  return {"name": name, "settings": settings, "seconds": seconds, "ended": ended,
          "step_ms": round(1000 * float(np.median(unlearning)), 1) if unlearning else None, "variants": variants}


def _variant(summary: dict[str, Any], variant: str) -> dict[str, Any]:
  worst = summary["verdicts"][variant]["learning_rate"]  # of the attack
  rates = {cell["learning_rate"] for cell in summary["cells"]} - {None}
  shown = (None, worst if worst is not None else min(rates, default=None))
  cells = [cell for cell in summary["cells"] if cell["variant"] == variant and cell["learning_rate"] in shown]

  def get(metric: str, arm: str, point: str, depth: int | None, step: int | None = None) -> list[dict[str, Any]]:
    return sorted((c for c in cells if (c["metric"], c["arm"], c["point"], c["depth"]) == (metric, arm, point, depth)
                   and step in (None, c["relearn_step"])), key=lambda c: c["relearn_step"])
  first = lambda found: found[0] if found else None
  original, unlearned = first(get("asr", "O", "original", None)), first(get("asr", "U", "unlearned", 0))
  curve = get("asr", "U", "relearned", 0)
  control = sorted((c for c in cells if c["metric"] == "asr" and c["arm"] == "N"), key=lambda c: c["mean"])
  return {
      "original": original, "unlearned": unlearned, "relearned": curve[-1] if curve else None,
      "control": control[-1] if control else None,
      "retain": first(get("retain_logprob", "U", "unlearned", 0)),
      "retain_original": first(get("retain_logprob", "O", "original", None)),
      "unlearn_steps": [steps[0] if steps else None for steps in summary["selection"][variant].values()],
      "half": half(original, unlearned, curve), "verdict": summary["verdicts"][variant]}


def half(original: dict[str, Any] | None, unlearned: dict[str, Any] | None, curve: Sequence[dict[str, Any]]
         ) -> int | None:
  """The first relearn step that was asked at which half of what unlearning took is back; None if it never is."""
  if original is None or unlearned is None or original["mean"] <= unlearned["mean"]:
    return None
  wanted = (original["mean"] + unlearned["mean"]) / 2
  return next((cell["relearn_step"] for cell in curve if cell["mean"] >= wanted), None)
