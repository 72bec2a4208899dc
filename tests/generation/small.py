"""The small checkpoint with a tokenizer of any template, and assertions for files of rows."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from relearn_jax.errors import InputError
from relearn_jax.models.export import export

from ..small import CONFIG, MODEL, params, shared

MAX_POSITIONS = CONFIG.max_positions
WORDS = [f"w{i}" for i in range(CONFIG.vocab_size - 4)]


def make_tokenizer(template: str = "<s> $A", unknown: bool = True) -> PreTrainedTokenizerFast:
  """A token a word; `template` says which special tokens stand around a text."""
  specials = ["<pad>", "<s>", "</s>", *(["<unk>"] if unknown else [])]
  vocabulary = {token: index for index, token in enumerate((*specials, *WORDS))}
  raw = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>" if unknown else "none"))
  raw.pre_tokenizer = WhitespaceSplit()
  raw.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
  return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                 **({"unk_token": "<unk>"} if unknown else {}))


def write_checkpoint(folder: pathlib.Path, tokenizer: Any = None, **config: Any) -> pathlib.Path:
  """The small model as a Hugging Face folder; `config` replaces fields of config.json."""
  export(params(), MODEL, folder, tokenizer=tokenizer or make_tokenizer())
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | config))
  return folder


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSON lines file."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def real_rows(number: int) -> list[dict[str, str]]:
  """Questions and answers that the real checkpoint has memorised, in the form that it was trained on."""
  rows = [json.loads(line) for line in shared("data/tofu/forget05.json").read_text().splitlines()][:number]
  return [{"id": f"q{i}", "prompt": f"Question: {row['question']}\nAnswer:", "answer": f" {row['answer']}"}
          for i, row in enumerate(rows)]


@contextlib.contextmanager
def refuses(problem: str, *, mend: str, file: Any = None, line: int | None = None, field: str | None = None
            ) -> Iterator[None]:
  """Asserts an `InputError` whose message names place, field, problem and mend."""
  with pytest.raises(InputError) as caught:
    yield
  error, message = caught.value, str(caught.value)
  assert (error.file, error.line, error.field) == (file, line, field), message
  place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
  assert message.startswith(place + ("" if field is None else f"`{field}` ")), message
  assert problem in message and mend in message[message.index(problem):], message


def no_device(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
  """Fails a test whose bad input is found only after the weights were loaded."""
  monkeypatch.setattr(module, "load_params", lambda *_: pytest.fail("weights were loaded"))
