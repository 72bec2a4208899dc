"""The stages of a configuration as work to be estimated; files are read where they are at hand, devices never."""

import dataclasses
import difflib
import pathlib
from typing import Any, NamedTuple

from relearn_jax.audit.arms import all_cases
from relearn_jax.audit.base import make_tokenizer, model_config
from relearn_jax.audit.config import AuditConfig, check_config
from relearn_jax.audit.release import ReleaseAudit, check_release
from relearn_jax.audit.release_run import groups
from relearn_jax.cases.files import read_questions, read_texts
from relearn_jax.data.batches import bucket_length
from relearn_jax.data.texts import encode_rows
from relearn_jax.data.tokens import prompt_ids
from relearn_jax.errors import InputError
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.lora import check_lora
from relearn_jax.models.model import Model
from relearn_jax.models.safetensor_files import read_json
from relearn_jax.models.sources import VOCABULARIES, load_tokenizer
from relearn_jax.plan.presets import PRESETS, preset
from relearn_jax.plan.work import Work
from relearn_jax.training.job import UnlearnJob, check_job
from relearn_jax.training.settings import TrainSettings


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
    config: `AuditConfig`, `UnlearnJob` or `ReleaseAudit`; paths of files may be left out.
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
    _names(config, found)
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
                     mend="expected an AuditConfig, an UnlearnJob or a ReleaseAudit")
  return found


def _filled(config: Any) -> Any:
  """The configuration with names in place of the files that are left out, which a plan does not need."""
  files = [field for field in ("forget", "retain", "relearn", "questions") if getattr(config, field, None) == ""]
  return dataclasses.replace(config, **dict.fromkeys(files, "(left out)"))


def find_model(name: str, where: str, field: str) -> tuple[ModelConfig, pathlib.Path | None]:
  """The architecture of a local folder, of which only config.json is read, or of a hub id in the table.

  Raises:
    InputError: neither; the nearest of the table are listed.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    file = folder / "config.json"
    return parse_config(read_json(file, "give the folder of a Hugging Face checkpoint"), str(file)), folder
  if known := preset(name):
    return known, None
  near = difflib.get_close_matches(name, PRESETS, 2, 0.4)
  hint = f" (nearest: {', '.join(near)})" if near else ""
  raise InputError(f"is {name!r}, which is no local folder and not in the table of models{hint}", file=where,
                   field=field, mend="give a folder with config.json; weights need not be there")


class _Files:
  """Sizes of data sets, read with the model's own tokenizer or assumed."""

  def __init__(self, config: ModelConfig, folder: pathlib.Path | None, chat: bool, default: Size, found: Stages):
    self.config, self.chat, self.default, self.found = config, chat, default, found
    has_tokenizer = folder is not None and any((folder / name).exists() for name in VOCABULARIES)
    self.tokenizer = load_tokenizer(folder, config) if folder is not None and has_tokenizer else None

  def rows(self, field: str, path: str) -> Size:
    if not path or self.tokenizer is None:
      self.found.assumed.append(f"{field}: {self._say(self.default)}" + (" (no tokenizer at hand)" if path else ""))
      return self.default
    file = pathlib.Path(path)
    encoded = encode_rows(self.tokenizer, read_texts(file), file, self.config.max_positions, chat=self.chat)
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
  files = _Files(config, folder, job.chat_template, default, found)
  objective = job.recipe.objective
  sizes = {name: files.rows(name, getattr(job, name)) for name in sorted(objective.rows)}
  common = _common(config, job, job.dtype, on_cpu)
  kl = {need.rows for need in objective.needs if need.kind == "hidden"}
  kept = sum(sizes[name].rows for name in kl)
  if objective.needs:
    names = {need.rows for need in objective.needs}
    rows = max(sizes[name].rows for name in names)
    found.works.append(Work(
        "reference", "reference", rows=-(-rows // job.num_microbatches), length=max(sizes[n].length for n in names),
        counted=max(sizes[n].counted for n in names), steps=job.num_microbatches * len(names), kl=bool(kl),
        reference_rows=kept, **common))
  found.works.append(Work(
      "unlearn", "train", rows=sum(min(job.batch_size, size.rows) for size in sizes.values()),
      length=max(size.length for size in sizes.values()), counted=max(size.counted for size in sizes.values()),
      steps=job.steps, remat=job.remat, num_microbatches=job.num_microbatches, kl=bool(kl), reference_rows=kept,
      **common))


def _release(audit: ReleaseAudit, where: str, on_cpu: bool, default: Size, found: Stages) -> None:
  config, folder = find_model(audit.unlearned, where, "unlearned")
  attack, interview = audit.attack, audit.interview
  _check_adapter(config, attack, where, "attack.adapter")
  files = _Files(config, folder, audit.chat_template, default, found)
  sizes = {name: files.rows(name, getattr(audit, name)) for name in ("forget", "retain", "relearn")}
  asked = files.questions(audit.questions, interview.max_new_tokens)
  common, plans = _common(config, attack, audit.dtype, on_cpu), groups(audit)
  trained = max(map(len, plans))
  some = min(interview.runs_at_once or trained, trained)
  # Those that wait are in memory with those at work, which are copies of some of them.
  waits: dict[str, Any] = {"moments": True, "waiting": trained if some < trained else 0}
  times = len(plans) * (1 + len(attack.keep_steps)) * -(-trained // some)
  scored = [size._replace(rows=min(interview.score_rows or size.rows, size.rows)) for size in
            (sizes["forget"], sizes["retain"])]
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


def _names(audit: AuditConfig, found: Stages) -> None:
  config, base, cases = model_config(audit.base, make_tokenizer()), audit.base, all_cases(audit)
  count = lambda texts: [len(row.text.split()) + 1 + row.complete for row in texts]
  longest = lambda select: max(length for case in cases.values() for length in count(select(case)))
  most = lambda select: max(len(select(case)) for case in cases.values())
  seeds, variants, depths = len(audit.case.seeds), len(audit.case.variants), audit.unlearn.depths
  objective = audit.recipe.objective
  cells, asked = variants * (2 * depths + 1), audit.evaluate
  length = longest(lambda case: case.memorize)
  common: dict[str, Any] = {"length": length, "counted": length - 1}
  interviews = 1 + audit.unlearn.max_steps // audit.unlearn.keep_every
  blocks = lambda runs: -(-runs // asked.runs_per_call)
  times = blocks(len(cases)) + interviews * blocks(len(cases) // 2) + seeds * (
      1 + len(audit.relearn.keep_steps)) * blocks(cells)
  found.works += [
      Work("pretrain", "train", config, rows=base.batch_size, length=base.max_names + 2, counted=base.max_names + 1,
           steps=base.steps),
      Work("memorize", "train", config, runs=len(cases), rows=most(lambda case: case.memorize),
           steps=audit.memorize.steps, **common),
      Work("unlearn", "train", config, runs=len(cases), rows=most(lambda case: case.forget)
           + ("retain" in objective.rows) * most(lambda case: case.retain), steps=audit.unlearn.max_steps,
           kl=any(need.kind == "hidden" for need in objective.needs), **common),
      Work("relearn", "train", config, runs=cells, rows=most(lambda case: case.relearn_sets[0].rows),
           steps=seeds * audit.relearn.keep_steps[-1],
           length=longest(lambda case: case.relearn_sets[0].rows),
           counted=longest(lambda case: case.relearn_sets[0].rows) - 1),
      Work("ask", "generate", config, runs=min(asked.runs_per_call, len(cases)), rows=audit.case.num_questions,
           length=max(asked.buckets), counted=1, steps=times, max_new_tokens=asked.max_new_tokens, moments=True,
           waiting=len(cases))]
  found.measured.append(f"rows of at most {length} tokens; unlearning is planned to its last step, although runs that "
                        "are through end it before")
