"""Compares two finished audits: `python benchmarks/same.py WORKDIR WORKDIR`; exits with 1 where they differ."""

import json
import pathlib
import sys
from typing import Any

import pyarrow.parquet as pq


def summary(workdir: pathlib.Path) -> dict[str, Any]:
  """summary.json without what equal audits differ in: seconds, and which devices there were."""
  values = json.loads((workdir / "summary.json").read_text())
  del values["seconds"], values["versions"]["devices"]
  return values


def main() -> int:
  """Prints what is equal to the bit, and what is not."""
  one, other = map(pathlib.Path, sys.argv[1:])
  ours, theirs = summary(one), summary(other)
  differ = [key for key in ours if ours[key] != theirs.get(key)]
  differ += [name for name in ("answers.parquet", "results.parquet")
             if not pq.read_table(one / name).equals(pq.read_table(other / name))]
  equal = len(ours["fingerprints"])
  print(f"{one} and {other}: " + (f"differ in {', '.join(differ)}" if differ else
                                  f"the same summary, rows and answers, and {equal} hashes of weights"))
  return int(bool(differ))


if __name__ == "__main__":
  sys.exit(main())
