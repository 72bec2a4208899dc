#!/usr/bin/env bash
# Times the default audit: cold (empty caches), again in a new workdir (warm), and its peak memory.
# usage: benchmarks/names.sh [FOLDER]   needs `relearn` on the PATH and GNU time
set -euo pipefail
folder="${1:-$(mktemp -d)}"
export RELEARN_CACHE="$folder/cache"
rm -rf "$RELEARN_CACHE"
for name in cold warm; do
  rm -rf "${folder:?}/$name"
  /usr/bin/time --format="$name: %e s wall clock, %U s user, %M KiB peak memory" \
    relearn audit --config=configs/names.py --workdir="$folder/$name"
  cat "$folder/$name/checkpoints/seconds.json"
  echo
done
