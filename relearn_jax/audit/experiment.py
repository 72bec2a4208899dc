"""What the stages of an audit share: cases, models, token rows and questions, all checked without a device."""

import dataclasses
import functools
import json
import pathlib
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from relearn_jax.audit import content_keys, pretrained
from relearn_jax.audit.audit_config import PRETRAINING, Audit, UnlearnMethod, unlearn_method
from relearn_jax.audit.extra_texts import add_control_sets, generic_texts
from relearn_jax.audit.given import Given
from relearn_jax.audit.grid import Cell, Chain, chains
from relearn_jax.audit.interview import Answers, Interviewer
from relearn_jax.audit.results_file import GENERIC
from relearn_jax.audit.shelf import Place, Shelf, StageFolder, finished
from relearn_jax.cases.base import Arm, Case, Question, spread_evenly
from relearn_jax.cases.control_sets import PREFIX
from relearn_jax.cases.sources import parse_source, source_input
from relearn_jax.data.chat import open_chat
from relearn_jax.data.rows import Encoded, stack_runs
from relearn_jax.data.texts import encode_question, encode_texts, stack_rows
from relearn_jax.errors import InputError
from relearn_jax.generation.prompts import end_ids
from relearn_jax.metrics.choices import LETTER, OPTION, Options
from relearn_jax.metrics.scores import Asked, score_stored
from relearn_jax.models.checkpoint import Checked, check_checkpoint, load_params
from relearn_jax.models.checkpoint_sources import load_tokenizer, open_checkpoint
from relearn_jax.models.lora import check_lora
from relearn_jax.models.model import Model, Params, fingerprint, unroll
from relearn_jax.models.precision import compute_dtype
from relearn_jax.objectives.core import TokenRows
from relearn_jax.parallel.beside import Beside
from relearn_jax.parallel.mesh import spreads_runs, stack_trees, to_first
from relearn_jax.parallel.processes import agree, by_first, write_atomically
from relearn_jax.training.ended import Ended, read_ended
from relearn_jax.training.log import TrainLog
from relearn_jax.workdir import file_digests

FIELDS = {"U": "arms.unlearned", "N": "arms.control", "O": "arms.original", "start": "arms.start"}
MEMORIZED: dict[Arm, str] = {"U": "O", "N": "N"}  # whose checkpoint a chain unlearns from
FINGERPRINT = "fingerprint.json"
MAY_DIFFER = ("max_positions", "bos_id", "eos_ids")


class Experiment:
  """An audit's cases and models.

  Attributes:
    cases: of every chain; where models are loaded, one for all.
    checked: the checkpoints by arm, or the one that all begin as by "start" (a pretrained one only after `open`).
    decoder: the architecture.
    done: content key -> folder and run of everything that is finished.
  """

  def __init__(self, config: Audit, where: str, workdir: pathlib.Path):
    """Reads and checks everything but weights.

    Raises:
      InputError: a file, a checkpoint or a row is wrong, or the models cannot be compared.
    """
    self.config, self.where, self.workdir = config, where, workdir
    self.checkpoints, self.beside = workdir / "checkpoints", Beside()
    self.shelf = Shelf(self.beside)
    self.given = self.checkpoints / "given"  # models that were given
    self.done = finished(self.checkpoints)
    self._attacked_keys: dict[Cell, str] = {}
    self.money_left: float | None = None  # for what a provider trains; None: as much as it takes
    self.log = TrainLog(workdir / "train_log.jsonl")
    case = config.case_config
    self.chains = chains(config)
    self.cases = {chain: case.make(chain.variant, chain.seed, chain.arm) for chain in self.chains}
    self.first = next(iter(self.cases.values()), None) or case.make(case.versions()[0], config.seeds[0], "U")
    self.checked: dict[str, Checked] = {}
    self._open_checkpoints()
    # One that is pretrained is to have as many as the case needs; see `_check_positions`.
    self.max_positions = min((one.config.max_positions for one in self.checked.values()), default=sys.maxsize)
    self.chat = None
    if config.ask.chat_template:
      folder = next(iter(self.checked.values())).path if self.checked else pathlib.Path("arms.pretrain")
      self.chat = open_chat(config.ask.chat, self.tokenizer, folder, "ask.chat_template", "ask.chat.")
    for name in {*config.attack.adapters, *(config.attack.search.adapters if config.attack.search.trials else ())}:
      if lora := config.attack.adapter(name):
        check_lora(Model(self.decoder), lora, where, "attack.lora")
    self.relearn_sets = self._named_sets()
    if config.attack.controls:
      self._add_control_sets()
    self._encoded: dict[tuple[str, tuple], list[Encoded]] = {}
    self.asked = [encode_question(
        self.tokenizer, question, self.first.origin("questions"), self.max_positions, config.ask.max_new_tokens,
        chat=self.chat) for question in self.first.questions]
    self.generic = self._read_generic()
    self.options = self._encode_options()
    for one in self.all_cases():
      for name in (*self.trained_on(), "forget", "retain", *self.relearn_sets):
        self.encode(one, name)
    self._check_positions()
    self._check_seeds()

  def trained_on(self) -> list[str]:
    """The data sets that memorising and the methods read, each of which the case must have.

    Raises:
      InputError: it has no row of one.
    """
    if self.config.arms.loaded:
      return []
    methods = [unlearn_method(self.config.unlearn, name) for name in self.config.unlearn.methods]
    for method in methods:
      for name in sorted(method.recipe.objective.rows):
        if not self.first.rows(name) or (name == "relabelled" and not self.first.anchors):
          raise InputError(f"has {method.name!r}, and case {self.first.name!r} has no {name} rows for it",
                           file=self.where, field="unlearn.methods", mend="leave it out")
    first = [] if self.config.arms.memorized else ["memorize"]
    return [*first, *sorted({name for method in methods for name in method.recipe.objective.rows})]

  def all_cases(self) -> list[Case]:
    """Every case, in the order of the chains."""
    return list(self.cases.values()) or [self.first]

  def case(self, chain: Chain) -> Case:
    """The case of a chain; where models are loaded, the one there is."""
    return self.cases.get(chain, self.first)

  def _open_checkpoints(self) -> None:
    config, arms = self.config, self.config.arms
    memorized = {MEMORIZED[arm]: name for arm, name in arms.memorized.items()}
    for arm, name in (arms.loaded or memorized or ({"start": arms.start} if arms.start else {})).items():
      self.checked[arm], tokenizer = open_checkpoint(name, FIELDS[arm])
      if len(self.checked) == 1:
        self.tokenizer, self.decoder = tokenizer, self.checked[arm].config
      else:
        self._compare(arm, tokenizer)
    if not self.checked:
      self.tokenizer = pretrained.word_tokenizer(config.case_config.vocabulary())
      self.decoder = pretrained.model_config(arms.pretrain, self.tokenizer)

  def _compare(self, arm: str, tokenizer: Any) -> None:
    """Refuses a model that differs from the first in more than its weights."""
    first = next(iter(self.checked))
    name = {"U": "unlearned model", "O": "original", "N": "control"}[first]
    ours, theirs = (vars(self.checked[which].config) for which in (first, arm))
    if fields := [key for key in ours if ours[key] != theirs[key] and key not in MAY_DIFFER]:
      raise InputError(f"has {fields[0]} {theirs[fields[0]]!r}, and the {name} {ours[fields[0]]!r}",
                       file=self.checked[arm].config_file, field=FIELDS[arm],
                       mend="give models that differ in their weights alone")
    if tokenizer.get_vocab() != self.tokenizer.get_vocab():
      raise InputError(f"has another vocabulary than the {name}", file=self.checked[arm].path,
                       field=FIELDS[arm], mend="give models that share their tokenizer")

  def _named_sets(self) -> tuple[str, ...]:
    there, wanted = [one.name for one in self.first.relearn_sets], self.config.attack.relearn_sets
    if unknown := [name for name in wanted if name not in there]:
      raise InputError(f"has {unknown[0]!r}", file=self.where, field="attack.relearn_sets",
                       mend=f"expected some of {', '.join(there)}")
    return tuple(wanted or there)

  def _add_control_sets(self) -> None:
    """Puts control sets beside the relearn sets of all cases."""
    kinds, case = self.config.attack.controls, self.config.case_config
    count = lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
    made = add_control_sets(
        [self.first, *self.cases.values()], kinds, self.relearn_sets[0], count,
        () if self.checked else tuple(case.vocabulary()), generic_texts(self.config.ask, case))
    self.first, self.cases = made[0], dict(zip(self.cases, made[1:], strict=True))
    self.relearn_sets += tuple(f"{PREFIX}{kind}" for kind in kinds)

  def _read_generic(self) -> list[Encoded]:
    """Generic text whose perplexity is measured: the same rows for all models.

    Raises:
      InputError: it cannot be read, or a row is too long.
    """
    file = parse_source(self.config.ask.generic).path if self.config.ask.generic else pathlib.Path()
    return encode_texts(
        self.tokenizer, generic_texts(self.config.ask, self.config.case_config), file, self.max_positions)

  def _encode_options(self) -> dict[str, list[Encoded]]:
    """The letters and the full answers of every option, `LETTER` and `OPTION`, after their prompts.

    Without a chat template, as lm-eval asks them of every model.

    Raises:
      InputError: one is too long.
    """
    found: dict[str, list[Encoded]] = {LETTER: [], OPTION: []}
    for one in self.first.choices:
      for number, option in enumerate(one.options):
        for kind, prompt, answer in ((LETTER, one.listed, f" {string.ascii_uppercase[number]}"),
                                     (OPTION, one.prompt, option)):
          ids, own = encode_question(
              self.tokenizer, Question(one.id, prompt, answer, (), one.cluster, line=one.line),
              self.first.origin("choices"), self.max_positions, 0)
          found[kind].append(Encoded([*ids, *own], len(ids)))
    return found if self.first.choices else {}

  def _check_positions(self) -> None:
    """Refuses a model that is pretrained with fewer positions than the case needs: no row of it is at fault."""
    longest = max(*(len(one.ids) for rows in self._encoded.values() for one in rows),
                  *(len(one.ids) for rows in self.options.values() for one in rows),
                  *(len(prompt) + self.config.ask.max_new_tokens for prompt, _ in self.asked))
    if not self.checked and longest > self.decoder.max_positions:
      raise InputError(f"is {self.decoder.max_positions}", file=self.where, field="arms.pretrain.max_positions",
                       mend=f"expected at least {longest}: the longest row, or prompt with its new tokens")

  def _check_seeds(self) -> None:
    """Seeds of models that were given differ by the order of rows, or by the adapter's first weights."""
    attack, unlearn = self.config.attack, self.config.unlearn
    given = self.config.arms.loaded or (
        self.config.arms.memorized and not 0 < unlearn.batch_size < len(self.first.forget))
    for name in self.relearn_sets if given and len(self.config.seeds) > 1 else ():
      count = len(self.encode(self.first, name))
      if None in map(attack.adapter, attack.used_adapters()) and not 0 < attack.batch_size < count:
        raise InputError(f"has {len(self.config.seeds)} seeds, but with all {count} rows of the relearn set in every "
                         "step they would be the same attack", file=self.where, field="seeds",
                         mend=f"set attack.batch_size below {count}, or give one seed")

  def encode(self, case: Case, name: str) -> list[Encoded]:
    """A data set of a case as token ids; rows that are alike are tokenized once.

    Raises:
      InputError: naming file or case, and line.
    """
    anchors = tuple(case.anchors) if name == "relabelled" else None
    key = (name, (case.rows(name), anchors))
    if key not in self._encoded:
      self._encoded[key] = encode_texts(
          self.tokenizer, case.rows(name), case.origin(name), self.max_positions, chat=self.chat,
          anchors=None if anchors is None else dict(anchors))
    return self._encoded[key]

  def rows(self, chains: Sequence[Chain], name: str, *, scored: bool = False) -> TokenRows:
    """A data set of several runs, `[runs, rows, length]` on the host; of those that are scored, evenly spread ones."""
    number = self.config.ask.score_rows if scored else 0
    every = [spread_evenly(self.encode(self.case(chain), name), number) for chain in chains]
    return stack_rows(every[0], len(every)) if all(one == every[0] for one in every) else stack_runs(every)

  def scored_rows(self, chains: Sequence[Chain], relearn_set: str | None = None) -> dict[str, TokenRows]:
    """The rows whose likelihood is part of an interview; of options only where a relearn set is: they are many."""
    names = {"retain": "retain", "forget": "forget"} | ({"relearn": relearn_set} if relearn_set else {})
    found = {key: self.rows(chains, name, scored=True) for key, name in names.items()}
    more = {GENERIC: self.generic} | (self.options if relearn_set else {})
    return found | {name: stack_rows(rows, len(chains)) for name, rows in more.items() if rows}

  def digests(self) -> dict[str, str] | None:
    """SHA-256 of every file that decides the result, by field; None where there is none."""
    found = dict(self.config.case_config.inputs())
    if self.config.ask.generic not in ("", PRETRAINING):
      found["generic"] = source_input(self.config.ask.generic)
    for arm, checked in self.checked.items():
      field = FIELDS[arm].removeprefix("arms.")
      found |= {f"{field}/{name}": file for name, file in sorted(checked.deciding_files().items())}
    return file_digests(found) if found else None

  @functools.cached_property
  def choices(self) -> list[Options]:
    """The questions with options as they stand beside stored answers."""
    return [Options(one.id, one.options, one.correct, one.cluster) for one in self.first.choices]

  @functools.cached_property
  def questions(self) -> list[Asked]:
    """The questions as they stand beside stored answers."""
    ask, begins = self.config.ask, self.first.begins_in_prompt
    return [Asked(q.id, q.prompt, q.answer, q.keywords, q.cluster, q.case, (*ask.stop, *q.stop),
                  self.prompt_text(ids) if begins else "")
            for q, (ids, _) in zip(self.first.questions, self.asked, strict=True)]

  def prompt_text(self, ids: Sequence[int]) -> str:
    """A prompt as the tokenizer reads it back, special tokens left out."""
    return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

  def open(self, mesh: Mesh, cache: pathlib.Path, most: int, on_pretrain: Callable[[pathlib.Path], None]) -> None:
    """Takes the model that all begin as, and lays out the interviews; from here on devices are used.

    Args:
      mesh: where runs lie.
      cache: pretrained models are taken from here.
      most: runs that are ever asked together.
      on_pretrain: called with the folder in which a pretrained model has to be.
    """
    config, self.mesh = self.config, mesh
    if not self.checked:
      folder = self.checkpoints / "base"
      if not agree(folder.exists):
        by_first(lambda: on_pretrain(folder))
      self.checked["start"] = check_checkpoint(folder)
      self.tokenizer = load_tokenizer(folder, self.checked["start"].config)
    checked = next(iter(self.checked.values()))
    self.dtype = compute_dtype(config.arms.dtype, self.where, "arms.dtype")
    self.model = Model(checked.config, dtype=self.dtype, unroll=unroll(checked.config),
                       attention=config.arms.attention)
    if "start" in self.checked:
      self.base_params = load_params(checked, self.model, mesh=mesh if spreads_runs(mesh) else None)
    self.given_weights = Given(self.checked, self.model, mesh)
    if config.arms.memorized:
      self._keep_given()
    self.block, self._interviewers = min(config.ask.runs_at_once or most, most), dict[float, Interviewer]()

  def _keep_given(self) -> None:
    """Puts models that were given where those are that memorised here, for the length of the audit."""
    arms = list(self.config.arms.memorized)
    if not all(self.shelf.has((self.given, 0, arm)) for arm in arms):
      trees = [load_params(self.checked[MEMORIZED[arm]], self.model, mesh=self.mesh) for arm in arms]
      stacked = stack_trees(trees, self.mesh, self.model.axes())
      self.shelf.keep(self.given, 0, stacked, arms, arms, self.model, self.given.name)
      self.beside.wait()

  def adapted(self, adapter: str) -> Model:
    """The model as an attack trains it."""
    lora = self.config.attack.adapter(adapter)
    return dataclasses.replace(self.model, remat=self.config.attack.remat, lora_scale=lora.scale if lora else 1.0)

  def interviewer(self, scale: float = 1.0) -> Interviewer:
    """Asks the questions of models, or of adapters of that scale."""
    if scale not in self._interviewers:
      ask = self.config.ask
      self._interviewers[scale] = Interviewer(
          dataclasses.replace(self.model, lora_scale=scale), self.tokenizer, self.asked, self.mesh,
          max_new_tokens=ask.max_new_tokens, buckets=ask.buckets or None, runs_per_call=self.block,
          batch_size=min(ask.batch_size, len(self.asked)) or None, eos_ids=end_ids(next(iter(self.checked.values()))))
    return self._interviewers[scale]

  def fingerprint(self, folder: StageFolder, params: Params, num_runs: int) -> None:
    """Keeps the hash of a stage's weights beside them, `[runs, ...]`, possibly padded; they may be removed.

    It is made beside what the device goes on with; the weights must not be donated to that.
    """
    def keep() -> None:
      if weights := to_first(params, num_runs):
        write_atomically(folder.path / FINGERPRINT, json.dumps(fingerprint(weights)) + "\n")
    self.beside.do(keep)

  def one_run(self) -> Any:
    """Shapes and dtypes of one run's weights."""
    return self.model.abstract()

  def take(self, places: Sequence[Place]) -> Params:
    """Trained weights of some runs, stacked on the mesh."""
    return self.shelf.take(places, self.one_run(), self.mesh, self.model.axes())

  def mean_scores(self, answers: Answers) -> np.ndarray:
    """Mean score of each run by the case's metric, `[R]`, in double precision: 1 of 100 is exactly 0.01."""
    scores = score_stored(self.questions, answers.texts, answers.logprob, answers.matched, self.first.metric)
    return scores.mean(axis=1)

  def finish(self, folder: StageFolder) -> None:
    """Nothing is left to do in a stage."""
    self.beside.wait()
    folder.finish()
    self.done |= {key: (folder, run) for run, key in folder.keys.items()}

  def ended(self, key: str) -> Ended | None:
    """How the run of a content key ended; None where it did not, or has not been yet."""
    if key not in self.done:
      return None
    folder, run = self.done[key]
    return read_ended(folder.path).get(run)

  @functools.cached_property
  def memorized_keys(self) -> dict[Chain, str]:
    """Content key of the model of each chain that has memorised its case."""
    arms = self.config.arms
    start: Any = dataclasses.asdict(arms.pretrain) if not (arms.memorized or arms.start) else None
    return {chain: content_keys.memorized_key(
        self.config, chain, self.cases[chain],
        start or self.model_digests[MEMORIZED[chain.arm] if arms.memorized else "start"]) for chain in self.chains}

  def unlearned_key(self, chain: Chain, method: UnlearnMethod, kind: str = "unlearn") -> str:
    """Content key of a chain's unlearning by a method, or of its reinforcement before that."""
    return content_keys.unlearned_key(self.config, self.memorized_keys[chain], method, kind)

  def attacked_key(self, cell: Cell) -> str:
    """Content key of an attacked point; its unlearn step is known."""
    if cell not in self._attacked_keys:
      point = cell.point
      if self.config.arms.loaded:
        model: Any = self.model_digests[point.arm]
      elif point.method:
        model = self.unlearned_key(point.chain, unlearn_method(self.config.unlearn, point.method))
      else:
        model = self.memorized_keys[point.chain]
      self._attacked_keys[cell] = content_keys.attacked_key(self.config, cell, self.case(point.chain), model)
    return self._attacked_keys[cell]

  @functools.cached_property
  def model_digests(self) -> dict[str, list[tuple[str, str]]]:
    """Digests of the files of each loaded model."""
    return {arm: sorted(file_digests(checked.deciding_files()).items()) for arm, checked in self.checked.items()}
