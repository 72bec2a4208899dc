"""A judge that is a checkpoint of one's own, asked through the package's own generator."""

import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from relearn_jax.data.chat import ChatSettings, open_chat
from relearn_jax.data.jsonl import Row, read_jsonl, write_jsonl
from relearn_jax.data.tokens import prompt_ids
from relearn_jax.errors import InputError
from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.judge.endpoint import REPLY_TOKENS, Reply
from relearn_jax.models.checkpoint_sources import open_checkpoint
from relearn_jax.workdir import file_digests


def _one_turn(system: str, user: str) -> str:
  return f"{system}\n\n{user}"


class LocalJudge:
  """A checkpoint, greedy; by its chat template, where it has one."""

  def __init__(self, model: str, batch_size: int = 8, opening: tuple[str, str] = ("", "")):
    """
    Args:
      model: Hugging Face folder or hub id.
      batch_size: answers judged together.
      opening: a system's turn, and how each user's turn begins: what all of them begin with is read once.

    Raises:
      InputError: it cannot be opened.
    """
    self.model, self.batch_size, self.prefix = model, batch_size, _one_turn(*opening) if any(opening) else ""
    self._checked, self._tokenizer = open_checkpoint(model)
    self._settings = ChatSettings() if getattr(self._tokenizer, "chat_template", None) else None

  @functools.cache  # noqa: B019  (one judge a command)
  def identity(self) -> dict[str, Any]:
    """What decides its replies, for the cache."""
    return {"checkpoint": file_digests(self._checked.deciding_files()), "max_tokens": REPLY_TOKENS}

  def replies(self, asked: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Reply]]:
    """Replies to pairs of a system's and a user's turn, which stand in one turn: not every template knows both.

    Raises:
      InputError: the checkpoint gives no finite numbers.
    """
    assert all(_one_turn(*turns).startswith(self.prefix) for turns in asked)
    texts = [_one_turn(*turns) + ("" if self._settings else "\n\n") for turns in asked]
    fitting = [number for number, text in enumerate(texts) if self._fits(text)]
    yield from ((number, Reply(problem="does not fit into the judge's context"))
                for number in sorted(set(range(len(asked))) - set(fitting)))
    if not fitting:
      return
    with tempfile.TemporaryDirectory() as folder:
      prompts, output = (pathlib.Path(folder) / f"{name}.jsonl" for name in ("prompts", "replies"))
      write_jsonl(prompts, ({"id": str(number), "prompt": texts[number].removeprefix(self.prefix)}
                            for number in fitting))
      generate_file(self.model, prompts, output, max_new_tokens=REPLY_TOKENS, batch_size=self.batch_size,
                    chat=self._settings, prefix=self.prefix)
      for row in read_jsonl(output, {"id": str, "completion": str}):
        yield int(row["id"]), Reply(row["completion"], model=pathlib.Path(self.model).name)

  def _fits(self, text: str) -> bool:
    chat = open_chat(self._settings, self._tokenizer, self._checked.path, "--judge") if self._settings else None
    try:
      prompt_ids(self._tokenizer, Row({"prompt": text}, 1), pathlib.Path("judge"),
                 self._checked.config.max_positions, REPLY_TOKENS, chat=chat)
    except InputError:
      return False
    return True
