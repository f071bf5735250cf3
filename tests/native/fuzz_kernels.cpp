// Fuzzes every function of every kernel table; fuzz.sh builds it. All arrays are exact-size
// allocations, outputs and scratch begin as garbage, outputs must be the same bits on each ISA, and
// all of them must agree with a sort-based form of the rule.
//
//   fuzz_kernels mixed|short FIRST_SEED STEP SECONDS ROWS
//
// takes the seeds FIRST_SEED, FIRST_SEED + STEP, ... until either limit is reached. With `short`,
// three problems of four are batches of 16 to 48 rows of 1 to 64 entries.
#include <chrono>

#include "problems-inl.h"
#include "rule-inl.h"

namespace {

// One table on all rows, with one set of buffers.
Arrays run(const KernelTable& table, const Problem& p) {
  Arrays buffers;
  const auto f = [&] { return buffers.add<float>("", (p.v + 15) / 16 * 16 + 16); };
  const auto i = [&] { return reinterpret_cast<int32_t*>(f()); };
  const auto l = [&] { return reinterpret_cast<int64_t*>(f()); };
  const Scratch scratch{f(), l(), l(), l(), f(), f(), i(), f(),
                        f(), i(), f(), f(), i(), f(), f(), nullptr};
  return outputs(table, p,
                 [&](auto kernel, const auto& args) { kernel(args, scratch, 0, args.rows.n); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return std::puts("expected: mixed|short FIRST_SEED STEP SECONDS ROWS"), 2;
  const bool short_rows = !std::strcmp(argv[1], "short");
  const uint64_t step = std::strtoull(argv[3], nullptr, 10);
  const std::chrono::duration<double> limit(std::atof(argv[4]));
  const int64_t enough = std::atoll(argv[5]);
  const auto start = std::chrono::steady_clock::now();
  int64_t rows = 0, elements = 0, bad = 0;
  for (uint64_t seed = std::strtoull(argv[2], nullptr, 10);
       std::chrono::steady_clock::now() - start < limit && rows < enough && bad < 20;
       seed += step) {
    rng.seed(seed);
    const Lengths mixed = one_in(400) ? Lengths::kLong : Lengths::kAll;
    const Problem p(short_rows && !one_in(4) ? Lengths::kShort : mixed);
    rows += p.n;
    elements += p.n * p.v;
    Arrays first;
    const auto report = [&](const char* who, const char* what) {
      if (!what) return;
      std::printf("%s: %s differs at seed %llu (%s)\n", who, what,
                  static_cast<unsigned long long>(seed), argv[1]);
      ++bad;
    };
    for (const char* const* isa = cpu_capabilities(); *isa; ++isa) {
      set_cpu_capability(*isa);
      Arrays o = run(kernels(), p);
      if (first.all.empty()) {
        first = std::move(o);
      } else {
        report(*isa, o.differs_from(first));
      }
    }
    report("rule", differs_from_rule(p, first));
  }
  std::printf("%lld rows, %lld elements, %lld differences\n", static_cast<long long>(rows),
              static_cast<long long>(elements), static_cast<long long>(bad));
  return bad != 0;
}
