"""Joins JSON files of `relearn bench` into a list, and prints their tables: `merge_bench.py OUT.json PART.json ...`.

Parts that are missing, since their command failed or ran out of time, are named; a part that was ended has what it had
measured by then. `relearn plan --bench` takes the list as it takes one of them.
"""

import argparse
import json
import pathlib

from relearn_jax.bench.bench_text import bench_text


def main() -> None:
  """Writes the list and prints Markdown."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("output", type=pathlib.Path)
  parser.add_argument("parts", type=pathlib.Path, nargs="+")
  flags = parser.parse_args()
  there = {part.stem: json.loads(part.read_text()) for part in flags.parts if part.exists()}
  for name, found in there.items():
    print(f"\n## {name}\n\n{bench_text(found)}")
  for part in flags.parts:
    if part.stem not in there:
      print(f"\n## {part.stem}\n\nNothing was measured: its command failed, or had no time left.")
  flags.output.write_text(json.dumps(list(there.values()), indent=1) + "\n")


if __name__ == "__main__":
  main()
