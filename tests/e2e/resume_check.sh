#!/bin/sh
# Resumed equals uninterrupted, bit for bit, on the device given: resume_check.sh DEVICE [PROGRAM]
# 40 steps at once against 20 and then 20 more; cosine and warm-up, dropout 0.1, accumulate 2, gla and
# attention; fp32 and bf16 compute.
set -eu
device=$1
program=${2:-./ounce}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for compute in fp32 bf16; do
  for run in "A none 40" "B none 20" "B auto 40"; do
    set -- $run
    $program train --config examples/configs/hybrid_tiny.toml --device "$device" --quiet --set precision.compute=$compute \
      --set run.steps=40 --set run.final_eval_batches=4 --out "$work/$compute-$1" --resume "$2" --steps "$3"
  done
  $program ckpt diff "$work/$compute-A" "$work/$compute-B"
done
