"""What `relearn unlearn` is told: one typed value, from configs/unlearn.py and `--config.field=value`."""

import dataclasses
import math
from typing import Any

from relearn_jax.cases.sources import check_columns_setting
from relearn_jax.data.chat import ChatSettings, check_chat
from relearn_jax.errors import InputError, checker
from relearn_jax.models.attention import check_attention
from relearn_jax.models.precision import DTYPES, check_dtype
from relearn_jax.objectives.methods import get_method
from relearn_jax.objectives.recipe import DefenceSettings, MethodSettings, Recipe, make_recipe
from relearn_jax.training.train_settings import ScheduleSettings, TrainSettings, check_schedule, check_train


@dataclasses.dataclass
class UnlearnJob(TrainSettings, ScheduleSettings):
  """One model that unlearns one forget set by one method.

  Attributes:
    model: Hugging Face folder or hub id.
    method: a key of `objectives.methods.METHODS`; "help" lists them.
    defence: a key of `objectives.methods.DEFENCES`, put around the method; "none".
    forget, retain: sources (see `cases.sources`: files, the Hugging Face hub, TensorFlow Datasets) of rows
      `{"prompt", "answer"}` (loss on the answer and the EOS after it) or `{"text"}` (loss on every token; on an EOS
      after it only beside `"complete": true`).
    refusals: rows `{"answer"}`, of which each forget prompt gets one where a method teaches refusals; ours by
      default.
    alternates: rows as `forget`, row by row with another answer, for a method that teaches those.
    anchors: rows `{"term", "generic"}`, for a method that relabels terms.
    columns: our field -> the column of forget, retain or alternates; see `cases.files.FilesConfig`.
    references: folder in which statistics of the model before unlearning are kept, to be shared by jobs on the same
      model and rows; in the workdir by default.
    steps: optimizer steps.
    learning_rate: of AdamW, at its peak.
    methods, defences: hyper-parameters of each; those of the method and the defence in use are read.
    pack: short rows share a sequence as long as the longest, in data sets of which the method takes means over tokens
      alone; none of them may be prepared. A step has as many sequences as hold about `batch_size` rows, and so other
      rows than without; with a batch as large as the data set it is the same step.
    keep_every: steps between checkpoints of the trajectory, which has one at the end too; 0: none.
    seed: decides the order of rows, and the adapter's first weights.
    chat_template: prompts are rendered by the checkpoint's chat template, as the user's turn.
    chat: which template, and what it is told.
    dtype: precision of products: auto (bfloat16 on accelerators), float32 or bfloat16. What is trained
      is float32 whatever this says.
    attention: auto (a fused kernel where the device has one for precision and shape, see `models.attention`), or
      einsum everywhere, whose results do not depend on a kernel.
    save_dtype: of the weights that are written at the end; bfloat16 may round away what was unlearned.
    checkpoint_seconds: seconds of work that a killed job loses at most, about.
  """

  model: str = ""
  method: str = "npo"
  defence: str = "none"
  forget: str = ""
  retain: str = ""
  refusals: str = ""
  alternates: str = ""
  anchors: str = ""
  columns: object = dataclasses.field(default_factory=dict)  # dict[str, str], which flags could not set
  references: str = ""
  steps: int = 100
  learning_rate: float = 1e-5
  methods: Any = dataclasses.field(default_factory=MethodSettings)
  defences: Any = dataclasses.field(default_factory=DefenceSettings)
  pack: bool = False
  keep_every: int = 0
  seed: int = 0
  chat_template: bool = False
  chat: ChatSettings = dataclasses.field(default_factory=ChatSettings)
  dtype: str = "auto"
  attention: str = "auto"
  save_dtype: str = "float32"
  checkpoint_seconds: float = 300.0

  @property
  def recipe(self) -> Recipe:
    """The method with its hyper-parameters and its defence; `InputError` for unknown names and invalid values."""
    get_method(self.method)
    return make_recipe(self.method, getattr(self.methods, self.method), self.defence,
                       getattr(self.defences, self.defence, None))


# Data set that an objective reads -> field of the job that it is made from, besides `forget`.
SOURCES = {"retain": "retain", "alternate": "alternates", "relabelled": "anchors"}
# Fields that name files and folders.
PATHS = ("model", "forget", "retain", "refusals", "alternates", "anchors", "references")


def check_job(job: UnlearnJob, where: str) -> None:
  """Refuses settings that cannot work, before a file is read.

  Raises:
    InputError: naming the file, the field and what was expected.
  """
  need = checker(where)
  try:
    objective = job.recipe.objective
  except InputError as error:
    raise InputError(error.problem, file=where, field=error.field, mend=error.mend) from None
  check_train(job, where)
  check_columns_setting(job.columns, where)
  check_chat(job.chat, job.chat_template, where)
  need(bool(job.model), "model", job.model, "give a Hugging Face folder or a hub id")
  need(bool(job.forget), "forget", job.forget, "give a file of JSON lines, or another source")
  for rows, field in SOURCES.items():
    if rows in objective.rows:
      need(bool(getattr(job, field)), field, getattr(job, field),
           f"method {job.method!r} needs it: a file of JSON lines, or another source")
  need(not job.pack or bool(objective.packs), "pack", job.pack,
       f"expected False: method {job.method!r} looks at rows one by one")
  need(objective.divisible or job.num_microbatches == 1, "num_microbatches", job.num_microbatches,
       f"expected 1: defence {job.defence!r} takes a step's gradient as a whole")
  need(0 < job.learning_rate < math.inf, "learning_rate", job.learning_rate, "expected a positive number")
  need(job.steps >= 1, "steps", job.steps, "expected at least 1")
  check_schedule(job, job.steps, "steps", where)
  need(job.keep_every >= 0, "keep_every", job.keep_every, "expected 0 (none) or a number of steps")
  need(0 <= job.seed < 2**32, "seed", job.seed, "expected 0 to 4294967295")
  check_dtype(job.dtype, where)
  check_attention(job.attention, where)
  need(job.save_dtype in DTYPES, "save_dtype", job.save_dtype, f"expected {' or '.join(DTYPES)}")
  need(job.checkpoint_seconds >= 0, "checkpoint_seconds", job.checkpoint_seconds, "expected seconds, at least 0")
