#!/usr/bin/env bash
# The GPU's checks and benchmarks, in stages; JSON and logs go to a folder.
#
#   bash benchmarks/gpu.sh FOLDER [--commit HASH] [STAGE]...
#
# Stages, in this order unless some are named: smoke (the CPU's bits), key (the README's table),
# peers, losses (of the head of the demands), profile (counters of the kernels by ncu), heads (losses
# of narrower ones), wide (the sampler's whole grid), tests (pytest). The first two take under 4 minutes with the build. Each has a limit of its own and writes as it
# measures, so that a run that is cut short keeps what it has; one that fails makes the exit code 1,
# and those after it still run. FOLDER is outside of the tree, which would count as changed
# otherwise; HASH is the commit that this tree is a copy of, for a tree without git. It needs a CUDA
# device, Python with torch, triton, transformers, pytest, pytest-xdist, pytest-benchmark, pybind11
# and a C++ compiler, and no network.
set -u
usage() { echo "usage: bash benchmarks/gpu.sh FOLDER [--commit HASH] [STAGE]..." >&2; exit 2; }
[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
commit=
if [[ ${1:-} == --commit ]]; then
  [[ $# -ge 2 ]] || usage
  commit=$2
  shift 2
fi
known=" smoke key peers losses profile heads wide tests "
for stage in "$@"; do [[ $known == *" $stage "* ]] || usage; done
wanted=" ${*:-$known} "
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export COLUMNS=160 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=$(command -v python3 || command -v python)
rows=()
failed=0

# Runs a step for at most so many seconds; its log is in the folder, and the end of it is shown.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  printf '\n=== %s (after %d s)\n' "$name" "$SECONDS"
  timeout -s INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  tail -n 40 "$out/$name.log"
  [[ $code == 0 ]] || failed=1
  rows+=("$(printf '%-14s %4d s  exit code %d' "$name" $((SECONDS - start)) "$code")")
}

# Runs a stage, if it is wanted.
stage() {
  [[ $wanted == *" $1 "* ]] || return 0
  step "$@"
}

# A benchmark of the sampler: its stage, its limit in seconds, its grid.
sampling() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" benchmarks/bench_gpu_sampling.py \
    --minutes "$(awk "BEGIN { print ($limit - 20) / 60 }")" \
    ${commit:+--commit "$commit"} --out "$out/gpu_sampling_$name.json" "$@"
}

# The metadata too: an uninstalled tree has no version.
"$python" -c "import torch, fastadapt" 2>/dev/null ||
  step build 90 "$python" setup.py -q egg_info build_ext --inplace
stage smoke 150 "$python" benchmarks/gpu_smoke.py --out "$out/smoke.jsonl"
sampling key 110 --vocab 128256 --batch 64 512 1 --rows normal3 flat --dtypes float32 bfloat16 \
  --adaptors T+k+p T T+p min-p typical everything --peers --modes "cold, graph" "hot, graph" \
  --rounds 40 --seconds 0.3
sampling peers 150 --vocab 128256 --batch 64 512 1 --rows normal3 --dtypes float32 \
  --adaptors T+k+p T+p --peers flashinfer vllm stock --modes "cold" "cold, graph" \
  --rounds 40 --seconds 0.3 --peer-seconds 1
losses() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" benchmarks/bench_gpu_losses.py --seconds 3 \
    --minutes "$(awk "BEGIN { print ($limit - 42) / 60 }")" \
    ${commit:+--commit "$commit"} --out "$out/gpu_$name.json" --heads "$@"
}
losses losses 150 4096,128256
stage profile 90 ncu --clock-control none --section SpeedOfLight --section LaunchStats \
  --section Occupancy --section SchedulerStats --section WarpStateStats --csv --page raw \
  --log-file "$out/profile.csv" --kernel-name-base function --profile-from-start off \
  "$python" benchmarks/gpu_profile.py
losses heads 150 2048,151936 896,151936
sampling wide 240
stage tests 300 "$python" -m pytest -q -m gpu -n 16 -p no:cacheprovider \
  --override-ini="addopts=--import-mode=importlib --strict-markers -ra" \
  --ignore-glob='tests/test_benchmarks*.py' --ignore=tests/test_cli.py \
  --ignore=tests/test_pretrained.py --ignore=tests/test_preferences.py \
  --ignore=tests/test_gradient_study.py --ignore=tests/test_pair_files.py \
  --ignore=tests/test_readme_training.py --ignore-glob='tests/test_study_*.py' \
  --ignore=tests/test_train.py --ignore=tests/test_training_benchmarks.py

printf '\n=== %s\n' "$out"
for file in "$out"/*.json*; do [[ -e $file ]] && echo "$file"; done
printf '%s\n' "${rows[@]}"
exit "$failed"
