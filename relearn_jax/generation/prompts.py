"""Checks of what generation and scoring are told, the prefix of all prompts, and the tokens that end an answer."""

import pathlib

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked
from relearn_jax.models.folders import GENERATION
from relearn_jax.models.safetensor_files import read_json


def check_batch_size(batch_size: int) -> None:
  """`InputError` unless a batch has a row."""
  if batch_size < 1:
    raise InputError(f"is {batch_size}", field="--batch_size", mend="expected at least 1")


def check_output(data: pathlib.Path, output: pathlib.Path) -> None:
  """`InputError` if the output would replace the file that is read."""
  if output.exists() and data.exists() and output.samefile(data):
    raise InputError("is the file that is read", file=output, field="--output", mend="give another file")


def read_prefix_text(path: pathlib.Path) -> str:
  """The text that is put before every prompt, as it stands in a file, a last newline included.

  Raises:
    InputError: it cannot be read, or is empty.
  """
  try:
    text = path.read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"cannot be read ({error})", file=path, field="--prefix", mend="give a text file") from None
  if not text:
    raise InputError("is empty", file=path, field="--prefix", mend="write text into it, or leave the flag out")
  return text


def end_ids(checked: Checked) -> tuple[int, ...]:
  """Ids that end a completion: the generation config's, as in transformers, else config.json's.

  Instruction-tuned checkpoints often state the end of a turn in generation_config.json only.

  Raises:
    InputError: generation_config.json is no JSON object, or states something else than ids.
  """
  file = checked.folders[-1] / GENERATION
  if not file.exists():
    return checked.config.eos_ids
  value = read_json(file, "copy the checkpoint's generation config again").get("eos_token_id")
  if value is None:
    return checked.config.eos_ids
  ids = value if isinstance(value, list) else [value]
  if not all(type(i) is int for i in ids):
    raise InputError(f"is {value!r}", file=file, field="eos_token_id",
                     mend="expected a token id, a list of token ids or null")
  return tuple(ids)
