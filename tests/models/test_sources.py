"""Where a checkpoint and its tokenizer come from: folders, the hub, and what is refused of them."""

import importlib.util
import pathlib
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from relearn_jax.data.jsonl import Row
from relearn_jax.data.tokens import prompt_ids, split_ids
from relearn_jax.errors import InputError
from relearn_jax.models.checkpoint import check_checkpoint
from relearn_jax.models.checkpoint_sources import load_tokenizer, resolve

from .tiny import (
    refuses,
    write,
    write_json,
    write_tokenizer,
)

NORM = "model.norm.weight"
AGAIN = "copy or download the file again"
BELONGS = "give the config.json that belongs to these weights"


def config_of(folder: pathlib.Path):
  return check_checkpoint(folder).config


def test_tokenizer_that_fits(tmp_path: pathlib.Path) -> None:
  write_tokenizer(write(tmp_path), 10, added=2)
  assert len(load_tokenizer(tmp_path, config_of(tmp_path))) == 12


def test_no_tokenizer(tmp_path: pathlib.Path) -> None:
  with refuses("does not exist", file=write(tmp_path) / "tokenizer.json", mend="copy the checkpoint's tokenizer files"):
    load_tokenizer(tmp_path, config_of(tmp_path))


def test_damaged_tokenizer(tmp_path: pathlib.Path) -> None:
  (write(tmp_path) / "tokenizer.json").write_text("{")
  with refuses("cannot be read", file=tmp_path / "tokenizer.json", mend="copy the checkpoint's tokenizer files again"):
    load_tokenizer(tmp_path, config_of(tmp_path))


def test_empty_tokenizer(tmp_path: pathlib.Path) -> None:
  write_tokenizer(write(tmp_path), 0)
  with refuses("has no tokens", file=tmp_path / "tokenizer.json", mend="copy the checkpoint's tokenizer files again"):
    load_tokenizer(tmp_path, config_of(tmp_path))


@pytest.mark.parametrize(("size", "added", "token"), [(13, 0, "w12"), (12, 3, "<extra1>")])
def test_tokens_beyond_the_embedding_are_named_where_they_occur(tmp_path: pathlib.Path, size: int, added: int,
                                                                token: str) -> None:
  write_tokenizer(write(tmp_path), size, added)
  tokenizer = load_tokenizer(tmp_path, config_of(tmp_path))
  assert len(tokenizer) == size + added
  rows = [Row({"prompt": "w3 w11", "answer": " w5"}, 1), Row({"prompt": "w3", "answer": f" {token}"}, 2)]
  assert prompt_ids(tokenizer, rows[0], tmp_path, 32, 1) == [3, 11]
  assert split_ids(tokenizer, rows[0], tmp_path, 32) == ([3, 11, 5], 2)
  beyond = tokenizer.convert_tokens_to_ids(token)
  with pytest.raises(InputError, match=f":2: `answer` has token '{token}' with id {beyond}, and .* has 12 rows; leave"):
    split_ids(tokenizer, rows[1], tmp_path, 32)
  assert tokenizer.decode([3, 5]) == "w3 w5"


def test_an_end_beyond_the_embedding(tmp_path: pathlib.Path) -> None:
  write_tokenizer(write(tmp_path), 12, 1)
  about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<extra0>"}
  write_json(tmp_path / "tokenizer_config.json", about)
  with refuses("is '<extra0>' with id 12, and the embedding has 12 rows", file=tmp_path / "tokenizer.json",
               field="eos_token", mend="give the tokenizer that belongs to this checkpoint"):
    load_tokenizer(tmp_path, config_of(tmp_path))


@pytest.mark.parametrize("package,content", [("sentencepiece", b"\n\x0e\n\x05<unk>"), ("tiktoken", b"IQ== 0\n"),
                                             ("sentencepiece", b"")])
def test_a_package_that_is_missing_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, package: str,
                                            content: bytes) -> None:
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
  (write(tmp_path) / "tokenizer.model").write_bytes(content)
  with refuses(f"{package}, is not installed", file=tmp_path / "tokenizer.model", mend=f"pip install {package}"):
    load_tokenizer(tmp_path, config_of(tmp_path))
  write_tokenizer(tmp_path, 12)  # it is not needed then
  assert len(load_tokenizer(tmp_path, config_of(tmp_path))) == 12


def test_a_sentencepiece_model_that_was_cut_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """By the package itself; what stands in for it here cannot read the file, as it could not."""
  package, find, asked = types.ModuleType("sentencepiece"), importlib.util.find_spec, []

  def read(model_file: str) -> None:
    asked.append(model_file)
    raise RuntimeError("INTERNAL: byte piece <0x00> is found although `byte_fallback` is false.")
  monkeypatch.setattr(package, "SentencePieceProcessor", read, raising=False)
  monkeypatch.setitem(sys.modules, "sentencepiece", package)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "sentencepiece" else find(name))
  file = write(tmp_path) / "tokenizer.model"
  file.write_bytes(b"\n\x0e\n\x05<unk>")
  with refuses("cannot be read (RuntimeError: INTERNAL: byte piece", file=file, mend="copy the checkpoint's tokenizer"):
    load_tokenizer(tmp_path, config_of(tmp_path))
  assert asked == [str(file)]


# Names of models.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
  """A working directory with a folder `models/tofu`, and no hub."""
  (tmp_path / "models" / "tofu").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  return tmp_path


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
  def download(*_: object, **__: object) -> str:
    raise error
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_resolve_a_folder(offline: pathlib.Path) -> None:
  assert resolve("models/tofu") == pathlib.Path("models/tofu")
  assert resolve(offline / "models" / "tofu") == offline / "models" / "tofu"


def test_resolve_a_file(offline: pathlib.Path) -> None:
  (offline / "x").touch()
  with refuses("is a file", file=offline / "x", field="--model", mend="give the folder that holds config.json"):
    resolve(offline / "x")


@pytest.mark.parametrize("name", ["./models/tofo", "models/tofu/", "/models/none", "models/a/b", "tofu", "../models/t"])
def test_resolve_a_mistyped_path(offline: pathlib.Path, name: str) -> None:
  if name == "models/tofu/":
    assert resolve(name).is_dir()
    return
  hint = f" (there is {pathlib.Path('models/tofu')})" if name == "./models/tofo" else ""
  with refuses(f"does not exist{hint}, and is no hub id (owner/name)", file=pathlib.Path(name), field="--model",
               mend="give an existing folder or a hub id"):
    resolve(name)


def test_resolve_a_mistyped_path_that_could_be_a_hub_id(offline: pathlib.Path) -> None:
  with refuses(f"is no local folder (there is {pathlib.Path('models/tofu')}), and cannot be fetched from the hub",
               file="models/tofo", field="--model", mend="give a local folder, or download the checkpoint"):
    resolve("models/tofo")
  with refuses("is no hub id", file="owner/two--dashes", field="--model", mend="give an existing folder or a hub id"):
    resolve("owner/two--dashes")


def test_resolve_what_the_hub_refuses(offline: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  bare = lambda kind: kind.__new__(kind)  # they want an HTTP response
  hub_raises(monkeypatch, bare(errors.GatedRepoError))
  with refuses("is gated", file="owner/name", field="--model", mend="accept its licence on the hub, then set HF_TOKEN"):
    resolve("owner/name")
  hub_raises(monkeypatch, bare(errors.RepositoryNotFoundError))
  with refuses("nor a repository that the hub shows you", file="owner/name", field="--model",
               mend="check the spelling"):
    resolve("owner/name")
  hub_raises(monkeypatch, ConnectionError())
  with refuses("cannot be fetched from the hub (ConnectionError)", file="owner/name", field="--model", mend="online"):
    resolve("owner/name")


