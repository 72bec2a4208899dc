"""What an audit is told: one typed value, from a file in configs/ and `--config.some.field=value`.

Its axes are tuples (variants of the case, seeds, methods, relearn sets, adapters, learning rates), and the grid is
their product.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from relearn_jax.audit.api_settings import API, WEIGHTS, ApiSettings
from relearn_jax.audit.thresholds import VerdictSettings
from relearn_jax.cases.base import Arm, CaseConfig
from relearn_jax.data.chat import ChatSettings
from relearn_jax.errors import InputError
from relearn_jax.models.lora import ALL, LoraConfig
from relearn_jax.objectives.methods import METHODS, NO_DEFENCE, get_defence, get_method
from relearn_jax.objectives.recipe import DefenceSettings, Recipe, make_recipe
from relearn_jax.objectives.settings import config_class, group_class
from relearn_jax.training.train_settings import ScheduleSettings, StepSettings

# Learning rate, weight decay and published hyper-parameters of every method.
AuditMethods = group_class("AuditMethods", {
    name: config_class(name, method.settings, ("learning_rate", float, 1e-5), ("weight_decay", float, 0.0))
    for name, method in METHODS.items()})
PRETRAINING = "pretraining"  # as generic text
FULL, LORA = "full", re.compile(r"lora([1-9]\d*)?")


@dataclasses.dataclass
class PretrainSettings:
  """The small Llama that a case is built on, trained once and cached by content.

  Attributes:
    steps, batch_size, learning_rate, warmup_steps: AdamW with warmup and cosine decay to zero.
  """

  hidden_size: int = 128
  intermediate_size: int = 256
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  max_positions: int = 128
  steps: int = 600
  batch_size: int = 32
  learning_rate: float = 1e-3
  warmup_steps: int = 30
  seed: int = 0


@dataclasses.dataclass
class ArmsSettings:
  """How the unlearned model U, the original O and the control N are had.

  Where `unlearned` is given, the models are loaded: nothing is memorised or unlearned, and N was not unlearned either.
  Where `original` and `control` are given without it, U is made here: both have memorised what they were to, and
  unlearn.
  Otherwise all three begin as one model, `start` or a small one that is pretrained here: O memorises the case, U
  unlearns it after that, and N goes through the same on the case without the secret.

  Attributes:
    unlearned: Hugging Face folder or hub id of the model in question.
    original: the model before unlearning; without it nothing shows that it ever knew.
    control: a model that was never trained on what is to be forgotten; without it there is no verdict, since what the
      attack itself teaches cannot be told from what it brings back.
    start: checkpoint from which models are trained here; "": one is pretrained.
    pretrain: that one.
    method: how `unlearned` was unlearned, as it stands in the results; free text.
    dtype: precision of products: auto (bfloat16 on accelerators), float32 or bfloat16.
    attention: auto (a fused kernel where the device has one for precision and shape, see `models.attention`), or
      einsum everywhere, whose results do not depend on a kernel.
  """

  unlearned: str = ""
  original: str = ""
  control: str = ""
  start: str = ""
  pretrain: PretrainSettings = dataclasses.field(default_factory=PretrainSettings)
  method: str = "unknown"
  dtype: str = "auto"
  attention: str = "auto"

  @property
  def arithmetic(self) -> str:
    """Precision, and the form of attention where one is asked for: part of what results are found by."""
    return self.dtype if self.attention == "auto" else f"{self.dtype}, attention by {self.attention}"

  @property
  def loaded(self) -> dict[str, str]:
    """Arm -> checkpoint, of those that were given to be attacked as they are."""
    given = {"U": self.unlearned, "N": self.control, "O": self.original}
    return {} if self.memorized else {arm: name for arm, name in given.items() if name}

  @property
  def memorized(self) -> dict[Arm, str]:
    """Arm of a chain -> checkpoint that it unlearns from, where these were given: U's is the original."""
    given = self.original and self.control and not self.unlearned
    return {"U": self.original, "N": self.control} if given else {}


@dataclasses.dataclass
class MemorizeSettings(StepSettings, ScheduleSettings):
  """How the case is learned before unlearning: AdamW.

  Attributes:
    runs_at_once: models that are trained side by side; more need more memory. 0: all.
  """

  batch_size: int = 0
  weight_decay: float = 0.0
  steps: int = 200
  learning_rate: float = 5e-4
  runs_at_once: int = 0


@dataclasses.dataclass
class UnlearnSettings(StepSettings, ScheduleSettings):
  """The unlearning trajectories, one for each method.

  Attributes:
    methods: names of methods, "npo_gd+sam" with a defence.
    settings: of each method; those in use are read.
    defences: of each defence, likewise.
    chosen: name of a method, or "method+defence" -> settings that were chosen for it. Those of a pair stand in place of
      the method's and the defence's own, where nobody has set others.
    max_steps: no run goes further, unlearned or not.
    keep_every: steps between those at which the models are asked, of which step 0 is the first.
    max_score: a run counts as unlearned from its first such step (after 0) with a mean score of at most this; that
      is its depth 0.
    depths: number of points that are attacked, each one such step deeper than the one before.
    runs_at_once: models that are trained side by side; more need more memory. 0: all.
  """

  batch_size: int = 0
  methods: tuple[str, ...] = ("ga",)
  settings: Any = dataclasses.field(default_factory=AuditMethods)
  defences: Any = dataclasses.field(default_factory=DefenceSettings)
  chosen: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  max_steps: int = 200
  keep_every: int = 5
  max_score: float = 0.01
  depths: int = 3
  runs_at_once: int = 0


@dataclasses.dataclass
class LoraSettings:
  """Of adapters; see `models.lora.LoraConfig`.

  Attributes:
    rank: of those that are called "lora"; "lora4" says its own.
    learning_rates: with which adapters are trained; (): those of the attack. Adapters usually want higher ones.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = (ALL,)
  learning_rates: tuple[float, ...] = ()


@dataclasses.dataclass
class SearchSettings:
  """Attacks that are drawn, beside those of the grid; the strongest is chosen on one half of seeds and clusters.

  Attributes:
    trials: number of attacks; 0: none. Each has a learning rate, an adapter and a batch size of its own, and is made
      on U, N and O alike.
    lowest_rate, highest_rate: learning rates are drawn between them, evenly on a log scale.
    adapters: what is drawn from: "full", or "lora" with a rank, such as "lora4".
    batch_sizes: likewise; 0: all rows.
    min_retain_ratio: of the trials that may be chosen: token probability on retained text after the attack, relative to
      before it. An attack that costs more is no use to an attacker.
    seed: decides what is drawn.
  """

  trials: int = 0
  lowest_rate: float = 1e-5
  highest_rate: float = 1e-2
  adapters: tuple[str, ...] = ("full",)
  batch_sizes: tuple[int, ...] = (0,)
  min_retain_ratio: float = 0.5
  seed: int = 0


@dataclasses.dataclass
class AttackSettings(StepSettings):
  """The relearning attack, the same for every model: AdamW on a relearn set.

  Attributes:
    relearn_sets: names of the case's relearn sets; (): all of them.
    controls: kinds of control sets, "gibberish", "unrelated", "same_syntax" and "same_topic", see
      `cases.control_sets`; each is made from the first of the relearn sets, and attacked with as they are.
    learning_rates: each is an attack of its own, on the same models. One alone finds what it finds; ERASED wants
      rates a factor of ten apart, up to one that begins to destroy the original.
    adapters: what is trained: "full" (all parameters), "lora" (a low-rank adapter), or "lora4" (one of rank 4).
    lora: of those adapters.
    access: what the attacker has: "weights" (all that is said here), "api" (what a provider's interface permits), or
      both, side by side.
    api: of that interface.
    keep_steps: steps after which the models are asked, as they are before the first.
    runs_at_once: models that are trained side by side; more need more memory. 0: as many as a plan says that fit.
    search: attacks that are drawn at random.
  """

  batch_size: int = 16
  weight_decay: float = 0.0
  relearn_sets: tuple[str, ...] = ()
  controls: tuple[str, ...] = ()
  learning_rates: tuple[float, ...] = (1e-5,)
  adapters: tuple[str, ...] = (FULL,)
  lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
  access: tuple[str, ...] = (WEIGHTS,)
  api: ApiSettings = dataclasses.field(default_factory=ApiSettings)
  keep_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
  runs_at_once: int = 0
  search: SearchSettings = dataclasses.field(default_factory=SearchSettings)

  def used_adapters(self) -> tuple[str, ...]:
    """The adapters of the grid: those that are trained on weights, and the provider's."""
    return (*(self.adapters if WEIGHTS in self.access else ()), *([API] if API in self.access else []))

  def rates(self, adapter: str) -> tuple[float, ...]:
    """The learning rates with which an adapter, or everything, is trained."""
    if adapter == API:
      return self.api.learning_rates or self.learning_rates
    return self.learning_rates if adapter == FULL else self.lora.learning_rates or self.learning_rates

  def adapter(self, name: str, field: str = "attack.adapters") -> LoraConfig | None:
    """The adapter of that name; None where all parameters are trained.

    Raises:
      InputError: there is none.
    """
    if name == FULL:
      return None
    if name == API:
      return self.api.limits.lora()
    if (found := LORA.fullmatch(name)) is None:
      raise InputError(f"has {name!r}", field=field, mend='expected "full", "lora" or, with a rank, such as "lora4"')
    # The scale alpha / rank stays that of `lora`, so that learning rates of different ranks compare.
    rank = int(found[1]) if found[1] else self.lora.rank
    return LoraConfig(rank, self.lora.alpha * rank / max(self.lora.rank, 1), tuple(self.lora.targets))


@dataclasses.dataclass
class AskSettings:
  """How the questions are asked: greedy decoding.

  Attributes:
    metrics: scores beside the case's own; `relearn report --metrics` adds them to a finished audit too.
    max_new_tokens: tokens generated after each prompt, whatever its length.
    buckets: prompt lengths (in tokens) that are padded to, one executable each; (): multiples of 16, then of 64.
    batch_size: questions asked together, and rows scored together; 0: all that share a bucket.
    score_rows: rows of the forget, of the retain and of the relearn set, and of generic text, that are scored, evenly
      spread over each; 0: all.
    generic: source of generic text (see `cases.sources`), whose perplexity shows what else a model has lost;
      "pretraining": text such as a model that is pretrained here was shown; "": none.
    runs_at_once: models that answer side by side; more need more memory. 0: as many as are trained so.
    stop: a completion is judged up to the first of these strings, such as "Question:" where a model that is no chat
      model runs on into the next question. A question may have `stop` strings of its own besides.
    chat_template: prompts are rendered by the checkpoint's chat template, as the user's turn.
    chat: which template, and what it is told.
  """

  metrics: tuple[str, ...] = ()
  max_new_tokens: int = 64
  buckets: tuple[int, ...] = ()
  batch_size: int = 32
  score_rows: int = 100
  generic: str = ""
  runs_at_once: int = 0
  stop: tuple[str, ...] = ()
  chat_template: bool = False
  chat: ChatSettings = dataclasses.field(default_factory=ChatSettings)


@dataclasses.dataclass
class Audit:
  """One audit.

  Attributes:
    case: what is to be forgotten: a `cases.base.CaseConfig`.
    seeds: where models are trained here, each is a case, a memorising, an unlearning and an attack of its own; where
      they are loaded, an attack, with its order of rows (and adapters).
    allowed_lines: lines of relearn sets in which the leakage check finds parts of keywords that, once read, give
      nothing away. What it is certain of cannot be allowed so.
    keep_weights: keep all checkpoints that are made on the way, not only those of models that are attacked.
    checkpoint_seconds: seconds of work that a killed stage loses at most, about.
  """

  case: Any
  seeds: tuple[int, ...] = (0, 1, 2)
  arms: ArmsSettings = dataclasses.field(default_factory=ArmsSettings)
  memorize: MemorizeSettings = dataclasses.field(default_factory=MemorizeSettings)
  unlearn: UnlearnSettings = dataclasses.field(default_factory=UnlearnSettings)
  attack: AttackSettings = dataclasses.field(default_factory=AttackSettings)
  ask: AskSettings = dataclasses.field(default_factory=AskSettings)
  verdict: VerdictSettings = dataclasses.field(default_factory=VerdictSettings)
  allowed_lines: tuple[int, ...] = ()
  keep_weights: bool = False
  checkpoint_seconds: float = 60.0

  @property
  def case_config(self) -> CaseConfig:
    """The case, typed."""
    config: CaseConfig = self.case
    return config


@dataclasses.dataclass(frozen=True)
class UnlearnMethod:
  """A method of the grid as it is used: its recipe, and the optimizer's settings."""

  name: str
  recipe: Recipe
  learning_rate: float
  weight_decay: float


def unlearn_method(unlearn: UnlearnSettings, name: str) -> UnlearnMethod:
  """The method, or "method+defence", with its settings.

  Raises:
    InputError: there is no such method or defence, or a value lies outside its domain.
  """
  method, _, defence = name.partition("+")
  defence = defence or NO_DEFENCE
  get_method(method, "unlearn.methods")
  found = get_defence(defence, "unlearn.methods")
  settings, around = getattr(unlearn.settings, method), getattr(unlearn.defences, defence, None)
  if found is not None:
    pair, own = unlearn.chosen.get(name, {}), found.settings
    plain = getattr(chosen_settings(unlearn.chosen), method)
    settings = _unless_set(settings, plain, {key: pair[key] for key in pair if key not in own})
    around = _unless_set(around, getattr(DefenceSettings(), defence), {key: pair[key] for key in pair if key in own})
  recipe = make_recipe(method, settings, defence, around, field="unlearn.settings", defence_field="unlearn.defences")
  return UnlearnMethod(name, recipe, settings.learning_rate, settings.weight_decay)


def chosen_settings(chosen: Mapping[str, Mapping[str, float]]) -> Any:
  """`AuditMethods` with what was chosen for each method in place of the published defaults."""
  return dataclasses.replace(AuditMethods(), **{
      name: dataclasses.replace(getattr(AuditMethods(), name), **values) for name, values in chosen.items()
      if name in METHODS})


def _unless_set(settings: Any, plain: Any, chosen: Mapping[str, float]) -> Any:
  """Settings with what was chosen in place of what nobody has set."""
  return dataclasses.replace(settings, **{
      key: value for key, value in chosen.items() if getattr(settings, key) == getattr(plain, key)})


def recorded(config: Audit) -> dict[str, Any]:
  """The configuration as it stands in config.json: what was used, and nothing else.

  What decides nothing of the results (how much is worked on at once, what is kept) is left out, so that it may change.
  """
  values = dataclasses.asdict(config)
  for section, field in ((values, "keep_weights"), (values, "checkpoint_seconds"), (values["attack"], "runs_at_once"),
                         (values["memorize"], "runs_at_once"), (values["unlearn"], "runs_at_once"),
                         (values["ask"], "runs_at_once"), (values["ask"], "metrics")):
    del section[field]
  if config.arms.attention == "auto":
    del values["arms"]["attention"]
  if config.arms.unlearned:
    del values["memorize"], values["unlearn"], values["arms"]["start"], values["arms"]["pretrain"]
  else:
    if config.arms.memorized:
      del values["memorize"]
      used = {"original": config.arms.original, "control": config.arms.control}
    else:
      used = {"start": config.arms.start} if config.arms.start else {"pretrain": values["arms"]["pretrain"]}
    same = {key: values["arms"][key] for key in ("dtype", "attention") if key in values["arms"]}
    values["arms"] = {**same, **used}
    methods = [unlearn_method(config.unlearn, name) for name in config.unlearn.methods]
    del values["unlearn"]["settings"], values["unlearn"]["defences"], values["unlearn"]["chosen"]
    values["unlearn"]["settings"] = {
        one.name: {"learning_rate": one.learning_rate, "weight_decay": one.weight_decay, **one.recipe.hyper}
        for one in methods}
  adapters = config.attack.used_adapters()
  values["attack"]["adapters"] = adapters
  del values["attack"]["access"]
  if API in adapters:
    for field in ("url", "models", "patience", "price"):  # where a provider is, and how long it is waited for
      del values["attack"]["api"][field]
  else:
    del values["attack"]["api"]
  if all(name in (FULL, API) for name in (*adapters, *config.attack.search.adapters)):
    del values["attack"]["lora"]
  if not config.attack.search.trials:
    del values["attack"]["search"]
  return values
