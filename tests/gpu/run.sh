#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every GPU test, then the small ones under each tool of compute-sanitizer, and prints one table
# last. Needs a Hopper GPU. Builds the preset cuda-full unless its tests are there already.
#
#   tests/gpu/run.sh [SECONDS_PER_RUN]
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

readonly BIN=build/cuda/bin
readonly LIMIT=${1:-120}
# Too many launches for a sanitizer.
readonly SMALL='-*FourHundred*:*EveryMethod*:*HasTheIntegers*:*EdgeSegments*:*ManyTiles*:*AgreesWith*:*Repeated*:*EveryActivation*:*EveryKernel*:*EveryRank*:*EveryLayout*:*SlicesFrom*:*MatchesOracle*:*GpuBig*'

if ! nvidia-smi -L; then
  echo "tests/gpu/run.sh: no GPU here" >&2
  exit 2
fi
if ! compgen -G "$BIN/*_sm90_test" >/dev/null; then
  cmake --preset cuda-full >/dev/null && cmake --build build/cuda --parallel "$(nproc)" || exit 2
fi

table=""
failed=0

run() {
  local name=$1 log status=0
  shift
  log=$(timeout "$LIMIT" "$@" 2>&1) || status=$?
  if [ "$status" -ne 0 ] || grep -q 'SKIPPED' <<<"$log"; then
    failed=$((failed + 1))
    tail -n 40 <<<"$log"
    table+=$(printf '%-44s FAILED (%d)' "$name" "$status")'\n'
  else
    table+=$(printf '%-44s ok' "$name")'\n'
  fi
}

# The GEMM's oracle takes minutes for all kernels: in parts, so that each keeps to the limit.
readonly GEMM_PARTS=8
for test in "$BIN"/*_sm90_test; do
  name=$(basename "$test")
  if [ "$name" = grouped_gemm_sm90_test ]; then
    for ((part = 0; part < GEMM_PARTS; part++)); do
      run "$name $part/$GEMM_PARTS" env GTEST_TOTAL_SHARDS=$GEMM_PARTS GTEST_SHARD_INDEX=$part "$test"
    done
  else
    run "$name" "$test"
  fi
done
export HOPYARD_TEST_SCALE=small
for tool in memcheck initcheck synccheck racecheck; do
  for test in "$BIN"/*_sm90_test; do
    run "$tool $(basename "$test")" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$test" --gtest_filter="$SMALL"
  done
done
printf '%b' "$table"
echo "$failed failed"
[ "$failed" -eq 0 ]
