"""Where checkpoints come from: local folders and the hub; and the tokenizer that comes with them."""

import difflib
import pathlib
import re
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import Checked, check_checkpoint
from relearn_jax.models.config import ModelConfig

WANTED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")  # never *.bin: pickles run code
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these


def resolve(name: str | pathlib.Path, field: str = "--model") -> pathlib.Path:
  """A local folder, or a hub id fetched into the hub's own cache (offline: found there); `field` is for messages.

  Raises:
    InputError: it is neither, the repository is gated, or the hub cannot be reached.
  """
  path = pathlib.Path(name).expanduser()
  siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
  near = difflib.get_close_matches(path.name, siblings, 1)
  hint = f" (there is {path.parent / near[0]})" if near else ""
  if path.is_dir():
    return path
  if path.exists():
    raise InputError("is a file", file=path, field=field, mend="give the folder that holds config.json")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
    raise InputError(f"does not exist{hint}, and is no hub id (owner/name)", file=path, field=field,
                     mend="give an existing folder or a hub id")
  import huggingface_hub
  from huggingface_hub import errors
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(WANTED)))
  except errors.GatedRepoError:
    mend = "accept its licence on the hub, then set HF_TOKEN"
    raise InputError("is gated", file=name, field=field, mend=mend) from None
  except errors.RepositoryNotFoundError:
    raise InputError(f"is neither a local folder{hint} nor a repository that the hub shows you", file=name,
                     field=field, mend="check the spelling, or set HF_TOKEN if it is private") from None
  except errors.HFValidationError as error:
    raise InputError(f"does not exist{hint}, and is no hub id ({error})", file=name, field=field,
                     mend="give an existing folder or a hub id") from None
  except Exception as error:  # its own kinds, the disk's and those of the HTTP library below it
    raise InputError(f"is no local folder{hint}, and cannot be fetched from the hub ({type(error).__name__})",
                     file=name, field=field,
                     mend="give a local folder, or download the checkpoint while online") from None


def load_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Any:
  """The checkpoint's own tokenizer.

  Raises:
    InputError: there is none, it is damaged or empty, or it has more tokens (added ones included)
      than the embedding has rows.
  """
  from transformers import AutoTokenizer
  found = [folder / name for name in VOCABULARIES if (folder / name).exists()]
  if not found:
    raise InputError("does not exist", file=folder / "tokenizer.json",
                     mend="copy the checkpoint's tokenizer files here")
  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the library raises many kinds for a damaged file
    raise InputError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})", file=found[0],
                     mend="copy the checkpoint's tokenizer files again") from None
  ids = tokenizer.get_vocab().values()
  if not ids:
    raise InputError("has no tokens", file=found[0], mend="copy the checkpoint's tokenizer files again")
  # Ids may have gaps, and a token added twice counts twice: neither number bounds the other.
  if (needed := max(max(ids) + 1, len(tokenizer))) > config.vocab_size:
    raise InputError(f"is {config.vocab_size}, but the tokenizer needs {needed} ids (its largest is {max(ids)})",
                     file=folder / "config.json", field="vocab_size",
                     mend="give the tokenizer that belongs to this checkpoint")
  return tokenizer


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
