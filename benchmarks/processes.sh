#!/usr/bin/env bash
# What benchmarks/processes.md shows: an audit on 1, 2 and 4 processes of this machine, and whether all are the same.
# usage: [NUMBERS="1 2 4"] benchmarks/processes.sh CONFIG FOLDER [FLAG ...]
#   such as benchmarks/processes.sh configs/names.py runs/processes
#   or      benchmarks/processes.sh configs/tofu.py:embedded runs/processes-tofu
# needs `relearn` on the PATH
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
config="$1" folder="$2"
mkdir -p "$folder"
export RELEARN_CACHE="${RELEARN_CACHE:-$folder/cache}"
first=""
for number in ${NUMBERS:-1 2 4}; do
  workdir="$folder/$number" begin="$SECONDS"
  python "$here/../launch/processes/run.py" -n "$number" --logs="$workdir.logs" -- \
    relearn audit --config="$config" --workdir="$workdir" "${@:3}" > "$workdir.txt"
  echo "on $number: $((SECONDS - begin)) s, $(cat "$workdir/checkpoints/seconds.json")"
  first="${first:-$workdir}"
  if [ "$workdir" != "$first" ]; then
    python "$here/same.py" "$first" "$workdir"
  fi
done
