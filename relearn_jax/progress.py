"""Progress bars of long work."""

import shutil
import sys

from tqdm import tqdm


def progress(total: int, name: str, unit: str = "step") -> tqdm:
  """A progress bar on stderr; nothing where stderr is no terminal."""
  # tqdm draws nothing on terminals of unknown size, such as those of containers; this has a fallback.
  size = shutil.get_terminal_size()
  return tqdm(total=total, desc=name, unit=unit, disable=not sys.stderr.isatty(), ncols=size.columns, nrows=size.lines)
