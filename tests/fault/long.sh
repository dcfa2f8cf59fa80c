#!/bin/sh
# SPDX-License-Identifier: MIT
# The long forms of tests that ./ounce test runs for seconds.
#
#   tests/fault/long.sh fuzz [SECONDS]    hostile manifests and headers, 600 s each, under libFuzzer
#   tests/fault/long.sh corpus            what fuzz found so far, minimised into tests/fault/corpus
#   tests/fault/long.sh kill [KILLS]      1000 kills of a writer     (after ./ounce test, which builds)
#   tests/fault/long.sh flips [FLIPS]     10000 flipped bits         (the same)
#
# --json FILE before the rest appends a line for each result. Exit code 1 where a test fails.
set -eu
json=/dev/null
[ "${1:-}" != --json ] || { json=$(readlink -f -- "$2") && shift 2; }
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
build=$root/build-fuzz
formats='manifest safetensors'
version="ounce $(sed -n 's/^project(ounce VERSION \([^ ]*\).*/\1/p' "$root/CMakeLists.txt")"
commit=${OUNCE_COMMIT:-$(git -C "$root" describe --always --dirty)}
status=0

# T FIELDS: a result, with where and when it was measured.
record() {
  printf '{"t":"%s",%s,"device":"%s","version":"%s","commit":"%s","date":"%s"}\n' "$1" "$2" \
    "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)" "$version" "$commit" \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" |
    tee -a "$json"
}

# [FLAG...]
build_targets() {
  # The runtime of the sanitizers is a package of its own.
  mkdir -p "$build/include/ounce"
  echo 'int LLVMFuzzerTestOneInput() { return 0; }' >"$build/empty.c"
  clang -fsanitize=fuzzer,address,undefined "$build/empty.c" -o "$build/empty" 2>/dev/null || {
    echo 'long.sh: libFuzzer is missing; run: sudo apt-get install clang libclang-rt-14-dev' >&2
    exit 4
  }
  version="$version, $(clang++ --version | head -n 1)"
  ln -sfn "$root/ckpt" "$build/include/ounce/ckpt"
  for format in $formats; do
    clang++ -std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined \
      -fno-sanitize-recover=undefined "$@" -I"$build/include" -isystem "$root/.deps/include" \
      "$root/tests/fault/fuzz/fuzz_$format.cpp" "$root/tests/fault/fuzz/fuzz.cpp" \
      "$root"/ckpt/manifest.cpp "$root"/ckpt/names.cpp "$root"/ckpt/sums.cpp \
      "$root"/ckpt/safetensors.cpp "$root"/ckpt/file_system.cpp -o "$build/fuzz_$format"
  done
}

# The last number that libFuzzer printed behind WORD; 0 where it never did.
last_of() { sed -n "s/.*$1: *\([0-9]*\).*/\1/p" "$log" | awk '{ last = $1 } END { print last + 0 }'; }

fuzz() {
  seconds=${1:-600}
  build_targets
  for format in $formats; do
    log=$build/$format.log found=$build/found/$format
    rm -rf "$found" && mkdir -p "$build/corpus/$format" "$found"
    "$build/fuzz_$format" "$build/corpus/$format" "$root/tests/fault/corpus/$format" \
      -dict="$root/tests/fault/fuzz/$format.dict" -max_len=8192 -timeout=10 -malloc_limit_mb=16 \
      -rss_limit_mb=1024 -max_total_time="$seconds" -artifact_prefix="$found/" -print_final_stats=1 \
      >"$log" 2>&1 || { status=1 && tail -n 40 "$log" && echo "inputs that fail: $found" >&2; }
    crashes=$(find "$found" -type f | wc -l)
    record fuzz "\"target\":\"$format\",\"seconds\":$seconds,\"executions\":$(last_of executed_units),\"coverage\":$(
      last_of ' cov'),\"features\":$(last_of ' ft'),\"crashes\":$crashes"
  done
}

# Inputs with a name are ours and stay; of the others those that reach more of our own code.
corpus() {
  mkdir -p "$build"
  printf 'src:*\nfun:*5ounce4ckpt*\n' >"$build/our_code"
  build_targets -fno-sanitize-coverage=stack-depth -fsanitize-coverage-allowlist="$build/our_code"
  for format in $formats; do
    tracked=$root/tests/fault/corpus/$format minimal=$build/minimal
    rm -rf "$minimal" && mkdir -p "$minimal" "$build/corpus/$format"
    find "$tracked" -type f -regextype posix-extended ! -regex '.*/[0-9a-f]{40}' -exec cp {} "$minimal" \;
    "$build/fuzz_$format" -set_cover_merge=1 -use_counters=0 -max_len=8192 "$minimal" "$tracked" "$build/corpus/$format"
    rm -f "$tracked"/* && mv "$minimal"/* "$tracked"
  done
}

# NAME COUNT PROGRAM FILTER VARIABLE
repeat() {
  start=$(date +%s) failures=0
  env "$5=$2" "$root/build/tests/$3" --gtest_filter="$4" || { failures=1 && status=1; }
  record "$1" "\"count\":$2,\"seconds\":$(($(date +%s) - start)),\"failures\":$failures"
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  fuzz) fuzz "$@" ;;
  corpus) corpus ;;
  kill) repeat kill "${1:-1000}" test_fault 'Kill.*' OUNCE_KILLS ;;
  flips) repeat flips "${1:-10000}" test_ckpt Damage.EveryFlippedBitIsSeen OUNCE_FLIPS ;;
  *) sed -n '3,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
exit $status
