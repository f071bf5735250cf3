#!/usr/bin/env bash
# Runs the kernels on threads under ThreadSanitizer:
#   bash tests/native/race.sh [SECONDS [SEED]]
# First two runs that race on purpose, which must be reported. Needs GCC (its OpenMP is wrapped, see
# gomp_edges-inl.h).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:-30} seed=${2:-0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

flags=(-std=c++17 -O1 -g1 -ffp-contract=off -fno-math-errno -fopenmp -fsanitize=thread -Icsrc)
wrap=(-Wl,--wrap=GOMP_parallel
  -Wl,--wrap=GOMP_critical_name_start -Wl,--wrap=GOMP_critical_name_end)
builds=()
for source in csrc/*.cpp tests/native/race_kernels.cpp; do
  [[ $source == *bindings.cpp ]] && continue
  ${CXX:-g++} "${flags[@]}" -c "$source" -o "$work/$(basename "$source").o" &
  builds+=($!)
done
for build in "${builds[@]}"; do wait "$build"; done
${CXX:-g++} "${flags[@]}" "$work"/*.o "${wrap[@]}" -o "$work/race"

export TSAN_OPTIONS=halt_on_error=1:exitcode=66
for canary in 1 2; do
  status=0
  "$work/race" "$seed" 60 $canary >"$work/log" 2>&1 || status=$?
  if [[ $status != 66 ]] || ! grep -q "ThreadSanitizer: data race" "$work/log"; then
    tail -n 30 "$work/log"
    echo "race.sh: expected race $canary, made on purpose, to be reported, got status $status"
    exit 1
  fi
  echo "race $canary, made on purpose: reported in $(grep -o "#0 [^(<]*" "$work/log" | head -1)"
done
"$work/race" "$seed" "$seconds"
