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
    audit "rate$rate-base$seed" --config.arms.pretrain.learning_rate=$rate --config.arms.pretrain.seed=$seed
  done
done
audit seeds345 --config.seeds="(3, 4, 5)"
# With the settings that these methods had before benchmarks/methods.md.
for method in gd kl; do
  audit "$method" --config.unlearn.methods="('$method',)" --config.unlearn.settings.$method.learning_rate=5e-5 \
    --config.unlearn.settings.$method.retain_weight=1
done
audit npo --config.unlearn.methods="('npo',)" --config.unlearn.settings.npo.learning_rate=5e-5 \
  --config.unlearn.settings.npo.beta=0.02
python "$here/cells.py" "$folder"/rate* "$folder"/seeds345 "$folder"/gd "$folder"/kl "$folder"/npo
