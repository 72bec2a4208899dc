#!/usr/bin/env bash
# Everything worth knowing about one accelerator, in at most 9 minutes: FOLDER/KIND.json and FOLDER/KIND.md.
# usage: KIND=h100|h200 benchmarks/gpu.sh [FOLDER]   needs `pip install -e '.[gpu,test]'`
# TINY=1 takes a tiny model for all parts, so that the script can be tried on CPU.
# Each part has a limit of its own, and its results are on disk after every measurement: a part that fails or has to be
# ended does not lose the others.
set -uo pipefail
kind="${KIND:?h100 or h200}"
folder="$(mkdir -p "${1:-bench-$kind}" && cd "${1:-bench-$kind}" && pwd)"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
python="${PYTHON:-python}"
end=$((SECONDS + 530)) # a step of the merging remains
parts=()

# part LIMIT NAME COMMAND ...: runs it for at most LIMIT seconds, or what is left.
part() {
  local limit=$(( $1 < end - SECONDS ? $1 : end - SECONDS )) name="$2" begin=$SECONDS
  shift 2
  if (( limit < 5 )); then
    echo "$name: no time is left" | tee -a "$folder/log"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >> "$folder/$name.log" 2>&1
  echo "$name: status $?, $((SECONDS - begin)) s of $limit" | tee -a "$folder/log"
}

# bench LIMIT NAME SHAPE FLAG ...: a part of `relearn bench`.
bench() {
  local limit="$1" name="$2" shape="$3"
  shift 3
  local tiny=()
  if [[ -n "${TINY:-}" ]]; then
    shape=tiny
    tiny=(--length=32 --prompt_length=16 --max_new_tokens=8 --batch_size=2 --repeats=2)
  fi
  parts+=("$folder/$name.json")
  part "$limit" "$name" "$python" -m relearn_jax bench --shape="$shape" --output="$folder/$name.json" "$@" "${tiny[@]}"
}

rm -f "$folder"/*.json "$folder"/*.log "$folder/log"
bench 150 lora-7b llama_2_7b --what=train --adapters=lora --runs=1,8 --batch_size=4 --length=512 --remat=attn
bench 110 decode-7b llama_2_7b --what=decode --decode_batches=1,16,128 --prompt_length=128 --max_new_tokens=64
if [[ "$kind" == h200 ]]; then
  bench 110 full-7b llama_2_7b --what=train --adapters=full --runs=1 --batch_size=4 --length=512 --remat=full
else # all parameters of 7B with fp32 masters and moments take 118 GiB
  bench 80 full-phi phi_1_5 --what=train --adapters=full --runs=1 --batch_size=16 --length=512 --remat=attn
fi
bench 50 attention llama_2_7b --what=attention
part 50 tests "$python" -m pytest -n 0 -m gpu tests
bench 40 load phi_1_5 --what=load --repeats=3
bench 300 grid names --grid --repeats=1

{
  echo "# One $kind"
  echo
  echo "Command: \`${TINY:+TINY=1 }KIND=$kind benchmarks/gpu.sh\`, $(date -u '+%Y-%m-%d %H:%M UTC')."
  if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
  fi
  echo
  echo '```'
  cat "$folder/log"
  tail -n 1 "$folder/tests.log"
  echo '```'
  "$python" benchmarks/merge_bench.py "$folder/$kind.json" "${parts[@]}"
} > "$folder/$kind.md"
echo "$folder/$kind.md and $kind.json: $SECONDS s"
