#!/usr/bin/env bash
# What benchmarks/methods.md shows: the sweep of hyper-parameters, on unlearned models of other seeds alone, and the
# comparison of all methods with what it chose.
# usage: benchmarks/methods.sh FOLDER   needs `relearn` on the PATH; takes about 40 minutes on 2 cores
set -euo pipefail
folder="${1:?give a folder for the workdirs}"
configs="$(cd "$(dirname "$0")/../configs" && pwd)"
relearn sweep --config="$configs/sweep.py" --workdir="$folder/sweep"
relearn audit --config="$configs/methods.py" --workdir="$folder/methods"
cat "$folder/methods/report.md"
