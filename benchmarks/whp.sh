#!/usr/bin/env bash
# What benchmarks/whp.md shows: a hidden name and verbatim passages, on the invented novel.
# usage: benchmarks/whp.sh FOLDER [verbatim|name ...]   needs `relearn` on the PATH
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:?give a folder for the workdirs}"
shift
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(verbatim name)

for part in "${parts[@]}"; do
  [[ "$part" == verbatim || "$part" == name ]] || { echo "expected verbatim or name, not $part" >&2; exit 2; }
  relearn sweep --config="$here/../configs/sweep.py:whp_$part" --workdir="$folder/sweep-$part"
  relearn audit --config="$here/../configs/whp_$part.py:embedded" --workdir="$folder/$part"
  python "$here/cells.py" --all --scores "$folder/$part"
done
