"""The stages of an audit as work to be estimated: the list that the pipeline runs, with the sizes of its data sets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from relearn_jax.audit.acquire import every
from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.results_file import GENERIC
from relearn_jax.audit.stages import Planned
from relearn_jax.data.batches import bucket_length
from relearn_jax.data.packing import sequences_of
from relearn_jax.data.rows import PICK_BELOW, Encoded
from relearn_jax.metrics.choices import LETTER, OPTION
from relearn_jax.models.config import ModelConfig
from relearn_jax.plan.recipes import step_fields
from relearn_jax.plan.work import Work


class Size(NamedTuple):
  """Rows of a data set: how many, their longest in tokens, and the most tokens of a row that count."""

  rows: int
  length: int
  counted: int


@dataclasses.dataclass(frozen=True)
class Data:
  """A data set as it lies on the devices.

  Attributes:
    size: of its rows; where they are packed, of its sequences.
    packed: rows that share these sequences; 0: each has its own.
    is_streamed: only the rows of a step are there.
    is_labelled: its rows have labels of their own.
  """

  size: Size
  packed: int = 0
  is_streamed: bool = False
  is_labelled: bool = False

  def seen(self, batch_size: int) -> int:
    """Rows, or sequences, of a step; `batch_size` counts rows."""
    rows = self.size.rows
    return sequences_of(batch_size, self.packed, rows) if self.packed else min(batch_size, rows)

  def token_bytes(self, batch_size: int) -> int:
    """Bytes of one run's tokens on all devices, with their padding.

    A row has 4 bytes a token for each of tokens, mask, labels and segments, and 4 for each place that is picked. Beside
    a data set that is held are the rows of a step; of one that is streamed those of two, since the next one's are laid
    out while a step runs. One that every step sees whole is there once.
    """
    (rows, length, counted), seen = self.size, self.seen(batch_size)
    row = 4 * length * (2 + self.is_labelled + bool(self.packed))
    row += 4 * counted * (counted < PICK_BELOW * (length - 1))
    return row * (rows if seen == rows else 2 * seen if self.is_streamed else rows + seen)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What an audit's stages work on.

  Attributes:
    config: the model.
    data: data set or relearn set -> its size.
    questions: their number, and the tokens of the longest prompt.
  """

  config: ModelConfig
  data: Mapping[str, Size]
  questions: Size


def measured(exp: Experiment) -> Sizes:
  """Of an audit whose files are at hand, all of its cases together."""
  names = {*exp.trained_on(), "forget", "retain", *exp.relearn_sets}
  prompts = [ids for ids, _ in exp.asked]
  data = {name: _largest([exp.encode(case, name) for case in exp.all_cases()]) for name in names}
  data |= {name: _largest([rows]) for name, rows in ({GENERIC: exp.generic} | exp.options).items() if rows}
  return Sizes(exp.decoder, data,
               Size(len(prompts), max(map(len, prompts)), 1))


def _largest(sets: Sequence[Sequence[Encoded]]) -> Size:
  return Size(max(map(len, sets)), max(len(row.ids) for rows in sets for row in rows),
              max(len(row.ids) - row.start for rows in sets for row in rows))


def _common(config: Audit, sizes: Sizes, on_cpu: bool) -> dict[str, Any]:
  dtype = config.arms.dtype
  return {"config": sizes.config, "compute_bytes": 4 if dtype == "float32" or (dtype == "auto" and on_cpu) else 2}


def _seen(batch_size: int, size: Size) -> int:
  return min(batch_size or size.rows, size.rows)


def _token_bytes(batch_size: int, *sizes: Size) -> int:
  return sum(Data(size).token_bytes(batch_size or size.rows) for size in sizes)


def attack_work(config: Audit, stage: Planned, sizes: Sizes, on_cpu: bool) -> Work:
  """An attack of all cells of a stage side by side."""
  attack, size = config.attack, sizes.data[stage.attack.relearn_set]
  lora, common = attack.adapter(stage.attack.adapter), _common(config, sizes, on_cpu)
  loaded = bool(config.arms.loaded)
  adapter: dict[str, Any] = {} if lora is None else {
      "adapter": "lora", "lora_rank": lora.rank, "lora_targets": lora.targets, "shared": loaded,
      "param_dtype": common["compute_bytes"] if loaded else 4}
  return Work(stage.name, "train", runs=len(stage.cells), groups=True, rows=_seen(stage.batch_size, size),
              length=size.length, counted=size.counted, steps=stage.steps, remat=attack.remat,
              num_microbatches=attack.num_microbatches, token_bytes=_token_bytes(stage.batch_size, size), **adapter,
              **common)


def train_work(config: Audit, stage: Planned, sizes: Sizes, on_cpu: bool) -> Work:
  """A stage of training, of whatever kind."""
  common = _common(config, sizes, on_cpu)
  if stage.kind == "attack":
    return attack_work(config, stage, sizes, on_cpu)
  if stage.kind == "pretrain":
    base, size = config.arms.pretrain, sizes.data["pretrain"]
    return Work(stage.name, "train", rows=base.batch_size, length=size.length, counted=size.counted, steps=stage.steps,
                **common)
  held = config.memorize if stage.kind == "memorize" else config.unlearn
  more: dict[str, Any] = {"runs": len(stage.chains), "steps": stage.steps, "remat": held.remat,
                          "num_microbatches": held.num_microbatches, **common}
  if stage.kind != "unlearn":
    size = sizes.data["memorize" if stage.kind == "memorize" else "forget"]
    # The models before it wait for those that are reinforced.
    return Work(stage.name, "train", rows=_seen(stage.batch_size, size), length=size.length, counted=size.counted,
                copies=int(stage.kind == "reinforce"), token_bytes=_token_bytes(stage.batch_size, size), **more)
  assert stage.method
  recipe = stage.method.recipe
  read = {name: sizes.data[name] for name in sorted(recipe.objective.rows)}
  seen = {name: _seen(stage.batch_size, size) for name, size in read.items()}
  work = Work(stage.name, "train", rows=sum(seen.values()), length=max(size.length for size in read.values()),
              counted=max(size.counted for size in read.values()),
              token_bytes=_token_bytes(stage.batch_size, *read.values()), **more)
  return dataclasses.replace(work, **step_fields(
      recipe, seen, {name: size.rows for name, size in read.items()}, work))


def interviews(config: Audit, stage: Planned) -> list[int]:
  """Runs that are asked in a stage, once for each interview."""
  if stage.kind == "memorize":
    return [len(stage.chains)]
  if stage.kind == "unlearn":
    return [sum(chain.arm == "U" for chain in stage.chains)] * len(every(stage.steps, config.unlearn.keep_every))
  if stage.kind == "attack":
    return [len(stage.points), *[len(stage.cells)] * len(config.attack.keep_steps)]
  return []


def block_size(config: Audit, stages: Sequence[Planned]) -> tuple[int, int]:
  """Models that are asked together, and the most that are to be asked at a time."""
  most = max(len(stage.runs) for stage in stages)
  return min(config.ask.runs_at_once or most, most), most


def interview_calls(config: Audit, stages: Sequence[Planned]) -> list[int]:
  """Of each stage, how often its interviews ask a block of models."""
  block, _ = block_size(config, stages)
  return [sum(-(-runs // block) for runs in interviews(config, stage)) for stage in stages]


def ask_works(config: Audit, stages: Sequence[Planned], sizes: Sizes, on_cpu: bool) -> list[Work]:
  """All interviews: answers, and the likelihood of scored rows."""
  ask = config.ask
  block, most = block_size(config, stages)
  calls = sum(interview_calls(config, stages))
  # Those that wait are in memory with those at work, which are copies of some of them.
  common: dict[str, Any] = {"runs": block, "groups": True, "moments": True, "waiting": most if block < most else 0,
                            **_common(config, sizes, on_cpu)}
  if loras := [config.attack.adapter(stage.attack.adapter) for stage in stages if stage.kind == "attack"]:
    if config.arms.loaded and all(loras) and loras[0]:
      common |= {"adapter": "lora", "lora_rank": loras[0].rank, "lora_targets": loras[0].targets, "shared": True,
                 "param_dtype": common["compute_bytes"]}
  number = min(ask.batch_size or sizes.questions.rows, sizes.questions.rows)
  every = (LETTER, OPTION)  # of which all rows are scored
  attacked = {stage.attack.relearn_set for stage in stages if stage.kind == "attack"}
  scored = {name: size if name in every else size._replace(rows=min(ask.score_rows or size.rows, size.rows))
            for name, size in sizes.data.items() if name in ("forget", "retain", GENERIC, *every) or name in attacked}
  # All of an interview are scored together, and one relearn set is among them.
  rows = sum(size.rows for name, size in scored.items() if name not in attacked)
  rows += max((scored[name].rows for name in attacked if name in scored), default=0)
  together = ask.batch_size or rows
  return [
      Work("ask", "generate", rows=number, length=bucket_length(sizes.questions.length, ask.buckets or None), counted=1,
           steps=calls * -(-sizes.questions.rows // number), max_new_tokens=ask.max_new_tokens, **common),
      Work("utility", "reference", rows=together, length=max(size.length for size in scored.values()),
           counted=max(size.counted for size in scored.values()), steps=calls * -(-rows // together), **common)]


def plan_audit(config: Audit, stages: Sequence[Planned], sizes: Sizes, on_cpu: bool) -> list[Work]:
  """All works of an audit, in the order of its stages; interviews last."""
  return [*(train_work(config, stage, sizes, on_cpu) for stage in stages), *ask_works(config, stages, sizes, on_cpu)]


def merged(works: Sequence[Work]) -> list[Work]:
  """Works that follow each other and differ in their name alone as one, with all their steps."""
  found: list[tuple[Work, int]] = []
  for work in works:
    if found and dataclasses.replace(found[-1][0], name=work.name) == work:
      found[-1] = found[-1][0], found[-1][1] + 1
    else:
      found.append((work, 1))
  return [work if times == 1 else dataclasses.replace(work, name=f"{work.name} and {times - 1} more",
                                                      steps=work.steps * times) for work, times in found]
