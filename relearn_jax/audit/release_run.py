"""The attack on checkpoints that somebody else made: every arm, seed by seed, in stages that can each be killed.

Arms of a group are entries of the stacked axis: they see the same rows in the same order at the same
learning rate. Where adapters are trained a group holds one arm, whose frozen base all its runs share.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit.evaluate import Interviewer, Scores, finite_by_name, load_scores, once
from relearn_jax.audit.release import ReleaseAudit
from relearn_jax.cases.files import read_case
from relearn_jax.data.chat import open_chat
from relearn_jax.data.order import small_batches
from relearn_jax.data.texts import encode_rows, stack_rows
from relearn_jax.data.tokens import prompt_ids, split_ids
from relearn_jax.errors import InputError
from relearn_jax.generation.prompts import end_ids
from relearn_jax.models.checkpoint import Checked, load_params
from relearn_jax.models.lora import check_lora, init_lora
from relearn_jax.models.model import Model, Params
from relearn_jax.models.precision import compute_dtype
from relearn_jax.models.sources import open_checkpoint
from relearn_jax.objectives.core import TokenRows
from relearn_jax.objectives.losses import nll
from relearn_jax.parallel.mesh import stack_trees
from relearn_jax.training.ended import AllEnded, Ended, Ledger
from relearn_jax.training.log import TrainLog
from relearn_jax.training.settings import make_model
from relearn_jax.training.stage import Stage, run_stage
from relearn_jax.training.step import NOTHING, Frozen
from relearn_jax.workdir import file_digests

FIELDS = {"U": "unlearned", "N": "control", "O": "original"}
MAY_DIFFER = ("max_positions", "bos_id", "eos_ids")


@dataclasses.dataclass(frozen=True)
class Attacked:
  """A run of the attack: one of the models, the attack's learning rate, and its seed."""

  arm: str
  seed: int
  rate: float
  named_rate: bool = False  # there are several

  @property
  def name(self) -> str:
    """For example "U-0" or, of several attacks, "U-0-lr0.001"."""
    return f"{self.arm}-{self.seed}" + (f"-lr{self.rate:g}" if self.named_rate else "")


def groups(config: ReleaseAudit) -> list[list[Attacked]]:
  """What is trained side by side, one group after the other; all arms of a seed stand next to each other."""
  arms = list(config.arms)
  sets = [[arm] for arm in arms] if config.attack.adapter.kind == "lora" else [arms]
  found = []
  for some in sets:
    rates = config.attack.learning_rates
    runs = [Attacked(arm, seed, rate, len(rates) > 1) for rate in rates for seed in config.seeds for arm in some]
    size = config.attack.runs_at_once or len(runs)
    found += [runs[start:start + size] for start in range(0, len(runs), size)]
  return found


class Release:
  """What an audit of checkpoints is made of: models, files and questions, checked without a device."""

  def __init__(self, config: ReleaseAudit, where: str, workdir: pathlib.Path):
    """Reads and checks everything but the weights.

    Raises:
      InputError: a file, a checkpoint or a row is wrong, or the models cannot be compared.
    """
    self.config, self.where, self.workdir = config, where, workdir
    self.scores = workdir / "checkpoints" / "scores"
    self.files = {field: pathlib.Path(getattr(config, field)) for field in ("forget", "retain", "relearn", "questions")}
    self.case, rows = read_case(config.name, **self.files)
    self.checked: dict[str, Checked] = {}
    for arm, name in config.arms.items():
      self.checked[arm], tokenizer = open_checkpoint(name, FIELDS[arm])
      if arm == "U":
        self.tokenizer = tokenizer
      else:
        self._compare(arm, tokenizer)
    checked = self.checked["U"]
    chat = open_chat(config.chat, self.tokenizer, checked.path, "chat_template") if config.chat_template else None
    if lora := config.attack.adapter.lora():
      check_lora(Model(checked.config), lora, where, "attack.adapter")
    limit = min(found.config.max_positions for found in self.checked.values())
    encode = lambda field: encode_rows(self.tokenizer, rows[field], self.files[field], limit, chat=chat)
    self.encoded = {field: encode(field) for field in ("forget", "retain", "relearn")}
    for field in ("forget", "retain"):
      self.encoded[field] = spread_evenly(self.encoded[field], config.interview.score_rows)
    self.asked = {}
    for question, row in zip(self.case.questions, rows["questions"], strict=True):
      file, new = self.files["questions"], config.interview.max_new_tokens
      prompt = prompt_ids(self.tokenizer, row, file, limit, new, chat=chat, field="interview.max_new_tokens")
      whole, start = split_ids(self.tokenizer, row, file, limit, chat=chat)
      # Where the tokenizer joins the end of the prompt with the answer, the answer is tokenized alone.
      alone = self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
      answer = whole[start:] if start == len(prompt) else alone
      self.asked[question.id] = prompt, answer
    self._check_seeds()

  def _compare(self, arm: str, tokenizer: Any) -> None:
    """Refuses a model that differs from U in more than its weights."""
    ours, theirs = (vars(self.checked[which].config) for which in ("U", arm))
    if fields := [key for key in ours if ours[key] != theirs[key] and key not in MAY_DIFFER]:
      raise InputError(f"has {fields[0]} {theirs[fields[0]]!r}, and the unlearned model {ours[fields[0]]!r}",
                       file=self.checked[arm].config_file, field=FIELDS[arm],
                       mend="give models that differ in their weights alone")
    if tokenizer.get_vocab() != self.tokenizer.get_vocab():
      raise InputError("has another vocabulary than the unlearned model", file=self.checked[arm].path,
                       field=FIELDS[arm], mend="give models that share their tokenizer")

  def _check_seeds(self) -> None:
    attack, count = self.config.attack, len(self.encoded["relearn"])
    if len(self.config.seeds) > 1 and attack.adapter.kind == "full" and attack.batch_size >= count:
      raise InputError(f"has {len(self.config.seeds)} seeds, but with all {count} rows of the relearn set in every "
                       "step they would be the same attack", file=self.where, field="seeds",
                       mend=f"set attack.batch_size below {count}, or give one seed")

  def digests(self) -> dict[str, str]:
    """SHA-256 of every file that decides the result, by name: the four of the case, and each model's."""
    found = dict(self.files)
    for arm, checked in self.checked.items():
      found |= {f"{FIELDS[arm]}/{name}": file for name, file in sorted(checked.deciding_files().items())}
    return file_digests(found)

  def interviewer(self, model: Model, mesh: Mesh, num_runs: int) -> Interviewer:
    """Asks the case's questions of `num_runs` models side by side."""
    interview = self.config.interview
    return Interviewer(
        model, self.tokenizer, self.case.questions, mesh, max_new_tokens=interview.max_new_tokens, buckets=None,
        runs_per_call=num_runs, batch_size=min(interview.batch_size, len(self.case.questions)),
        encode=lambda question: self.asked[question.id], eos_ids=end_ids(self.checked["U"]), prompt_counts=False,
        stop=interview.stop)

  def attack(self, mesh: Mesh) -> None:
    """Trains and asks every group; what was asked before is not asked again.

    Raises:
      InputError: a model that was given, asked as it is, gives no finite numbers; or every run of the attack ended.
    """
    config = self.config
    dtype = compute_dtype(config.dtype, self.where)
    model, plans = make_model(self.checked["U"], config.attack, dtype), groups(config)
    most = max(map(len, plans))
    self.ask = self.interviewer(model, mesh, min(config.interview.runs_at_once or most, most))
    for number, runs in enumerate(plans):
      ledger = self.ledger(number)
      if len(ledger.ended) == len(runs):
        continue
      try:
        if not self.score_path(number, config.attack.keep_steps[-1]).exists():
          self._attack_group(number, runs, model, dtype, mesh, ledger)
        for step in config.attack.keep_steps:  # a kill may have come before the ledger was written
          ledger.look(step, "answers", finite_by_name(ledger.runs, self.load_scores(number, step)))
      except AllEnded:
        pass  # of this group; the others may go on
    if len(ended := self.ended()) == sum(map(len, plans)):
      raise AllEnded(list(ended.values()), "attack.learning_rates", config.attack.learning_rates)

  def ledger(self, group: int) -> Ledger:
    """Of the runs of a group that end."""
    name = f"relearn-{group:02d}"
    return Ledger(self.workdir / "checkpoints" / name, name, [run.name for run in groups(self.config)[group]],
                  "attack.learning_rates", self.config.attack.learning_rates)

  def ended(self) -> dict[Attacked, Ended]:
    """Every run of the attack that ended."""
    return {run: found[run.name] for number, runs in enumerate(groups(self.config))
            for found in (self.ledger(number).ended,) for run in runs if run.name in found}

  def score_path(self, group: int, step: int) -> pathlib.Path:
    """Where the answers of a group are kept."""
    return self.scores / f"relearn-{group:02d}-{step:06d}.npz"

  def rows(self, field: str, num_runs: int) -> TokenRows:
    """Token rows of a file, the same for `num_runs` runs."""
    return stack_rows(self.encoded[field], num_runs)

  def _attack_group(self, number: int, runs: Sequence[Attacked], model: Model, dtype: Any, mesh: Mesh,
                    ledger: Ledger) -> None:
    config, attack, size, name = self.config, self.config.attack, len(runs), f"relearn-{number:02d}"
    lora = attack.adapter.lora()
    load = lambda arm, dtype: load_params(self.checked[arm], model, dtype=dtype, mesh=mesh)
    if lora is None:
      bases = {arm: load(arm, jnp.float32) for arm in dict.fromkeys(run.arm for run in runs)}
      frozen, trees = NOTHING, [bases[run.arm] for run in runs]
      del bases
    else:
      frozen = Frozen(shared=load(runs[0].arm, dtype))
      trees = [init_lora(model, lora, jax.random.key(run.seed)) for run in runs]
    held = [stack_trees(trees, mesh, model.axes())]
    trees.clear()  # a second copy of the weights
    forget, retain, rows = (self.rows(field, size) for field in ("forget", "retain", "relearn"))
    learned = stack_rows(spread_evenly(self.encoded["relearn"], config.interview.score_rows), size)

    def score(step: int, params: Params) -> Scores:
      return once(self.score_path(number, step), lambda: self.ask(
          params, retain, size, forget=forget, relearn=learned, frozen=frozen))

    def on_keep(step: int, params: Params) -> bool:
      ledger.look(step, "answers", finite_by_name(ledger.runs, score(step, params)))
      return False

    for run, finite in zip(runs, score(0, held[0]).finite, strict=True):
      if not finite:
        raise InputError("gives no finite numbers for questions and scored rows", file=self.checked[run.arm].path,
                         field=FIELDS[run.arm], mend="give a checkpoint whose log-probabilities are finite")
    data = {"relearn": rows}
    stage = Stage(
        name, [run.name for run in runs], lambda hyper: nll("relearn"), data,
        {"learning_rate": np.array([run.rate for run in runs], np.float32), "weight_decay": attack.weight_decay},
        attack.keep_steps,
        small_batches(data, attack.batch_size, [run.seed for run in runs]), attack.num_microbatches)
    run_stage(stage, model, held.pop, mesh, self.workdir / "checkpoints" / name,
              TrainLog(self.workdir / "train_log.jsonl"), on_keep=on_keep, save_every=config.checkpoint_seconds,
              frozen=frozen, ledger=ledger)

  def load_scores(self, group: int, step: int) -> Scores:
    """The answers of a group after a number of steps."""
    return load_scores(self.score_path(group, step))


def spread_evenly(rows: list[Any], number: int) -> list[Any]:
  """`number` of the rows, evenly spread; all of them where there are no more, or the number is 0."""
  return rows if not 0 < number < len(rows) else [rows[i * len(rows) // number] for i in range(number)]
