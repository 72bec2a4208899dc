#!/usr/bin/env bash
# Writes benchmarks/bench.md, the figures of this machine: about 7 minutes on 2 quiet cores.
# usage: benchmarks/bench.sh [FOLDER]   needs `pip install -e '.[parity]'`; JSON files go to FOLDER
set -euo pipefail
folder="$(mkdir -p "${1:-runs/bench}" && cd "${1:-runs/bench}" && pwd)"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
python="${PYTHON:-python}"

# bench NAME FLAG ...
bench() {
  local name="$1"
  shift
  "$python" -m relearn_jax bench --output="$folder/$name.json" "$@" > /dev/null
  echo "$name: $SECONDS s" >&2
}

rm -f "$folder"/*.json
load="$(cut -d ' ' -f 1 /proc/loadavg)"
bench names --shape=names --batch_size=16 --length=64 --prompt_length=32 --max_new_tokens=32 --compare=torch
bench small --shape=small --what=train,decode,load,attention --adapters=full --batch_size=16 --length=128 \
  --prompt_length=64 --max_new_tokens=32 --repeats=5 --compare=torch
bench grid --shape=names --grid --repeats=3 --compare=torch
merged="$("$python" benchmarks/merge_bench.py "$folder/bench.json" "$folder"/{names,small,grid}.json)"
cat > benchmarks/bench.md <<MARKDOWN
# Speed on CPU, and beside torch

Command: \`benchmarks/bench.sh\`, which writes this file; $SECONDS s, load of the machine before it $load. What the columns mean is
in \`relearn_jax/bench/formulas.py\`, and in every JSON file.

- "so many times as fast" is the other side's seconds divided by ours, pair by pair of calls that followed each other: above 1
  ours is faster. Torch trains the models of a stack one after the other; its losses before the first step, and its
  greedy tokens, are compared with ours in the JSON file (\`loss_before\`, \`equal_tokens\`).
- "names audit" is a short audit (two seeds, one variant, gradient ascent, all parameters, two learning rates) with what it
  writes, against the same models, rows, steps and questions in torch. Both end with the same log-probabilities of answers
  (\`largest_difference_of_mean_answer_logprobs\`). So small an audit is mostly overhead: it says what a user waits for, not
  what large models take.
- A grid's "cold" audit compiles everything; "warm" ones find the compiled programs on disk, as another process would.
- On CPU runs of a device are computed one after the other, which a plan does not count: of stacked runs it says too much.
- No accelerator was at hand: \`benchmarks/gpu.sh\` measures one.
$merged

## A plan by these figures

\`\`\`
\$ relearn plan --config=configs/names.py --device=cpu --num_devices=$(nproc) --memory_gib=20 --bench=bench.json
$("$python" -m relearn_jax plan --config=configs/names.py --device=cpu --num_devices="$(nproc)" --memory_gib=20 \
  --bench="$folder/bench.json" | sed "s|$folder/||")
\`\`\`
MARKDOWN
echo "benchmarks/bench.md: $SECONDS s" >&2
