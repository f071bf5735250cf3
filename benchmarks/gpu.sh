#!/usr/bin/env bash
# Builds in place, runs the GPU tests and the GPU benchmarks; their JSON and logs go to a folder.
#
#   bash benchmarks/gpu.sh FOLDER [COMMIT]
#
# FOLDER is outside of the tree, which would count as changed otherwise. COMMIT is the one that this
# tree is a copy of, for a tree without git. It needs a CUDA device, Python with torch, triton,
# transformers, pytest, pytest-benchmark, pybind11 and a C++ compiler, and no network; it ends in
# under 9 minutes. A step that fails makes the exit code 1, and the steps after it still run.
set -u
[[ $# == 1 || $# == 2 ]] || { echo "usage: bash benchmarks/gpu.sh FOLDER [COMMIT]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
commit=${2:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export COLUMNS=160 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=$(command -v python3 || command -v python)
rows=()
failed=0

# Runs a step for at most so many seconds; its log is in the folder, and the end of it is shown.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  printf '\n=== %s (after %d s)\n' "$name" "$SECONDS"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  tail -n 40 "$out/$name.log"
  [[ $code == 0 ]] || failed=1
  rows+=("$(printf '%-14s %4d s  exit code %d' "$name" $((SECONDS - start)) "$code")")
}

step build 90 "$python" setup.py build_ext --inplace
# In one process, for the one device. Without the modules that need packages besides the list above;
# they have no test for a GPU.
step gpu_tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider \
  --override-ini="addopts=--import-mode=importlib --strict-markers -ra" \
  --ignore=tests/test_benchmarks.py --ignore=tests/test_cli.py --ignore=tests/test_pretrained.py \
  --ignore=tests/test_preferences.py
# A benchmark leaves cells out that do not fit its share of what is left, three fifths and the rest;
# its last cell may take a minute.
measure() {
  local name=$1 left=$2
  step "gpu_$name" "$left" "$python" "benchmarks/bench_gpu_$name.py" \
    --minutes "$(awk "BEGIN { print ($left - 50) / 60 }")" \
    ${commit:+--commit "$commit"} --out "$out/gpu_$name.json"
}
measure sampling $(((515 - SECONDS) * 3 / 5))
measure losses $((515 - SECONDS))

printf '\n=== %s\n' "$out"
for file in "$out"/*.json; do [[ -e $file ]] && echo "$file"; done
printf '%s\n' "${rows[@]}"
exit "$failed"
