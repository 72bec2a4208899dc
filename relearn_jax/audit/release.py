"""What an audit of someone's own checkpoints is told: one typed value, from configs/checkpoint.py."""

import dataclasses

from relearn_jax.audit.config import check_rates, check_verdict
from relearn_jax.audit.thresholds import VerdictSettings
from relearn_jax.data.chat import ChatSettings, check_chat
from relearn_jax.errors import checker
from relearn_jax.models.precision import check_dtype
from relearn_jax.training.settings import TrainSettings, check_train


@dataclasses.dataclass
class AttackSettings(TrainSettings):
  """The relearning attack, the same for every model that is attacked.

  Attributes:
    learning_rates: each is an attack of its own, on the same models. One alone finds what it finds; ERASED wants
      rates a factor of ten apart, up to one that begins to destroy the original.
    keep_steps: steps after which the models are asked, as they are before the first.
    runs_at_once: models that are trained side by side; more need more memory. 0: all of them.
  """

  learning_rates: tuple[float, ...] = (1e-5,)
  keep_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
  runs_at_once: int = 0


@dataclasses.dataclass
class InterviewSettings:
  """How the questions are asked: greedy decoding.

  Attributes:
    max_new_tokens: tokens generated after each prompt, whatever its length.
    batch_size: questions asked together, and rows scored together.
    score_rows: rows of the forget, of the retain and of the relearn set that are scored, evenly spread over each file;
      0: all.
    runs_at_once: models that answer side by side; more need more memory. 0: as many as are trained so.
    stop: a completion is judged up to the first of these strings, such as "Question:" where a model that is no chat
      model runs on into the next question. A row of the questions may have a list `stop` of its own besides.
  """

  max_new_tokens: int = 64
  batch_size: int = 32
  score_rows: int = 100
  runs_at_once: int = 0
  stop: tuple[str, ...] = ()


@dataclasses.dataclass
class ReleaseAudit:
  """An audit of a model that somebody has unlearned.

  Attributes:
    name: the case, as it stands in every row of the results.
    method: how the model was unlearned, as it stands there; free text.
    unlearned: U, the model in question: Hugging Face folder or hub id.
    original: O, the model before unlearning; without it nothing shows that it ever knew.
    control: N, a model that was never trained on what is to be forgotten; without it there is no
      verdict, since what the attack itself teaches cannot be told from what it brings back.
    forget: JSON lines of what is to be forgotten; scored, never trained on.
    retain: JSON lines of what should be kept; scored for utility.
    relearn: JSON lines that the attacker finetunes on: `{"prompt", "answer"}`, or `{"text"}`, which ends in an EOS
      only beside `"complete": true`.
    questions: JSON lines `{"id", "prompt", "answer", "keywords"}`, with a `cluster` where questions depend
      on each other; a hit is a keyword in the completion, in upper or lower case unless the row says `"case": true`.
    allowed_lines: lines of the relearn file in which the leakage check finds parts of keywords that, once read, give
      nothing away. What it is certain of cannot be allowed so.
    seeds: attacks with orders of rows (and adapters) of their own.
    chat_template: prompts are rendered by the checkpoint's chat template, as the user's turn.
    chat: which template, and what it is told.
    dtype: precision of products: auto (bfloat16 on accelerators), float32 or bfloat16.
    checkpoint_seconds: an audit that is killed loses at most about so much work.
  """

  name: str = "checkpoint"
  method: str = "unknown"
  unlearned: str = ""
  original: str = ""
  control: str = ""
  forget: str = ""
  retain: str = ""
  relearn: str = ""
  questions: str = ""
  allowed_lines: tuple[int, ...] = ()
  seeds: tuple[int, ...] = (0, 1, 2)
  chat_template: bool = False
  chat: ChatSettings = dataclasses.field(default_factory=ChatSettings)
  dtype: str = "auto"
  attack: AttackSettings = dataclasses.field(default_factory=AttackSettings)
  interview: InterviewSettings = dataclasses.field(default_factory=InterviewSettings)
  verdict: VerdictSettings = dataclasses.field(default_factory=VerdictSettings)
  checkpoint_seconds: float = 300.0

  @property
  def arms(self) -> dict[str, str]:
    """Arm -> checkpoint, of those that were given."""
    return {arm: name for arm, name in (("U", self.unlearned), ("N", self.control), ("O", self.original)) if name}


# Fields that name files and folders.
PATHS = ("unlearned", "original", "control", "forget", "retain", "relearn", "questions")


def check_release(config: ReleaseAudit, where: str) -> None:
  """Refuses settings that cannot work, before a file is read.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where)
  need(bool(config.unlearned), "unlearned", config.unlearned, "give a Hugging Face folder or a hub id")
  for field in ("forget", "retain", "relearn", "questions"):
    need(bool(getattr(config, field)), field, getattr(config, field), "give a file of JSON lines")
  seeds, steps = config.seeds, config.attack.keep_steps
  need(bool(seeds) and len(set(seeds)) == len(seeds) and all(type(s) is int and 0 <= s < 2**31 for s in seeds), "seeds",
       seeds, "expected distinct integers from 0 to 2147483647")
  check_train(config.attack, where, "attack.")
  check_rates(config.attack.learning_rates, need, "attack.learning_rates")
  check_chat(config.chat, config.chat_template, where)
  need(bool(steps) and list(steps) == sorted(set(steps)) and all(type(s) is int and s > 0 for s in steps),
       "attack.keep_steps", steps, "expected ascending steps above 0 (step 0 is always kept)")
  for section in ("attack", "interview"):
    value = getattr(config, section).runs_at_once
    need(value >= 0, f"{section}.runs_at_once", value, "expected 0 (all) or a number of models")
  for field in ("max_new_tokens", "batch_size"):
    value = getattr(config.interview, field)
    need(value >= 1, f"interview.{field}", value, "expected at least 1")
  need(config.interview.score_rows >= 0, "interview.score_rows", config.interview.score_rows,
       "expected 0 (all) or a number of rows")
  stop = config.interview.stop
  need(not isinstance(stop, str) and all(isinstance(string, str) and string for string in stop), "interview.stop", stop,
       'expected strings that are not empty, such as ("Question:",)')
  need(all(type(line) is int and line > 0 for line in config.allowed_lines), "allowed_lines", config.allowed_lines,
       "expected numbers of lines, from 1")
  check_dtype(config.dtype, where)
  need(config.checkpoint_seconds >= 0, "checkpoint_seconds", config.checkpoint_seconds, "expected seconds, at least 0")
  check_verdict(config.verdict, where)
