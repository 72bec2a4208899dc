"""Progress bars: on terminals, even those that do not tell their size; quiet elsewhere."""

import io
import sys

import pytest

from relearn_jax.progress import progress


class Terminal(io.StringIO):
  """A terminal, as far as a program can ask."""

  def isatty(self) -> bool:
    return True


@pytest.mark.parametrize("stream,shown", [(Terminal(), True), (io.StringIO(), False)])
def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: bool) -> None:
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setenv("COLUMNS", "0")
  monkeypatch.setenv("LINES", "0")
  with progress(2, "memorize") as bar:
    bar.update(2)
  assert ("memorize: 100%" in stream.getvalue()) is shown and bool(stream.getvalue()) is shown
