// Rows on threads, and the buffers of each thread.
#pragma once

#include <cstdint>
#include <exception>
#include <new>
#include <type_traits>

#include "kernels.h"

namespace fastadapt {

// The buffers of a thread outlive the call: at V = 128,256 a call touches about 1 MiB of them, and
// fresh pages would cost as much as the kernel.
class ScratchBuffers {
 public:
  ~ScratchBuffers() { release(); }

  const Scratch& of(int64_t v) {
    if (v > capacity_) grow(v);
    return scratch_;
  }

  static ScratchBuffers& of_this_thread() {
    static thread_local ScratchBuffers buffers;
    return buffers;
  }

 private:
  void grow(int64_t v) {
    constexpr size_t kArrays = 15;
    // two vectors of padding, rounded up to lines
    const size_t bytes = (static_cast<size_t>(v) * 4 + 2 * 64 + kLine) / kLine * kLine;
    release();
    memory_ = static_cast<char*>(::operator new(bytes * kArrays, std::align_val_t(kLine)));
    char* next = memory_;
    const auto take = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += bytes;
    };
    Scratch& s = scratch_;
    take(s.row_e), take(s.blocks), take(s.above), take(s.cand_end);
    take(s.list_s), take(s.list_e), take(s.list_id);
    take(s.cand_key), take(s.cand_e), take(s.cand_id);
    take(s.fine_key), take(s.fine_e), take(s.fine_id);
    take(s.ordered), take(s.row_f32);
    capacity_ = v;
  }

  void release() {
    ::operator delete(memory_, std::align_val_t(kLine));
    memory_ = nullptr;
    capacity_ = 0;
  }

  static constexpr size_t kLine = 64;
  char* memory_ = nullptr;
  int64_t capacity_ = 0;
  Scratch scratch_{};
};

#ifdef _OPENMP
inline void run_team(int parts, void (*part)(void*, int), void* context) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int i = 0; i < parts; ++i) part(context, i);
}
#endif

// Runs rows [0, n) on up to num_threads threads: a row on each, or, where that would leave half of
// them idle, one row after the other on all of them, if the kernel can split a row into so many
// parts. With one thread no parallel region is entered: a forked child of a process whose pool has
// run would hang in it. v is the row length that the buffers are for.
template <class Args>
void run_rows(void (*kernel)(const Args&, const Scratch&, int64_t, int64_t), const Args& args,
              int64_t n, int64_t v, [[maybe_unused]] int num_threads,
              [[maybe_unused]] int64_t parts = 1) {
#ifdef _OPENMP
  const int most = num_threads < kMaxTeam ? num_threads : kMaxTeam;
  const int together = parts < most ? static_cast<int>(parts) : most;
  if (n > 0 && together >= 2 * n) {
    const Team team{together, run_team};
    Scratch scratch = ScratchBuffers::of_this_thread().of(v);
    scratch.team = &team;
    return kernel(args, scratch, 0, n);
  }
  const int threads = n < num_threads ? static_cast<int>(n) : num_threads;
  if (threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t r = 0; r < n; ++r) {
      try {
        kernel(args, ScratchBuffers::of_this_thread().of(v), r, r + 1);
      } catch (...) {
#pragma omp critical(fastadapt_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  if (n > 0) kernel(args, ScratchBuffers::of_this_thread().of(v), 0, n);
}

}  // namespace fastadapt
