#!/usr/bin/env bash
# The plans in benchmarks/plan.md: every full-size configuration on one H200 and on a v5p-16 (8 chips).
set -euo pipefail
configs="$(cd "$(dirname "$0")/../configs" && pwd)"
cd "$configs/.."
plans=()
for model in llama_2_7b llama_2_7b_chat zephyr_7b_beta phi_1_5; do
  plans+=("$model.py:unlearn" "$model.py:audit")
done
for plan in "${plans[@]}" tofu.py:phi_1_5 tofu.py:llama_2_7b; do
  for devices in "--device=h200" "--device=v5p --num_devices=8 --mesh=fsdp:-1"; do
    echo "\$ relearn plan --config=configs/$plan $devices"
    # shellcheck disable=SC2086
    relearn plan --config="configs/$plan" $devices | sed '/^assumed:/,$d'
  done
done
# The WMDP case has neither its articles nor a control, which is as large as the original; all tokens of its 1,000 papers
# count. On one H200 methods with retained rows take half as many rows a step, and scrub does not fit.
given="--rows=1000 --counted=512 --config.case.relearn=ARTICLES.jsonl"
given+=" --config.arms.control=HuggingFaceH4/zephyr-7b-beta"
half="--config.unlearn.batch_size=8 --config.unlearn.max_steps=250"
for devices in "--device=h200 --config.unlearn.methods=('ga','npo')" \
    "--device=h200 --config.unlearn.methods=('gd','kl','rmu') $half" "--device=v5p --num_devices=8 --mesh=fsdp:-1"; do
  echo "\$ relearn plan --config=configs/wmdp.py:zephyr_7b_beta $devices $given"
  # shellcheck disable=SC2086
  relearn plan --config=configs/wmdp.py:zephyr_7b_beta $devices $given | sed '/^assumed:/,$d'
done
echo "What every one of them assumes:"
relearn plan --config=configs/llama_2_7b.py:audit --device=h200 | sed -n '/^assumed:/,$p'
