"""Sizes of data sets: read with the model's own tokenizer, or from what is prepared, or assumed."""

import pathlib
from collections.abc import Sequence

from relearn_jax.cases.base import Question, Text
from relearn_jax.cases.files import read_questions, read_texts
from relearn_jax.cases.sources import check_columns_setting, parse_source
from relearn_jax.data.chat import ChatSettings, open_chat
from relearn_jax.data.packing import best_fit
from relearn_jax.data.prepared import PreparedRows
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import encode_question, encode_rows, encode_texts
from relearn_jax.models.checkpoint_sources import load_tokenizer
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import chain, has_vocabulary, tokenizer_folder
from relearn_jax.plan.audit_plan import Data, Size
from relearn_jax.training.job import UnlearnJob
from relearn_jax.training.prepare import check_counts, check_tokens
from relearn_jax.training.unlearn_rows import job_texts, refusal_rows


class Files:
  """Sizes of data sets of one model.

  Attributes:
    tokenizer: the model's; None where it is not at hand.
    assumed: what was not at hand, a line each; lines are added.
    measured: what was read, likewise.
  """

  def __init__(self, config: ModelConfig, folder: pathlib.Path | None, chat: ChatSettings | None, default: Size,
               assumed: list[str], measured: list[str], columns: object = None):
    """
    Args:
      config: the model.
      folder: its own, where it is at hand.
      chat: how prompts are rendered; None: as they are.
      default: of data sets that are not at hand.
      assumed, measured: lists to add to.
      columns: see `cases.sources.read_source`.
    """
    self.config, self.default, self.assumed, self.measured = config, default, assumed, measured
    self.columns = check_columns_setting(columns or {})
    self._folders = chain(folder) if folder is not None else []
    self.tokenizer = self.chat = None
    if folder is not None and has_vocabulary(tokenizer_folder(self._folders)):
      self.tokenizer = load_tokenizer(folder, config)
      if chat is not None:
        self.chat = open_chat(chat, self.tokenizer, folder, "chat_template")

  def rows(self, field: str, path: str) -> Size:
    """Of a source of texts."""
    return self.data(field, path).size

  def data(self, field: str, path: str, is_packed: bool = False) -> Data:
    """Of a source of texts; `is_packed`: short rows share sequences, where they can be measured."""
    if not path or self.tokenizer is None:
      apart = "; planned without packing" if is_packed else ""
      self.assumed.append(f"{field}: {_say(self.default)}{' (no tokenizer at hand)' if path else ''}{apart}")
      return Data(self.default)
    file = parse_source(path).path
    encoded = encode_rows(self.tokenizer, read_texts(path, self.columns), file, self.config.max_positions,
                          chat=self.chat)
    return self._packed(field, encoded) if is_packed else Data(self._sized(field, encoded))

  def refusals(self, job: UnlearnJob, is_packed: bool = False) -> Data:
    """Of the forget prompts with refusals."""
    if not job.forget or self.tokenizer is None:
      return self.data("idk", job.forget, is_packed)
    file = parse_source(job.forget).path
    encoded = encode_rows(self.tokenizer, refusal_rows(job, job_texts(job, job.forget), file), file,
                          self.config.max_positions, chat=self.chat)
    return self._packed("idk", encoded) if is_packed else Data(self._sized("idk", encoded))

  def prepared(self, field: str, rows: PreparedRows) -> Size:
    """Of rows that are prepared, from their metadata.json alone: nothing else of them need be there.

    Raises:
      InputError: the model would not have been given these tokens; see `training.prepare`.
    """
    if self.tokenizer is None:
      self.assumed.append(f"{field}: prepared with the model's own tokenizer (none at hand)")
    else:
      check_tokens(rows, self._folders, self.chat)
    check_counts(rows, self.config)
    counts = rows.about.counts
    size = Size(counts.rows, counts.longest, counts.most_counted)
    self.measured.append(f"{field}: {_say(size)}")
    return size

  def texts(self, field: str, rows: Sequence[Text], file: pathlib.Path) -> Size:
    """Of texts of a case."""
    return self._sized(field, encode_texts(self.tokenizer, rows, file, self.config.max_positions, chat=self.chat))

  def _sized(self, field: str, encoded: Sequence[Encoded]) -> Size:
    size = _size(encoded)
    self.measured.append(f"{field}: {_say(size)}")
    return size

  def _packed(self, field: str, encoded: Sequence[Encoded]) -> Data:
    """Of rows as `packing.pack_rows` packs them."""
    apart = _size(encoded)
    sequences = best_fit([len(row.ids) for row in encoded], apart.length)
    if len(sequences) == apart.rows:
      return Data(self._sized(field, encoded))
    counted = max(sum(len(encoded[row].ids) - encoded[row].start for row in some) for some in sequences)
    size = apart._replace(rows=len(sequences), counted=counted)
    self.measured.append(f"{field}: {apart.rows} rows in {size.rows} sequences of at most {size.length} tokens, "
                         f"{size.counted} of which count")
    return Data(size, packed=apart.rows)

  def questions(self, path: str, max_new_tokens: int) -> Size:
    """Of a source of questions."""
    if not path or self.tokenizer is None:
      size = Size(self.default.rows, max(self.default.length - self.default.counted, 1), self.default.counted)
      self.assumed.append(f"questions: {size.rows}, prompts of at most {size.length} tokens")
      return size
    return self.asked(read_questions(path, self.columns)[1], parse_source(path).path, max_new_tokens)

  def asked(self, questions: Sequence[Question], file: pathlib.Path, max_new_tokens: int) -> Size:
    """Of questions of a case."""
    encode = lambda question: encode_question(
        self.tokenizer, question, file, self.config.max_positions, max_new_tokens, chat=self.chat)
    ids = [encode(question)[0] for question in questions]
    size = Size(len(ids), max(map(len, ids)), 1)
    self.measured.append(f"questions: {size.rows}, prompts of at most {size.length} tokens")
    return size


def _size(encoded: Sequence[Encoded]) -> Size:
  return Size(len(encoded), max(len(row.ids) for row in encoded), max(len(row.ids) - row.start for row in encoded))


def _say(size: Size) -> str:
  return f"{size.rows} rows of at most {size.length} tokens, {size.counted} of which count"
