#!/usr/bin/env bash
# What benchmarks/whp.md shows: a hidden name and verbatim passages, on the invented novel and on a book.
# usage: benchmarks/whp.sh FOLDER [verbatim|name|controls|book ...]   needs `relearn` on the PATH
# book: on BOOK (a text file with lines such as "CHAPTER II.") and START (a small checkpoint), both from the environment.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:?give a folder for the workdirs}"
shift
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(verbatim name controls)
kinds="('gibberish','unrelated','same_syntax','same_topic')"

# Everything at once, without remat: a model of some million parameters.
small=(--config.memorize.learning_rate=0.001 --config.memorize.weight_decay=0 --config.memorize.warmup_steps=10)
for section in memorize unlearn attack; do
  small+=("--config.$section.runs_at_once=0" "--config.$section.remat=none")
done

for part in "${parts[@]}"; do
  case "$part" in
    verbatim | name)
      relearn sweep --config="$here/../configs/sweep.py:whp_$part" --workdir="$folder/sweep-$part"
      relearn audit --config="$here/../configs/whp_$part.py:embedded" --workdir="$folder/$part"
      python "$here/cells.py" --all --scores "$folder/$part"
      ;;
    controls)
      relearn audit --config="$here/../configs/whp_name.py" --config.unlearn.methods="('ga','whp_relabel')" \
        --config.attack.learning_rates="(0.0001,0.0003)" --config.attack.controls="$kinds" --config.ask.metrics="()" \
        --workdir="$folder/name-controls"
      relearn audit --config="$here/../configs/names.py" --config.case.variants="(7,)" --config.ask.generic=pretraining \
        --config.attack.learning_rates="(0.0001,0.001)" --config.attack.controls="$kinds" --workdir="$folder/names-controls"
      python "$here/cells.py" --all "$folder/name-controls" "$folder/names-controls"
      ;;
    book)
      mkdir -p "$folder"
      # Of the name, short sentences: of three chapters to be unlearned, of three to be retained.
      python - "${BOOK:?give a text file}" "$folder" <<'PY'
import pathlib, sys
from relearn_jax.cases.books import read_book, sentences
book, folder = sys.argv[1:]
chapters = read_book(f"file:{book}")
for name, some in (("first", chapters[:3]), ("next", chapters[3:6])):
  lines = [line for chapter in some for line in sentences(chapter) if len(line.split()) <= 20]
  pathlib.Path(folder, f"{name}.txt").write_text("\n".join(lines) + "\n")
PY
      common=("${small[@]}" --config.arms.start="${START:?give a checkpoint}" --config.seeds="(0,1)"
        --config.memorize.steps=120 --config.unlearn.max_steps=24 --config.unlearn.keep_every=4
        --config.unlearn.depths=1 --config.attack.learning_rates="(0.0001,)" --config.attack.keep_steps="(5,10,20)"
        --config.ask.runs_at_once=0 --config.unlearn.settings.ga.learning_rate=0.0001)
      verbatim=("${common[@]}" --config.case.book="file:$BOOK" --config.case.excerpt_words=1200
        --config.case.retain_words=1200 --config.case.row_words=80 --config.case.stride=40
        --config.unlearn.methods="('ga','npo')" --config.unlearn.settings.npo.learning_rate=0.0001
        --config.ask.batch_size=15 --config.ask.score_rows=4)
      name=("${common[@]}" --config.case.book="file:$folder/first.txt" --config.case.retain="file:$folder/next.txt"
        --config.memorize.steps=150 --config.memorize.batch_size=32 --config.unlearn.batch_size=32
        --config.unlearn.methods="('ga','whp_relabel')" --config.unlearn.settings.whp_relabel.learning_rate=0.0002
        --config.case.most_questions=30 --config.ask.max_new_tokens=6 --config.ask.score_rows=20)
      for case in verbatim name; do
        declare -n flags="$case"
        relearn plan --config="$here/../configs/whp_$case.py:book" "${flags[@]}" --device=cpu --num_devices=2 \
          --mesh=runs:-1 --memory_gib=10
        relearn audit --config="$here/../configs/whp_$case.py:book" "${flags[@]}" --workdir="$folder/book-$case"
        python "$here/cells.py" --all --scores "$folder/book-$case"
      done
      ;;
    *)
      echo "expected verbatim, name, controls or book, not $part" >&2
      exit 2
      ;;
  esac
done
