"""Folders of checkpoints and adapters, local or of the hub, and the files that lie in them beside the weights."""

import difflib
import pathlib
import re
from collections.abc import Sequence

from relearn_jax.errors import InputError
from relearn_jax.models.safetensor_files import read_json

CONFIG, ADAPTER = "config.json", "adapter_config.json"
GENERATION = "generation_config.json"
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")  # never *.bin: pickles run code
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"  # a folder of them, each called by its name


def resolve(name: str | pathlib.Path, field: str = "--model", revision: str | None = None) -> pathlib.Path:
  """A local folder, or a hub id fetched into the hub's own cache (offline: found there); `field` is for messages.

  Of a repository, `revision` is what is fetched; its newest commit by default.

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
    return pathlib.Path(huggingface_hub.snapshot_download(str(name), revision=revision,
                                                          allow_patterns=list(WANTED)))
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


def chain(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folder itself; and where it holds an adapter alone, its base after it (and that one's, if it is another).

  A base is a local folder, relative to the adapter's or to where the command runs, or a hub id. The last of the
  folders is the one with config.json and weights.

  Raises:
    InputError: a base is not named, not found, or the adapter itself.
  """
  folders = [folder]
  while not (folders[-1] / CONFIG).exists() and (folders[-1] / ADAPTER).exists():
    folders.append(_base(folders[-1]))
    if any(folders[-1].resolve() == earlier.resolve() for earlier in folders[:-1]):
      raise InputError("leads back to this adapter, which has no base then", file=folder / ADAPTER,
                       field="base_model_name_or_path", mend="name the folder of the model that it was trained on")
  return folders


def _base(folder: pathlib.Path) -> pathlib.Path:
  """Where the base of an adapter lies."""
  file, field = folder / ADAPTER, "base_model_name_or_path"
  about = read_json(file, "give the folder of a PEFT adapter")
  name, revision = about.get(field), about.get("revision")
  for key, value in ((field, name), ("revision", revision)):
    if value is not None and not isinstance(value, str):
      raise InputError(f"is {value!r}", file=file, field=key, mend="expected text")
  if not name:
    raise InputError("is not given, and the adapter lies beside no model", file=file, field=field,
                     mend="name the folder of the model that it was trained on, or copy it here")
  local = pathlib.Path(name).expanduser()
  places = [place for place in dict.fromkeys((folder / local, local)) if place.is_dir()]
  if len(places) > 1 and not places[0].samefile(places[1]):
    raise InputError(f"is {name!r}, which is {places[0]} as well as {places[1].absolute()}", file=file, field=field,
                     mend="write the whole path")
  try:
    return resolve(places[0] if places else name, field, revision)
  except InputError as error:
    raise InputError(f"is {name!r}, the base of this adapter, which {error.problem}", file=file, field=field,
                     mend="name the folder of the model that the adapter was trained on") from None


def companions(folders: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Name -> file, of generation config, tokenizer and chat templates; see `chain`.

  The tokenizer is that of the first folder that has one, and all its files come from there; the generation config
  is the base's.
  """
  home = tokenizer_folder(folders)
  names = [*TOKENIZER_FILES, *(f"{TEMPLATES}/{path.name}" for path in sorted((home / TEMPLATES).glob("*.jinja")))]
  found = {name: home / name for name in names} | {GENERATION: folders[-1] / GENERATION}
  return {name: path for name, path in found.items() if path.exists()}


def tokenizer_folder(folders: Sequence[pathlib.Path]) -> pathlib.Path:
  """The first of the folders that has a tokenizer; the last, if none has."""
  return next(filter(has_vocabulary, folders), folders[-1])


def has_vocabulary(folder: pathlib.Path) -> bool:
  """Whether a folder has a tokenizer."""
  return any((folder / name).exists() for name in VOCABULARIES)
