#!/usr/bin/env bash
# What benchmarks/tofu.md shows: the TOFU case on the invented world, and on small checkpoints of TOFU itself: a model
# trained on forget05 and the last 600 rows of retain95, and one trained on those 600 alone.
# usage: benchmarks/tofu.sh FOLDER TOFU ORIGINAL CONTROL [embedded|mini|grid ...]   needs `relearn` on the PATH
# TOFU is the folder of forget05.json and retain95.json. By default embedded and mini are run; "grid" takes hours.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:?give a folder for the workdirs}" tofu="$2" original="$3" control="$4"
shift 4
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(embedded mini)

given() {  # PREFIX
  echo "--config.$1arms.original=$original" "--config.$1arms.control=$control" \
    "--config.$1case.forget=$tofu/forget05.json" "--config.$1case.retain=$tofu/retain95.json"
}

for part in "${parts[@]}"; do
  case "$part" in
    embedded)
      relearn sweep --config="$here/../configs/sweep.py:tofu" --workdir="$folder/sweep-embedded"
      relearn audit --config="$here/../configs/tofu.py:embedded" --workdir="$folder/embedded"
      relearn audit --config="$here/../configs/tofu.py:embedded" --config.case.titles=one --workdir="$folder/embedded-one"
      python "$here/cells.py" --all "$folder/embedded" "$folder/embedded-one" ;;
    mini)
      # shellcheck disable=SC2046
      relearn sweep --config="$here/../configs/sweep.py:tofu_mini" $(given audit.) --workdir="$folder/sweep-mini"
      # shellcheck disable=SC2046
      relearn audit --config="$here/../configs/tofu.py:mini" $(given "") --workdir="$folder/mini"
      python "$here/cells.py" --all "$folder/mini" ;;
    grid)
      # shellcheck disable=SC2046
      relearn audit --config="$here/../configs/tofu.py:mini_grid" $(given "") --workdir="$folder/mini-grid"
      python "$here/cells.py" --all "$folder/mini-grid" ;;
    *) echo "expected embedded, mini or grid, not $part" >&2; exit 2 ;;
  esac
done
