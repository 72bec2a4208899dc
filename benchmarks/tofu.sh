#!/usr/bin/env bash
# What benchmarks/tofu.md shows: a model that knows 200 rows of TOFU unlearns them by gradient ascent and by NPO, is
# exported, and is audited as somebody else's checkpoint, with a model that never saw those rows as control.
# usage: benchmarks/tofu.sh FOLDER_OF_TOFU_JSON FOLDER_OF_MODELS OUTPUT
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
tofu="$1" models="$2" out="$3"
full="$models/tofu-mini-full" never="$models/tofu-mini-retain"

python "$here/tofu_files.py" --tofu="$tofu" --output="$out/files"
for method in ga npo; do
  for rate in 1e-4 3e-4; do
    relearn unlearn --config="$here/../configs/unlearn.py" --config.model="$full" --config.method="$method" \
      --config.forget="$out/files/forget.jsonl" --config.retain="$out/files/retain.jsonl" --config.steps=40 \
      --config.keep_every=2 --config.learning_rate="$rate" --workdir="$out/$method-$rate"
  done
  python "$here/tofu_select.py" --files="$out/files" --model="$full" --max_score=0.05 --output="$out/$method" \
    "$out/$method-1e-4" "$out/$method-3e-4"
done

audit() {  # METHOD WORKDIR FLAGS...
  relearn audit --config="$here/../configs/checkpoint.py" --config.case.name=tofu --config.arms.method="$1" \
    --config.arms.unlearned="$out/$1" --config.arms.original="$full" --config.arms.control="$never" \
    --config.case.forget="$out/files/forget.jsonl" --config.case.retain="$out/files/retain.jsonl" \
    --config.case.relearn="$out/files/relearn.jsonl" --config.case.questions="$out/files/questions.jsonl" \
    --config.ask.batch_size=35 --workdir="$out/$2" "${@:3}"
}
audit ga audit-ga '--config.attack.learning_rates=(1e-4,)'
audit npo audit-npo '--config.attack.learning_rates=(1e-4,)'
audit npo audit-npo-lora '--config.attack.learning_rates=(1e-3,)' '--config.attack.adapters=("lora",)'
