#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every GPU test, of C++ and of Python, then the small ones of C++ under each tool of
# compute-sanitizer, several processes at a time, and prints one table last; fails where a test did.
# Needs a Hopper GPU. Takes the tests that lie in build/cuda, built there or carried from another
# machine; where there are none it builds the preset cuda-full.
#
#   tests/gpu/run.sh [SECONDS_PER_PROCESS]
#
# PYTHON: of the Python tests (.venv/bin/python, else python3). SANITIZERS: tools, "" for none.
# ONLY: lines of the table to run, as a regular expression ('^memcheck-', '^test_'), where a machine
# is not lent for as long as all of them take. BUDGET: seconds after which what runs is stopped and
# nothing more begins; the table says "not run" of the rest, and the script fails.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

readonly BIN=build/cuda/bin
readonly LIMIT=${1:-300}
# Of a test of C++; as many processes run at a time. Oracles on the CPU are most of their time.
readonly SHARDS=$(($(nproc) / 2 > 6 ? $(nproc) / 2 : 6))
readonly SANITIZERS=${SANITIZERS-memcheck initcheck synccheck racecheck}
readonly ONLY=${ONLY-}
readonly BUDGET=${BUDGET:-0} # 0: none
# Too many launches for a sanitizer.
readonly SMALL='-*FourHundred*:*EveryMethod*:*HasTheIntegers*:*HasTheBitsOfSeparate*:*EdgeSegments*:*ModelSizes*:*ManyTiles*:*AgreesWith*:*Repeated*:*EveryActivation*:*EveryKernel*:*EveryRank*:*EveryLayout*:*SlicesFrom*:*MatchesOracle*:*GpuBig*'
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

if ! nvidia-smi -L 2>/dev/null; then
  echo "tests/gpu/run.sh: no GPU here (nvidia-smi lists none); run it on a machine with a Hopper GPU" >&2
  exit 2
fi
if ! compgen -G "$BIN/*_sm90_test" >/dev/null; then
  cmake --preset cuda-full && cmake --build build/cuda --parallel "$(nproc)" || exit 2
fi

logs=$(mktemp -d)
readonly logs
trap 'rm -rf "$logs"' EXIT
groups=() # lines of the table: each has processes GROUP.0, GROUP.1, ..

# Runs a command as process $2 of group $1 when a place is free.
start() {
  local log=$logs/$1.$2
  shift 2
  while [ "$(jobs -rp | wc -l)" -ge "$SHARDS" ]; do
    wait -n
  done
  local limit=$LIMIT cut=""
  if [ "$BUDGET" -gt 0 ] && [ $((BUDGET - SECONDS)) -lt "$limit" ]; then
    limit=$((BUDGET - SECONDS))
    cut=yes
  fi
  if [ "$BUDGET" -gt 0 ] && [ "$limit" -le 0 ]; then
    echo "not run" | tee "$log.log" >"$log.status"
    return
  fi
  {
    timeout -k 10 "$limit" "$@" >"$log.log" 2>&1
    local status=$?
    case $cut$status in yes124 | yes137) status="not run" ;; esac
    echo "$status" >"$log.status"
  } &
}

# Starts all shards of a test of C++, or the whole test by itself where it fills the memory.
shards() {
  local group=$1 shard
  shift
  [[ $group =~ $ONLY ]] || return 0
  groups+=("$group")
  case $group in
    *big_sm90_test)
      wait
      start "$group" 0 "$@"
      wait
      ;;
    *)
      for ((shard = 0; shard < SHARDS; shard++)); do
        start "$group" "$shard" env GTEST_TOTAL_SHARDS="$SHARDS" GTEST_SHARD_INDEX="$shard" "$@"
      done
      ;;
  esac
}

# Starts the Python tests that know of GPUs, or says in `skipped` why none of them can run.
python_tests() {
  local python=${PYTHON:-.venv/bin/python} library=$PWD/build/cuda/libhopyard_ffi.so why test
  [ -x "$python" ] || python=$(command -v "${PYTHON:-python3}") || python=""
  if [ -z "$python" ]; then
    skipped="no Python here; name one with PYTHON="
    return
  elif [ ! -f "$library" ]; then
    skipped="no $library"
    return
  fi
  export HOPYARD_LIBRARY=$library HOPYARD_BIN=$PWD/$BIN/hopyard PYTHONPATH=python:tests/python
  if ! why=$("$python" -c 'import pytest, devices; print(devices.why_no_gpu())' 2>&1) || [ -n "$why" ]; then
    skipped=${why##*$'\n'}
    return
  fi
  for test in tests/python/test_*.py; do
    if [[ ${test##*/} =~ $ONLY ]] && grep -qE 'cuda|needs_gpu|DEVICES' "$test"; then
      groups+=("$(basename "$test")")
      start "$(basename "$test")" 0 "$python" -m pytest -q "$test"
    fi
  done
}

# One line: what became of a group's processes, by exit status (124: it took too long). The logs of
# those that failed.
report() {
  local group=$1 log status bad="" unrun=""
  for log in "$logs/$group".*.log; do
    status=$(cat "${log%.log}.status")
    if grep -q 'no Hopper GPU here' "$log"; then
      status="finds no GPU"
    fi
    # 5: pytest, where a module skips all of its tests.
    if [ "$status" = "not run" ]; then
      unrun=yes
    elif [ "$status" != 0 ] && [ "$status" != 5 ]; then
      tail -n 40 "$log"
      bad+=", $status"
    fi
  done
  if [ -n "$bad" ]; then
    failed=$((failed + 1))
    table+=$(printf '%-44s FAILED: %s' "$group" "${bad#, }")$'\n'
  elif [ -n "$unrun" ]; then
    unfinished=$((unfinished + 1))
    table+=$(printf '%-44s not run, or not all of it: BUDGET=%s' "$group" "$BUDGET")$'\n'
  elif grep -hq 'SKIPPED' "$logs/$group".*.log; then
    table+=$(printf '%-44s ok, but skipped: %s' "$group" \
      "$(grep -hA1 ': Skipped' "$logs/$group".*.log | grep -v ': Skipped' | head -n 1)")$'\n'
  else
    table+=$(printf '%-44s ok %s' "$group" "$(grep -hoE '^[0-9]+ (passed|skipped).*' "$logs/$group".*.log)")$'\n'
  fi
}

table=""
failed=0
unfinished=0
skipped=""
for test in "$BIN"/*_sm90_test; do
  shards "$(basename "$test")" "$test"
done
python_tests
wait
export HOPYARD_TEST_SCALE=small
for tool in $SANITIZERS; do
  for test in "$BIN"/*_sm90_test; do
    shards "$tool-$(basename "$test")" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$test" --gtest_filter="$SMALL"
  done
done
wait
for group in "${groups[@]}"; do
  report "$group"
done
if [ "${#groups[@]}" -eq 0 ]; then
  echo "tests/gpu/run.sh: nothing to run with ONLY='$ONLY'${skipped:+; Python tests: $skipped}" >&2
  exit 2
fi
printf '%s' "$table"
[ -z "$skipped" ] || printf '%-44s SKIPPED: %s\n' "Python tests" "$skipped"
echo "$failed failed, $unfinished not run"
[ "$failed" -eq 0 ] && [ "$unfinished" -eq 0 ]
