"""The stages of a configuration as work to be estimated; files are read where they are at hand, devices never."""

import dataclasses
import difflib
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from relearn_jax.audit.comparison import MethodsAudit
from relearn_jax.audit.config import AuditConfig, check_config
from relearn_jax.audit.release import ReleaseAudit, check_release
from relearn_jax.audit.release_run import groups
from relearn_jax.audit.sweep import Sweep
from relearn_jax.cases.files import read_questions, read_texts
from relearn_jax.data.batches import bucket_length
from relearn_jax.data.chat import open_chat
from relearn_jax.data.jsonl import Row
from relearn_jax.data.texts import encode_rows
from relearn_jax.data.tokens import prompt_ids
from relearn_jax.errors import InputError
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import chain, has_vocabulary, tokenizer_folder
from relearn_jax.models.lora import check_lora
from relearn_jax.models.model import Model
from relearn_jax.models.safetensor_files import read_json
from relearn_jax.models.sources import load_tokenizer
from relearn_jax.plan.names import plan_audit, plan_methods, plan_sweep
from relearn_jax.plan.presets import PRESETS, preset
from relearn_jax.plan.recipes import reference_fields, step_fields
from relearn_jax.plan.work import Work
from relearn_jax.training.job import SOURCES, UnlearnJob, check_job
from relearn_jax.training.settings import TrainSettings
from relearn_jax.training.unlearn_rows import refusal_rows


class Size(NamedTuple):
  """Rows of a data set: how many, their longest in tokens, and the most tokens of a row that count."""

  rows: int
  length: int
  counted: int


DEFAULT = Size(400, 512, 128)


@dataclasses.dataclass
class Stages:
  """What is planned.

  Attributes:
    works: in the order in which they run.
    assumed: what was not at hand, a line each.
    measured: what was read, a line each.
  """

  works: list[Work] = dataclasses.field(default_factory=list)
  assumed: list[str] = dataclasses.field(default_factory=list)
  measured: list[str] = dataclasses.field(default_factory=list)


def stages(config: Any, where: str, *, on_cpu: bool, default: Size = DEFAULT) -> Stages:
  """The stages of any configuration that a command takes.

  Args:
    config: `AuditConfig`, `MethodsAudit`, `Sweep`, `UnlearnJob` or `ReleaseAudit`; paths of files may be left out.
    where: the file it came from, for messages.
    on_cpu: whether dtype "auto" means float32.
    default: of data sets whose files are not given. A question's prompt is taken to be as long as a row
      without what counts.

  Raises:
    InputError: a setting that the command would refuse too, or a model of which nothing is known.
  """
  found = Stages()
  if isinstance(config, AuditConfig):
    check_config(config, where)
    _names(found, plan_audit(config))
  elif isinstance(config, MethodsAudit):
    _names(found, plan_methods(config, where))
  elif isinstance(config, Sweep):
    _names(found, plan_sweep(config, where))
  elif isinstance(config, UnlearnJob):
    check_job(_filled(config), where)
    _unlearn(config, where, on_cpu, default, found)
  elif isinstance(config, ReleaseAudit):
    if not config.unlearned and config.original:
      config = dataclasses.replace(config, unlearned=config.original, control=config.control or config.original)
      found.assumed.append("three models of the original's architecture are attacked")
    check_release(_filled(config), where)
    _release(config, where, on_cpu, default, found)
  else:
    raise InputError(f"describes a {type(config).__name__}", file=where, field="--config",
                     mend="expected an AuditConfig, a MethodsAudit, a Sweep, an UnlearnJob or a ReleaseAudit")
  return found


def _filled(config: Any) -> Any:
  """The configuration with names in place of the files that are left out, which a plan does not need."""
  fields = ("forget", "retain", "relearn", "questions", "alternates", "anchors")
  files = [field for field in fields if getattr(config, field, None) == ""]
  return dataclasses.replace(config, **dict.fromkeys(files, "(left out)"))


def _names(found: Stages, planned: tuple[list[Work], str]) -> None:
  works, note = planned
  found.works += works
  found.measured.append(note)


def find_model(name: str, where: str, field: str) -> tuple[ModelConfig, pathlib.Path | None]:
  """The architecture of a local folder, of which only config.json is read, or of a hub id in the table.

  Of an adapter's folder it is that of its base.

  Raises:
    InputError: neither; the nearest of the table are listed.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    file = chain(folder)[-1] / "config.json"
    return parse_config(read_json(file, "give the folder of a Hugging Face checkpoint"), str(file)), folder
  if known := preset(name):
    return known, None
  near = difflib.get_close_matches(name, PRESETS, 2, 0.4)
  hint = f" (nearest: {', '.join(near)})" if near else ""
  raise InputError(f"is {name!r}, which is no local folder and not in the table of models{hint}", file=where,
                   field=field, mend="give a folder with config.json; weights need not be there")


class _Files:
  """Sizes of data sets, read with the model's own tokenizer or assumed."""

  def __init__(self, config: ModelConfig, folder: pathlib.Path | None, job: UnlearnJob | ReleaseAudit, default: Size,
               found: Stages):
    self.config, self.default, self.found = config, default, found
    has_tokenizer = folder is not None and has_vocabulary(tokenizer_folder(chain(folder)))
    self.tokenizer = load_tokenizer(folder, config) if folder is not None and has_tokenizer else None
    self.chat = None
    if job.chat_template and folder is not None and self.tokenizer is not None:
      self.chat = open_chat(job.chat, self.tokenizer, folder, "chat_template")

  def rows(self, field: str, path: str) -> Size:
    if not path or self.tokenizer is None:
      self.found.assumed.append(f"{field}: {self._say(self.default)}" + (" (no tokenizer at hand)" if path else ""))
      return self.default
    file = pathlib.Path(path)
    return self._measured(field, read_texts(file), file)

  def refusals(self, job: UnlearnJob) -> Size:
    if not job.forget or self.tokenizer is None:
      return self.rows("idk", job.forget)
    file = pathlib.Path(job.forget)
    return self._measured("idk", refusal_rows(job, read_texts(file), file), file)

  def _measured(self, field: str, rows: Sequence[Row], file: pathlib.Path) -> Size:
    encoded = encode_rows(self.tokenizer, rows, file, self.config.max_positions, chat=self.chat)
    size = Size(len(encoded), max(len(row.ids) for row in encoded), max(len(row.ids) - row.start for row in encoded))
    self.found.measured.append(f"{field}: {self._say(size)}")
    return size

  def questions(self, path: str, max_new_tokens: int) -> Size:
    if not path or self.tokenizer is None:
      size = Size(self.default.rows, max(self.default.length - self.default.counted, 1), self.default.counted)
      self.found.assumed.append(f"questions: {size.rows}, prompts of at most {size.length} tokens")
      return size
    file = pathlib.Path(path)
    rows, _ = read_questions(file)
    ids = [prompt_ids(self.tokenizer, row, file, self.config.max_positions, max_new_tokens, chat=self.chat,
                      field="interview.max_new_tokens") for row in rows]
    size = Size(len(ids), max(map(len, ids)), 1)
    self.found.measured.append(f"questions: {size.rows}, prompts of at most {size.length} tokens")
    return size

  def _say(self, size: Size) -> str:
    return f"{size.rows} rows of at most {size.length} tokens, {size.counted} of which count"


def _common(config: ModelConfig, settings: TrainSettings, dtype: str, on_cpu: bool) -> dict[str, Any]:
  """What the works of one model have in common."""
  compute = 4 if dtype == "float32" or (dtype == "auto" and on_cpu) else 2
  adapter = settings.adapter
  return {"config": config, "adapter": adapter.kind, "lora_rank": adapter.rank, "lora_targets": tuple(adapter.targets),
          "param_dtype": compute if adapter.kind == "lora" else 4, "compute_bytes": compute,
          "shared": adapter.kind == "lora"}


def _check_adapter(config: ModelConfig, settings: TrainSettings, where: str, field: str) -> None:
  if lora := settings.adapter.lora():
    check_lora(Model(config), lora, where, field)


def _unlearn(job: UnlearnJob, where: str, on_cpu: bool, default: Size, found: Stages) -> None:
  config, folder = find_model(job.model, where, "model")
  _check_adapter(config, job, where, "adapter")
  files = _Files(config, folder, job, default, found)
  sizes = _sizes(job, files)
  common, recipe = _common(config, job, job.dtype, on_cpu), job.recipe
  common |= {"remat": job.remat, "num_microbatches": job.num_microbatches}
  held = {name: size.rows for name, size in sizes.items()}
  seen = {name: min(job.batch_size, size.rows) for name, size in sizes.items()}

  def shape(names: Collection[str]) -> dict[str, Any]:
    return {"length": max(sizes[name].length for name in names), "counted": max(sizes[name].counted for name in names)}
  if recipe.published.reinforces:
    # What will unlearn waits for the second model.
    found.works.append(Work("reinforce", "train", rows=seen["forget"], steps=int(recipe.hyper["reinforce_steps"]),
                            copies=1, **shape(["forget"]), **common))
  needs = recipe.objective.needs
  if needs:
    names = {need.rows for need in needs}
    found.works.append(Work(
        "reference", "reference", rows=-(-max(held[name] for name in names) // job.num_microbatches),
        steps=job.num_microbatches * len(names), second=recipe.published.reinforces, **shape(names),
        **reference_fields(needs, held), **common))
  work = Work("unlearn", "train", rows=sum(seen.values()), steps=job.steps, **shape(sizes), **common)
  found.works.append(dataclasses.replace(work, **step_fields(recipe, seen, held, work)))


def _sizes(job: UnlearnJob, files: _Files) -> dict[str, Size]:
  """Of the data sets that the method reads; those that are made from the forget set are as it, where no file says."""
  sizes: dict[str, Size] = {}
  for name in sorted(job.recipe.objective.rows, key=lambda name: (name != "forget", name)):
    if name == "relabelled":  # the same tokens
      sizes[name] = files.rows("forget", job.forget)
    elif name == "alternate" and not job.alternates:
      sizes[name] = sizes["forget"]
      files.found.assumed.append("alternate: as forget")
    elif name == "idk":
      sizes[name] = files.refusals(job)
    else:
      sizes[name] = files.rows(name, getattr(job, SOURCES.get(name, name)))
  return sizes


def _release(audit: ReleaseAudit, where: str, on_cpu: bool, default: Size, found: Stages) -> None:
  config, folder = find_model(audit.unlearned, where, "unlearned")
  attack, interview = audit.attack, audit.interview
  _check_adapter(config, attack, where, "attack.adapter")
  files = _Files(config, folder, audit, default, found)
  sizes = {name: files.rows(name, getattr(audit, name)) for name in ("forget", "retain", "relearn")}
  asked = files.questions(audit.questions, interview.max_new_tokens)
  common, plans = _common(config, attack, audit.dtype, on_cpu), groups(audit)
  trained = max(map(len, plans))
  some = min(interview.runs_at_once or trained, trained)
  # Those that wait are in memory with those at work, which are copies of some of them.
  waits: dict[str, Any] = {"moments": True, "waiting": trained if some < trained else 0}
  times = len(plans) * (1 + len(attack.keep_steps)) * -(-trained // some)
  scored = [size._replace(rows=min(interview.score_rows or size.rows, size.rows)) for size in
            (sizes["forget"], sizes["retain"], sizes["relearn"])]
  rows = min(interview.batch_size, asked.rows)
  found.works += [
      Work("relearn", "train", runs=trained, groups=True, rows=min(attack.batch_size, sizes["relearn"].rows),
           length=sizes["relearn"].length, counted=sizes["relearn"].counted, steps=len(plans) * attack.keep_steps[-1],
           remat=attack.remat, num_microbatches=attack.num_microbatches, **common),
      Work("ask", "generate", runs=some, groups=True, rows=rows, length=bucket_length(asked.length), counted=1,
           steps=times * -(-asked.rows // rows), max_new_tokens=interview.max_new_tokens, **waits, **common),
      Work("utility", "reference", runs=some, groups=True, rows=interview.batch_size,
           length=max(size.length for size in scored), counted=max(size.counted for size in scored),
           steps=times * sum(-(-size.rows // interview.batch_size) for size in scored), **waits, **common)]
