"""Progress bars of long work."""

import shutil
import sys

from tqdm import tqdm

from relearn_jax.parallel.processes import is_first


def progress(total: int | None, name: str, unit: str = "step") -> tqdm:
  """A progress bar on stderr; nothing where stderr is no terminal, or another process's.

  Args:
    total: of units; None: unknown.
    name: stands before the bar.
    unit: what is counted.
  """
  # tqdm draws nothing on terminals of unknown size, such as those of containers; this has a fallback.
  size, shown = shutil.get_terminal_size(), is_first() and sys.stderr.isatty()
  return tqdm(total=total, desc=name, unit=unit, disable=not shown, ncols=size.columns, nrows=size.lines)
