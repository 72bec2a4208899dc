"""The stages of a configuration as work to be estimated; files are read where they are at hand, devices never."""

import dataclasses
import difflib
import itertools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from relearn_jax.audit.audit_config import Audit, unlearn_method
from relearn_jax.audit.check_audit import check_audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.results_file import GENERIC
from relearn_jax.audit.stages import Planned, first_stages, plan_stages, unlearn_stages
from relearn_jax.audit.sweep import Sweep, candidate_groups, check_sweep
from relearn_jax.cases.control_sets import PREFIX
from relearn_jax.cases.files import FilesConfig
from relearn_jax.cases.sources import parse_source
from relearn_jax.data.prepared import PreparedRows
from relearn_jax.errors import InputError
from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import chain
from relearn_jax.models.lora import check_lora
from relearn_jax.models.model import Model
from relearn_jax.models.safetensor_files import read_json
from relearn_jax.plan.audit_plan import Data, Size, Sizes, interview_calls, measured, plan_audit
from relearn_jax.plan.data_files import Files
from relearn_jax.plan.presets import PRESETS, preset
from relearn_jax.plan.recipes import reference_fields, step_fields
from relearn_jax.plan.schedule import Disk, Grid, audit_disk, job_disk
from relearn_jax.plan.work import Work
from relearn_jax.training.job import SOURCES, UnlearnJob, check_job
from relearn_jax.training.train_settings import TrainSettings
from relearn_jax.training.unlearn_rows import holds_all, naming, open_prepared

SAMPLED_TEXTS = 2000  # of those that a model is pretrained on, for the length of the longest
DEFAULT = Size(400, 512, 128)


@dataclasses.dataclass
class Stages:
  """What is planned.

  Attributes:
    works: in the order in which they run.
    assumed: what was not at hand, a line each.
    measured: what was read, a line each.
    grid: of an audit.
    disk: what is kept; None of a sweep.
  """

  works: list[Work] = dataclasses.field(default_factory=list)
  assumed: list[str] = dataclasses.field(default_factory=list)
  measured: list[str] = dataclasses.field(default_factory=list)
  grid: Grid | None = None
  disk: Disk | None = None

  def add_audit(self, config: Audit, planned: Sequence[Planned], sizes: Sizes, on_cpu: bool) -> None:
    """The works of an audit, and what commands that share it do."""
    self.works = plan_audit(config, planned, sizes, on_cpu)
    self.grid = Grid(planned, interview_calls(config, planned))
    self.disk = audit_disk(config, planned, self.works)


def stages(config: Any, where: str, *, on_cpu: bool, default: Size = DEFAULT) -> Stages:
  """The stages of any configuration that a command takes.

  Args:
    config: `Audit`, `Sweep` or `UnlearnJob`; paths of files may be left out.
    where: the file it came from, for messages.
    on_cpu: whether dtype "auto" means float32.
    default: of data sets whose files are not given. A question's prompt is taken to be as long as a row
      without what counts.

  Raises:
    InputError: a setting that the command would refuse too, or a model of which nothing is known.
  """
  found = Stages()
  if isinstance(config, Audit):
    _audit(config, where, on_cpu, default, found)
  elif isinstance(config, Sweep):
    _sweep(config, where, on_cpu, found)
  elif isinstance(config, UnlearnJob):
    check_job(_filled(config), where)
    _unlearn(config, where, on_cpu, default, found)
  else:
    raise InputError(f"describes a {type(config).__name__}", file=where, field="--config",
                     mend="expected an Audit, a Sweep or an UnlearnJob")
  return found


def _filled(config: Any) -> Any:
  """The configuration with names in place of the files that are left out, which a plan does not need."""
  fields = ("forget", "retain", "questions", "alternates", "anchors")
  files = dict.fromkeys((field for field in fields if getattr(config, field, None) == ""), "(left out)")
  sets = {"relearn": ("relearn.jsonl",)} if getattr(config, "relearn", None) == () else {}
  return dataclasses.replace(config, **files, **sets)


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
  prepared = open_prepared(job)
  config, folder = find_model(job.model, where, "model")
  _check_adapter(config, job, where, "adapter")
  files = Files(config, folder, job.chat if job.chat_template else None, default, found.assumed, found.measured,
                job.columns)
  data = _data(job, files, prepared)
  common, recipe = _common(config, job, job.dtype, on_cpu), job.recipe
  common |= {"remat": job.remat, "num_microbatches": job.num_microbatches}
  held = {name: one.size.rows for name, one in data.items()}
  seen = {name: one.seen(job.batch_size) for name, one in data.items()}
  token_bytes = {name: one.token_bytes(job.batch_size) for name, one in data.items()}

  def shape(names: Collection[str]) -> dict[str, Any]:
    return {"length": max(data[name].size.length for name in names),
            "counted": max(data[name].size.counted for name in names)}
  if recipe.published.reinforces:
    # What will unlearn waits for the second model.
    found.works.append(Work("reinforce", "train", rows=seen["forget"], steps=int(recipe.hyper["reinforce_steps"]),
                            copies=1, token_bytes=token_bytes["forget"], **shape(["forget"]), **common))
  needs = recipe.objective.needs
  if needs:
    names = {need.rows for need in needs}
    found.works.append(Work(
        "reference", "reference", rows=-(-max(held[name] for name in names) // job.num_microbatches),
        steps=job.num_microbatches * len(names), second=recipe.published.reinforces,
        token_bytes=sum(token_bytes.values()), **shape(names), **reference_fields(needs, held), **common))
  work = Work("unlearn", "train", rows=sum(seen.values()), steps=job.steps, token_bytes=sum(token_bytes.values()),
              **shape(data), **common)
  found.works.append(dataclasses.replace(work, **step_fields(recipe, seen, held, work)))
  found.disk = job_disk(found.works, job.keep_every)


def _data(job: UnlearnJob, files: Files, prepared: Mapping[str, PreparedRows]) -> dict[str, Data]:
  """The data sets that the method reads; those that are made from the forget set are as it, where no file says."""
  data: dict[str, Data] = {}
  for name, rows in prepared.items():  # before the others, whose rows are read one by one
    is_held = holds_all(job, name, rows)
    with naming(job, name):
      data[name] = Data(files.prepared(name, rows), is_streamed=not is_held)
  objective = job.recipe.objective
  for name in sorted(objective.rows - prepared.keys(), key=lambda name: (name != "forget", name)):
    is_packed = job.pack and name in objective.packs
    if name == "relabelled":  # the same tokens
      data[name] = dataclasses.replace(files.data("forget", job.forget, is_packed), is_labelled=True)
    elif name == "alternate" and not job.alternates:
      data[name] = data["forget"]
      files.assumed.append("alternate: as forget")
    elif name == "idk":
      data[name] = files.refusals(job, is_packed)
    else:
      data[name] = files.data(name, getattr(job, SOURCES.get(name, name)), is_packed)
  return data


def _audit(audit: Audit, where: str, on_cpu: bool, default: Size, found: Stages) -> None:
  arms = audit.arms
  if not arms.loaded and not arms.memorized and not arms.start:
    check_audit(audit, where)
    _pretrained(audit, where, on_cpu, found)
    return
  if arms.original and not arms.unlearned and not arms.control:
    arms = dataclasses.replace(arms, unlearned=arms.original, control=arms.original)
    found.assumed.append("three models of the original's architecture are attacked")
  given = audit.case
  audit = dataclasses.replace(audit, arms=arms, case=_filled(given))
  check_audit(audit, where)
  field = next(field for field in ("unlearned", "start", "original") if getattr(arms, field))
  config, folder = find_model(getattr(arms, field), where, f"arms.{field}")
  for name in audit.attack.adapters:
    if lora := audit.attack.adapter(name):
      check_lora(Model(config), lora, where, "attack.lora")
  files = Files(config, folder, audit.ask.chat if audit.ask.chat_template else None, default, found.assumed,
                found.measured, getattr(given, "columns", None))
  if isinstance(given, FilesConfig):
    names, sizes = [parse_source(source).name for source in audit.case.relearn], _audit_sizes(
        audit, given, config, files)
  else:
    names, sizes = _case_sizes(audit, config, files)
  controls = [f"{PREFIX}{kind}" for kind in audit.attack.controls]  # each as large as the first relearn set
  sizes = dataclasses.replace(sizes, data={**sizes.data, **dict.fromkeys(controls, sizes.data[names[0]])})
  names = [*names, *controls]
  if audit.ask.generic:
    sizes = dataclasses.replace(sizes, data={**sizes.data, GENERIC: files.rows(GENERIC, audit.ask.generic)})
  found.add_audit(audit, plan_stages(audit, names), sizes, on_cpu)


def _audit_sizes(audit: Audit, given: Any, config: ModelConfig, files: Files) -> Sizes:
  """Sizes of the data sets of a case from files, as far as they are at hand."""
  data = {name: files.rows(name, getattr(given, name)) for name in ("forget", "retain")}
  data |= {parse_source(path).name: files.rows("relearn", path if given.relearn else "") for path in audit.case.relearn}
  if not audit.arms.loaded and not audit.arms.memorized:
    data["memorize"] = files.rows("memorize", given.memorize) if given.memorize else Size(
        data["forget"].rows + data["retain"].rows, *map(max, zip(data["forget"][1:], data["retain"][1:], strict=True)))
  if not audit.arms.loaded:
    data["relabelled"] = data["idk"] = data["alternate"] = data["forget"]
  return Sizes(config, data, files.questions(given.questions, audit.ask.max_new_tokens))


def _case_sizes(audit: Audit, config: ModelConfig, files: Files) -> tuple[list[str], Sizes]:
  """The relearn sets of any other case, and the sizes of its data sets, where there is a tokenizer to measure them."""
  methods = [] if audit.arms.loaded else [unlearn_method(audit.unlearn, name) for name in audit.unlearn.methods]
  read = sorted({name for method in methods for name in method.recipe.objective.rows} - {"forget", "retain"})
  kept = ("forget", "retain", *(("memorize",) if methods and not audit.arms.memorized else ()), *read)
  if files.tokenizer is None:
    names = list(audit.attack.relearn_sets or ("relearn",))
    size = files.rows("every data set of the case", "")
    return names, Sizes(config, dict.fromkeys((*kept, *names), size),
                        files.questions("", audit.ask.max_new_tokens))
  case = audit.case.make(audit.case.versions()[0], audit.seeds[0], "U")
  if absent := [name for name in kept if not case.rows(name)]:
    raise InputError(f"has a method that reads {absent[0]} rows, and case {case.name!r} has none",
                     field="unlearn.methods", mend="leave it out")
  names = list(audit.attack.relearn_sets or (one.name for one in case.relearn_sets))
  data = {name: files.texts(name, case.rows(name), case.origin(name))
          for name in (*kept, *names)}
  return names, Sizes(config, data, files.asked(case.questions, case.origin("questions"), audit.ask.max_new_tokens))


def _pretrained(audit: Audit, where: str, on_cpu: bool, found: Stages) -> Sizes:
  """An audit on a model that is pretrained here: everything is at hand."""
  exp, sizes = _measured(audit, where, found)
  found.add_audit(audit, plan_stages(audit, exp.relearn_sets), sizes, on_cpu)
  return sizes


def _measured(audit: Audit, where: str, found: Stages) -> tuple[Experiment, Sizes]:
  exp = Experiment(audit, where, pathlib.Path("."))
  sizes = measured(exp)
  pretrain = audit.arms.pretrain
  number = min(pretrain.steps * pretrain.batch_size, SAMPLED_TEXTS)
  texts = itertools.islice(audit.case.pretraining_texts(pretrain.seed), number)
  longest = max(len(text.split()) for text in texts) + 2  # BOS and EOS
  sizes = dataclasses.replace(sizes, data={**sizes.data, "pretrain": Size(0, longest, longest - 1)})
  most = max(size.length for name, size in sizes.data.items() if name != "pretrain")
  found.measured.append(f"rows of at most {most} tokens; unlearning is planned to its last step, although runs that "
                        "are through end it before")
  return exp, sizes


def _sweep(config: Sweep, where: str, on_cpu: bool, found: Stages) -> None:
  """A method's candidates are stacked, those that one compiled step cannot serve in turn."""
  methods = check_sweep(config, where)
  audit = dataclasses.replace(config.audit, unlearn=dataclasses.replace(config.audit.unlearn, methods=tuple(methods)))
  check_audit(audit, where)
  exp, sizes = _measured(audit, where, found)
  stages: list[Planned] = first_stages(audit)
  for name, method in methods.items():
    for number, (own, members) in enumerate(candidate_groups(method, config.grids[name])):
      u_chains = [chain for chain in exp.chains if chain.arm == "U"]
      for stage in unlearn_stages(audit, own):
        suffix = "-reinforce" if stage.kind == "reinforce" else ""
        stages.append(dataclasses.replace(stage, name=f"sweep-{name}-{number}{suffix}",
                                          chains=tuple(u_chains * len(members))))
  found.works += plan_audit(audit, stages, sizes, on_cpu)
