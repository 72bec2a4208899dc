#!/usr/bin/env bash
# Writes benchmarks/bench.md, the figures of this machine, in at most 8 minutes; meant for 2 quiet cores. What a part has
# not measured when its time is up is not in the file.
# usage: benchmarks/bench.sh [FOLDER]   needs `pip install -e '.[parity]'`; JSON files go to FOLDER
set -uo pipefail
folder="$(mkdir -p "${1:-runs/bench}" && cd "${1:-runs/bench}" && pwd)"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
python="${PYTHON:-python}"
end=$((SECONDS + 480))

# bench LIMIT NAME FLAG ...: a part, for at most LIMIT seconds, or what is left.
bench() {
  local limit=$(( $1 < end - SECONDS ? $1 : end - SECONDS )) name="$2" begin=$SECONDS
  shift 2
  ((limit > 0)) || { echo "- $name: no time was left" | tee -a "$folder/log"; return; }
  timeout "$limit" "$python" -m relearn_jax bench --output="$folder/$name.json" "$@" >> "$folder/$name.log" 2>&1
  echo "- $name: status $?, $((SECONDS - begin)) s of $limit" | tee -a "$folder/log"
}

rm -f "$folder"/*.json "$folder"/*.log "$folder/log"
load="$(cut -d ' ' -f 1 /proc/loadavg)"
bench 120 names --shape=names --batch_size=16 --length=64 --prompt_length=32 --max_new_tokens=32 --compare=torch
bench 180 small --shape=small --what=train,decode,load,attention --adapters=full --batch_size=16 --length=128 \
  --prompt_length=64 --max_new_tokens=32 --repeats=5 --compare=torch
bench 120 audit --shape=names --grid --compare=torch --repeats=2
bench 240 lora_grid --shape=names --grid --adapters=lora --repeats=1
merged="$("$python" benchmarks/merge_bench.py "$folder/bench.json" "$folder"/{names,small,audit,lora_grid}.json)"
cat > benchmarks/bench.md <<MARKDOWN
# Speed on CPU, and beside torch

Command: \`benchmarks/bench.sh\`, which writes this file; load of the machine before it $load. What the columns mean is in
\`relearn_jax/bench/formulas.py\`, and in every JSON file. Parts (status 124: its time was up):

$(cat "$folder/log")

- "speed-up" is the other side's seconds divided by ours, pair by pair of calls that followed each other: above 1
  ours is faster. Torch trains the models of a stack one after the other; its losses before the first step, and its
  greedy tokens, are compared with ours in the JSON file (\`loss_before\`, \`equal_tokens\`).
- "names audit" is a short audit (two seeds, one variant, gradient ascent, all parameters, two learning rates) with what it
  writes, against the same models, rows, steps and questions in torch. Both end with the same log-probabilities of answers
  (\`difference_of_mean_answer_logprobs\`). So small an audit is mostly overhead: it says what a user waits for, not
  what large models take. \`--audit=default\` takes that of configs/names.py, in some fifteen minutes.
- A grid's "cold" audit compiles everything; "warm" ones find the compiled programs on disk, as another process would;
  "again" they are in memory, as in commands that share a process. The names audit's are in memory the second time.
- "separate commands" make each cell of the grid of adapters by a \`relearn audit\` of its own, which compiles everything, of
  an unlearned model that they are given; some are run, and their seconds multiplied. "one command" makes the whole grid.
- On CPU runs of a device are computed one after the other, which a plan does not count: of stacked runs it says too much.
- Both sides run in one process, so that torch has the memory that ours is kept in, too (\`host_memory\`).
- No accelerator was at hand: \`benchmarks/gpu.sh\` measures one.
$merged

## A plan by these figures

\`\`\`
\$ relearn plan --config=configs/names.py --device=cpu --num_devices=$(nproc) --memory_gib=20 --bench=bench.json
$("$python" -m relearn_jax plan --config=configs/names.py --device=cpu --num_devices="$(nproc)" --memory_gib=20 \
  --bench="$folder/bench.json" | grep -A 2 -e '^all stages' -e '^- cpu' | sed "s|$folder/||")
\`\`\`
MARKDOWN
echo "benchmarks/bench.md: $SECONDS s" >&2
