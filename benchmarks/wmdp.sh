#!/usr/bin/env bash
# What benchmarks/wmdp.md shows: recipes of an invented craft, by six methods.
# usage: benchmarks/wmdp.sh FOLDER   needs `relearn` on the PATH
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:?give a folder for the workdirs}"

relearn sweep --config="$here/../configs/sweep.py:wmdp" --config.audit.seeds="(100,)" --workdir="$folder/sweep"
relearn audit --config="$here/../configs/wmdp.py:embedded" --workdir="$folder/craft"
python "$here/cells.py" --all "$folder/craft"
