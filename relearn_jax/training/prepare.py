"""`relearn prepare`: a source of texts as shards of tokens; and whether such rows fit a checkpoint."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from relearn_jax.cases.files import iter_texts
from relearn_jax.cases.sources import check_columns_setting, open_source, parse_source
from relearn_jax.data.chat import Chat, ChatSettings, open_chat
from relearn_jax.data.prepared import METADATA, About, PreparedRows, write_metadata, write_shards
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import encode_row
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import TOKENIZER_FILES, companions
from relearn_jax.parallel.processes import by_first, folder_atomically
from relearn_jax.progress import progress
from relearn_jax.workdir import file_digests

AGAIN = "prepare the source again with this checkpoint"
TEMPLATE = "chat_template.jinja"  # among the tokenizer's files, and none of what decides tokens


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
  """What is prepared.

  Attributes:
    model: checkpoint whose tokenizer makes the tokens, and whose positions a row has to fit into.
    source: of texts; see `cases.sources`.
    columns: our field -> the source's; see `cases.sources.read_source`.
    rows_per_shard: rows of a file.
    chat: prompts are rendered by the checkpoint's chat template, told this; None: as they are.
  """

  model: str
  source: str
  columns: Mapping[str, str]
  rows_per_shard: int
  chat: ChatSettings | None = None


def parse_columns(text: str, field: str) -> dict[str, str]:
  """Our field -> a source's column, from a JSON object; `InputError` where it is none."""
  try:
    return check_columns_setting(json.loads(text), None, field)
  except ValueError:  # an InputError is one
    raise InputError(f"is {text!r}", field=field,
                     mend='expected a JSON object of our fields and their columns, such as {"prompt": "question"}'
                     ) from None


def prepare(settings: PrepareSettings, output: pathlib.Path) -> str:
  """Writes shards and metadata.json into a new folder, which appears complete or not at all; returns what it holds.

  Rows are read, made into tokens and written one after the other.

  Raises:
    InputError: the output is there or cannot be written; the checkpoint, or, naming file, line and field, a row is
      wrong.
  """
  if settings.rows_per_shard < 1:
    raise InputError(f"is {settings.rows_per_shard}", field="--rows_per_shard", mend="expected at least 1")
  if output.exists():
    raise InputError("exists", file=output, field="--output", mend="give a folder that does not")
  columns, source = settings.columns, parse_source(settings.source)
  checked, tokenizer = open_checkpoint(settings.model)
  chat = None
  if settings.chat:
    chat = open_chat(settings.chat, tokenizer, checked.path, "--chat_template", "--chat_")
  prompts = 0
  with open_source(source) as reading, progress(None, "prepare", "row") as bar:
    def encoded() -> Iterator[Encoded]:
      nonlocal prompts
      for row in iter_texts(reading, source, columns):
        prompts += "prompt" in row
        yield encode_row(tokenizer, row, source.path, checked.config.max_positions, chat=chat)
        bar.update(1)
    try:
      with folder_atomically(output) as folder:
        counts = write_shards(folder, encoded(), settings.rows_per_shard)
        made_from = {"name": settings.source, "columns": columns, "revision": reading.revision,
                     "digest": reading.digest()}
        write_metadata(folder, About(counts, tokenizer_digests(checked.folders), prompts, chat_digest(chat), made_from))
    except OSError as error:
      raise InputError(f"cannot be written ({error.strerror})", file=output, field="--output",
                       mend="give a folder in one that you may write to, on a disk with room") from None
  return (f"{counts.rows} rows, {counts.tokens} tokens, the longest row {counts.longest}, in {len(counts.shards)} "
          f"shard{'s' * (len(counts.shards) > 1)}: {output}")


def tokenizer_digests(folders: Sequence[pathlib.Path]) -> dict[str, str]:
  """File of the tokenizer -> its SHA-256, of those that decide what tokens a text has; for folders see `Checked`."""
  files = companions(folders)
  return file_digests({name: files[name] for name in TOKENIZER_FILES if name in files and name != TEMPLATE})


def chat_digest(chat: Chat | None) -> str:
  """SHA-256 of a chat template and of what it is told; "" where there is none."""
  if chat is None:
    return ""
  return hashlib.sha256(json.dumps(dataclasses.asdict(chat), sort_keys=True).encode()).hexdigest()


def check_prepared(rows: PreparedRows, checked: Checked, chat: Chat | None) -> None:
  """Refuses rows that a checkpoint would not have been given as these tokens, or that are not whole.

  Raises:
    InputError: see `check_tokens` and `check_counts`; or a shard is missing, was cut, or (on a disk) is another.
  """
  check_tokens(rows, checked.folders, chat)
  check_counts(rows, checked.config)
  if rows.store.is_remote:
    by_first(rows.check_shards)  # one look for all processes
  else:
    rows.check_shards()
    by_first(rows.check_contents)  # the disk is one for all hosts


def check_tokens(rows: PreparedRows, folders: Sequence[pathlib.Path], chat: Chat | None) -> None:
  """Looks, in metadata.json alone, whether a checkpoint's tokenizer would make these tokens.

  Raises:
    InputError: another tokenizer or chat template made them.
  """
  about = rows.about
  fail = lambda field, problem, mend: InputError(problem, file=rows.store.path(METADATA), field=field, mend=mend)
  here = tokenizer_digests(folders)
  if other := sorted(name for name in here.keys() | about.tokenizer.keys()
                     if here.get(name) != about.tokenizer.get(name)):
    raise fail("tokenizer", f"is not the checkpoint's: {', '.join(other)} differ{'s' * (len(other) == 1)}", AGAIN)
  if about.prompts and about.chat != chat_digest(chat):
    if not (about.chat and chat):
      raise fail("chat", f"says that prompts were rendered {'by a' if about.chat else 'without a'} chat template",
                 f"set chat_template={bool(about.chat)}, or prepare the source again")
    raise fail("chat", "is another chat template, or one that was told something else",
               "set `chat` as it was told, or prepare the source again")


def check_counts(rows: PreparedRows, config: ModelConfig) -> None:
  """Looks, in metadata.json alone, whether a model takes these tokens.

  Raises:
    InputError: a row is longer than its positions, or a token is beyond its embedding.
  """
  counts, file = rows.about.counts, rows.store.path(METADATA)
  if counts.longest > config.max_positions:
    raise InputError(f"is {counts.longest}, more than the model's {config.max_positions} positions", file=file,
                     field="counts.longest", mend=f"split the row, and {AGAIN}")
  if counts.largest_id >= config.vocab_size:
    raise InputError(f"is {counts.largest_id}, and the embedding has {config.vocab_size} rows", file=file,
                     field="counts.largest_id", mend=AGAIN)
