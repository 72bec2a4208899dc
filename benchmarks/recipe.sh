#!/usr/bin/env bash
# Where the default recipe of configs/names.py comes from, and how far it depends on chance:
# other learning rates of the base's pretraining, other bases, other data, other methods.
# usage: benchmarks/recipe.sh FOLDER   needs `relearn` on the PATH; takes about 32 minutes on 2 cores
set -euo pipefail
folder="${1:?give a folder for the workdirs}"
here="$(dirname "$0")"

audit() {
  local name="$1"
  shift
  relearn audit --config="$here/../configs/names.py" --workdir="$folder/$name" "$@" > /dev/null
}

for rate in 0.003 0.001; do
  for seed in 0 1 2 3; do
    audit "rate$rate-base$seed" --config.base.learning_rate=$rate --config.base.seed=$seed
  done
done
audit seeds345 --config.case.seeds="(3, 4, 5)"
# With the settings that these methods had before benchmarks/methods.md.
for method in gd kl; do
  audit "$method" --config.method=$method --config.methods.$method.learning_rate=5e-5 \
    --config.methods.$method.retain_weight=1
done
audit npo --config.method=npo --config.methods.npo.learning_rate=5e-5 --config.methods.npo.beta=0.02
python "$here/cells.py" "$folder"/rate* "$folder"/seeds345 "$folder"/gd "$folder"/kl "$folder"/npo
