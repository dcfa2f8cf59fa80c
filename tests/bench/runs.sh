#!/bin/sh
# Trains the example configs on this machine's GPU and keeps their metrics as results:
#   tests/bench/runs.sh TEXT OUT [NAME...]     TEXT: tinyshakespeare.txt; OUT: where results go
# NAME: shakespeare_attention shakespeare_gla attention_124m gla_124m; default all.
set -eu
text=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- attention_124m gla_124m shakespeare_attention shakespeare_gla
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | awk '{ print tolower($2) }')
include=$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include
mkdir -p "$out"

for name; do
  case $name in
    *_124m)
      [ -e "$work/t_train.bin" ] ||
        python3 tests/bench/make_token_shards.py "$work/t" $(find "$include/ATen" "$include/c10" -maxdepth 3 -name '*.h' | sort)
      set -- --set data.files="$work/t_train.bin" --set data.valid_files="$work/t_val.bin" --steps 100 \
        --set run.eval_every=0 --set run.final_eval_batches=8 --set checkpoint.every=0 --set run.sample_tokens=0
      ;;
    *) set -- --set data.files="$text" --set checkpoint.every=1000 ;;
  esac
  ./ounce train --config "examples/configs/$name.toml" --out "$work/$name" "$@" >"$out/$name.log" 2>&1
  tail -n 4 "$out/$name.log"
  cp "$work/$name/metrics.jsonl" "$out/run-$name-$gpu.jsonl"
done
