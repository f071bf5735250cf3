// Races between the threads of a call and between calls; race.sh builds it under ThreadSanitizer.
// Several threads call run_rows at once, each with several OpenMP threads, while one more changes
// the instruction set; every output must be the bits that one thread gives.
//
//   race_kernels FIRST_SEED SECONDS [0|1|2]
//
// The third argument makes the kernels race on purpose, so that race.sh can see it reported: 1, the
// threads of a call share one set of buffers; 2, two calls share one array of outputs.
#include <atomic>
#include <chrono>
#include <thread>

#include "gomp_edges-inl.h"
#include "parallel.h"
#include "problems-inl.h"

namespace {

constexpr int kCallers = 3;

// One set of buffers for all threads, and a kernel that uses it instead of its own.
Scratch shared_buffers;
template <class Args>
using Kernel = void (*)(const Args&, const Scratch&, int64_t, int64_t);
template <class Args>
Kernel<Args> real_kernel;
template <class Args>
void kernel_on_shared_buffers(const Args& args, const Scratch&, int64_t begin, int64_t end) {
  real_kernel<Args>(args, shared_buffers, begin, end);
}

Arrays on_threads(const Problem& p, int threads) {
  return outputs(kernels(), p, [&](auto kernel, const auto& args) {
    run_rows(kernel, args, args.rows.n, p.v, threads, p.v / kLeastPart);
  });
}

// A row that cannot get its buffers, while others are at work: the call throws, once.
bool passes_on_a_throw(const Problem& p) {
  const FilterArgs args{{p.logits.get(), p.dtype, p.n, p.v, p.stride}, p.knobs[0], {}, nullptr};
  const Kernel<FilterArgs> out_of_memory = [](const FilterArgs&, const Scratch&, int64_t begin,
                                              int64_t) {
    if (begin % 3 == 0) throw std::bad_alloc();
  };
  try {
    run_rows(out_of_memory, args, p.n, p.v, 4);
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

// The calls of one thread: every problem, with 1 to 5 threads each.
void call(const std::vector<Problem>& problems, const std::vector<Arrays>& wanted, size_t caller,
          std::atomic<int64_t>* calls, std::atomic<int64_t>* bad) {
  rng.seed(caller);  // for the garbage in the outputs
  for (size_t i = 0; i < problems.size(); ++i) {
    const size_t j = (i * 5 + caller * 3) % problems.size();
    const int threads = 1 + static_cast<int>((i + caller) % 5);
    const Arrays got = on_threads(problems[j], threads);
    if (const char* what = got.differs_from(wanted[j])) {
      std::printf("%s differs on %d threads\n", what, threads);
      ++*bad;
    }
    ++*calls;
  }
  if (passes_on_a_throw(problems[1])) return;
  std::puts("a kernel threw and the call did not");
  ++*bad;
}

void race_on_buffers(const Problem& p) {
  ScratchBuffers buffers;
  shared_buffers = buffers.of(p.v);
  outputs(kernels(), p, [&](auto kernel, const auto& args) {
    using Args = std::decay_t<decltype(args)>;
    real_kernel<Args> = kernel;
    run_rows<Args>(kernel_on_shared_buffers<Args>, args, args.rows.n, p.v, 4);
  });
}

void race_on_outputs(const Problem& p) {
  outputs(kernels(), p, [&](auto kernel, const auto& args) {
    std::thread other([&] { run_rows(kernel, args, args.rows.n, p.v, 1); });
    run_rows(kernel, args, args.rows.n, p.v, 1);
    other.join();
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::puts("expected: FIRST_SEED SECONDS [0|1|2]"), 2;
  uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const std::chrono::duration<double> limit(std::atof(argv[2]));
  const int canary = argc > 3 ? std::atoi(argv[3]) : 0;
  const auto start = std::chrono::steady_clock::now();
  std::atomic<int64_t> calls{0}, bad{0};
  for (; std::chrono::steady_clock::now() - start < limit && !bad; ++seed) {
    rng.seed(seed);
    std::vector<Problem> problems;
    std::vector<Arrays> wanted;
    // rows fewer than the threads, and more; every fourth set has a long row
    for (int i = 0; i < 7; ++i)
      problems.emplace_back(i == 0 && seed % 4 == 0 ? Lengths::kLong
                            : i < 3                 ? Lengths::kShort
                                                    : Lengths::kAll);
    if (canary) {
      for (const Problem& p : problems) canary == 1 ? race_on_buffers(p) : race_on_outputs(p);
      continue;
    }
    for (const Problem& p : problems) wanted.push_back(on_threads(p, 1));
    std::atomic<bool> done{false};
    std::thread switcher([&] {
      const char* const* const names = cpu_capabilities();
      for (const char* const* isa = names; !done; isa = isa[1] ? isa + 1 : names) {
        set_cpu_capability(*isa);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
    std::vector<std::thread> callers;
    for (size_t c = 0; c < kCallers; ++c)
      callers.emplace_back(call, std::cref(problems), std::cref(wanted), c, &calls, &bad);
    for (std::thread& caller : callers) caller.join();
    done = true;
    switcher.join();
  }
  std::printf("%lld problems, %lld differences\n", static_cast<long long>(calls),
              static_cast<long long>(bad));
  return bad != 0;
}
