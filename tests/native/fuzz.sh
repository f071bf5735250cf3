#!/usr/bin/env bash
# Fuzzes the kernels of every instruction set that this processor has:
#   bash tests/native/fuzz.sh [SECONDS [SEED]]      under the address and undefined-behaviour
#                                                   sanitizers, rows of up to 266,240 entries
#   bash tests/native/fuzz.sh --rows ROWS [SEED]    optimised, without sanitizers, most rows of 1 to
#                                                   64 entries, a process for each core
# A failing seed is printed; run again with it to see it first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ ${1:-} == --rows ]]; then
  rows=${2:?expected a number of rows} seed=${3:-0} seconds=1e9 lengths=short jobs=$(nproc)
  checks=(-O3)
else
  rows=1000000000000000 seed=${2:-0} seconds=${1:-60} lengths=mixed jobs=1
  checks=(-O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
fi

flags=(-std=c++17 -ffp-contract=off -fno-math-errno -Icsrc "${checks[@]}")
builds=()
for source in csrc/*.cpp tests/native/fuzz_kernels.cpp; do
  [[ $source == *bindings.cpp ]] && continue
  ${CXX:-g++} "${flags[@]}" -c "$source" -o "$work/$(basename "$source").o" &
  builds+=($!)
done
for build in "${builds[@]}"; do wait "$build"; done
${CXX:-g++} "${flags[@]}" "$work"/*.o -o "$work/fuzz"

processes=()
for ((i = 0; i < jobs; ++i)); do
  "$work/fuzz" $lengths $((seed + i)) $jobs $seconds $(((rows + jobs - 1) / jobs)) &
  processes+=($!)
done
failed=0
for process in "${processes[@]}"; do wait "$process" || failed=1; done
exit $failed
