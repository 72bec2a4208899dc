"""A checkpoint by its name, and the tokenizer that comes with it."""

import importlib.util
import pathlib
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked, check_checkpoint
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.folders import VOCABULARIES, chain, resolve, tokenizer_folder


class Bounded:
  """A tokenizer with tokens that the embedding has no row for: as it is, until a text contains one of them."""

  def __init__(self, tokenizer: Any, rows: int):
    self._tokenizer, self._rows = tokenizer, rows

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)

  def __len__(self) -> int:
    return len(self._tokenizer)

  def __call__(self, *args: Any, **options: Any) -> Any:
    """As the tokenizer's own, of one text.

    Raises:
      InputError: naming a token that is beyond the embedding.
    """
    found = self._tokenizer(*args, **options)
    if beyond := [i for i in found["input_ids"] if i >= self._rows]:
      token = self._tokenizer.convert_ids_to_tokens(beyond[0])
      raise InputError(f"has token {token!r} with id {beyond[0]}, and the embedding has {self._rows} rows",
                       mend="leave it out, or give the tokenizer that belongs to this checkpoint")
    return found


def load_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Any:
  """The checkpoint's own tokenizer; of an adapter's folder without one, that of its base.

  It may know tokens that the embedding has no row for, such as one for padding; a text that contains one is refused.

  Raises:
    InputError: there is none, it is damaged or empty, a package that reads it is missing, or it ends texts by a token
      that the embedding has no row for.
  """
  from transformers import AutoTokenizer
  folder = tokenizer_folder(chain(folder))
  found = [folder / name for name in VOCABULARIES if (folder / name).exists()]
  if not found:
    raise InputError("does not exist", file=folder / "tokenizer.json",
                     mend="copy the checkpoint's tokenizer files here")
  package = _package(found[0])
  if package and importlib.util.find_spec(package) is None:
    raise InputError(f"is all there is of the tokenizer, and the package that reads it, {package}, is not installed",
                     file=found[0], mend=f"pip install {package}, or save tokenizer.json where it is installed")
  try:
    if package == "sentencepiece":  # transformers reads a file that was cut, too, and then leaves out text
      importlib.import_module(package).SentencePieceProcessor(model_file=str(found[0]))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the library raises many kinds for a damaged file
    raise InputError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})", file=found[0],
                     mend="copy the checkpoint's tokenizer files again") from None
  ids = tokenizer.get_vocab()
  if not ids:
    raise InputError("has no tokens", file=found[0], mend="copy the checkpoint's tokenizer files again")
  eos, rows = tokenizer.eos_token_id, config.vocab_size
  if eos is not None and eos >= rows:
    raise InputError(f"is {tokenizer.eos_token!r} with id {eos}, and the embedding has {rows} rows", file=found[0],
                     field="eos_token", mend="give the tokenizer that belongs to this checkpoint")
  return Bounded(tokenizer, rows) if max(ids.values()) >= rows else tokenizer


def _package(vocabulary: pathlib.Path) -> str:
  """The package that a vocabulary needs besides transformers; empty for none."""
  if vocabulary.name != "tokenizer.model":
    return ""
  with vocabulary.open("rb") as file:
    first = file.read(1)  # tiktoken's begins with base64, SentencePiece's with a line feed, the tag of a piece
  return "tiktoken" if first.isalnum() or first in (b"+", b"/") else "sentencepiece"


def open_checkpoint(name: str, field: str = "--model") -> tuple[Checked, Any]:
  """A checkpoint and its tokenizer, checked without a device.

  Args:
    name: folder or hub id.
    field: what messages call it.

  Raises:
    InputError: it is not found, or something is wrong with it.
  """
  checked = check_checkpoint(resolve(name, field))
  return checked, load_tokenizer(checked.path, checked.config)
