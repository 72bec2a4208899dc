"""A command as one process of several, with a file of the places of prepared rows that it has read, a step a line.

  python -m tests.parallel.reading FILE ARGUMENTS
"""

import json
import pathlib
import sys
from typing import Any
from unittest import mock

from relearn_jax.cli import main
from relearn_jax.data.prepared import PreparedRows

if __name__ == "__main__":
  file, read = pathlib.Path(sys.argv[1]), PreparedRows.read

  def recorded(rows: PreparedRows, places: Any) -> Any:
    with file.open("a") as out:
      out.write(json.dumps([int(place) for place in places]) + "\n")
    return read(rows, places)
  with mock.patch.object(PreparedRows, "read", recorded):
    sys.exit(main(sys.argv[2:]))
