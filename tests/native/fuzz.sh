#!/ usr / bin / env bash
#Builds the kernels under the address and undefined - behaviour sanitizers and fuzzes them:
#bash tests / native / fuzz.sh[SECONDS[SEED]]
#A failing seed is printed; run again with it to see it first.
set - euo pipefail cd "$(dirname " $ { BASH_SOURCE[0] }")/../.."
seconds=${1:-60} seed=${2:-0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sources=(csrc/dispatch.cpp csrc/isa_scalar.cpp tests/native/fuzz_kernels.cpp)
[[ $(uname -m) == x86_64 ]] && sources+=(csrc/isa_avx2.cpp csrc/isa_avx512.cpp)
flags=(-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -Icsrc
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
for source in "${sources[@]}";
do $ {
  CXX:
    -g++
  }
"${flags[@]}" - c "$source" - o "$work/$(basename " $source ").o" done $ {
CXX:
  -g++
}
"${flags[@]}"
    "$work"/*.o -o "$work/fuzz"
"$work/fuzz" "$seed" "$seconds"
