#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher of the kernels: runs nvcc and keeps what ptxas says of each kernel beside the
# object, as OBJECT.ptxas for tools/kernel_resources.py; prints only the rest.
set -uo pipefail

object=""
previous=""
for word in "$@"; do
  if [ "$previous" = "-o" ]; then
    object=$word
  fi
  previous=$word
done
"$@" >"$object.ptxas" 2>&1
status=$?
grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame|^$' "$object.ptxas" >&2
exit "$status"
