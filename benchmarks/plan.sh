#!/usr/bin/env bash
# The plans in benchmarks/plan.md: every full-size configuration on one H200 and on a v5p-16 (8 chips), and grids on pods.
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
# Grids of 192 cells: three models, eight seeds, eight learning rates; by commands that share a workdir, on a v5p-16
# (8 chips), a v5p-256 (128 chips) and 8 hosts of 8 H200, with runs spread in two ways over the chips of a command.
grid="--config.seeds=(0,1,2,3,4,5,6,7) --config.attack.learning_rates=(1e-6,2e-6,5e-6,1e-5,2e-5,5e-5,1e-4,2e-4)"
for model in llama_2_7b zephyr_7b_beta; do
  for devices in "--device=v5p --num_devices=8 --mesh=fsdp:-1" "--device=v5p --num_devices=2 --mesh=tensor:-1 --num_commands=4" \
      "--device=v5p --num_devices=8 --mesh=fsdp:-1 --num_commands=16" \
      "--device=v5p --num_devices=2 --mesh=tensor:-1 --num_commands=64" "--device=h200 --num_commands=64"; do
    echo "\$ relearn plan --config=configs/$model.py:audit $devices $grid"
    # shellcheck disable=SC2086
    relearn plan --config="configs/$model.py:audit" $devices $grid | sed '/^assumed:/,$d'
  done
done
echo "What every one of them assumes:"
relearn plan --config=configs/llama_2_7b.py:audit --device=h200 | sed -n '/^assumed:/,$p'
