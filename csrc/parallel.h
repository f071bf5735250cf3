// Rows on threads, and the buffers of each thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#include "kernels.h"

namespace fastadapt {

// The buffers of a thread outlive the call: at V = 128,256 a call touches about 1 MiB of them, and
// fresh pages would cost as much as the kernel.
class ScratchBuffers {
 public:
  ~ScratchBuffers() { std::free(memory_); }

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
    constexpr size_t kLine = 64, kArrays = 12;
    // two vectors of padding, rounded up to lines
    const size_t bytes = (static_cast<size_t>(v) * 4 + 2 * 64 + kLine) / kLine * kLine;
    std::free(memory_);
    capacity_ = 0;
    memory_ = static_cast<char*>(std::aligned_alloc(kLine, bytes * kArrays));
    if (!memory_) throw std::bad_alloc();
    char* at[kArrays];
    for (size_t i = 0; i < kArrays; ++i) at[i] = memory_ + i * bytes;
    auto floats = [&](int i) { return reinterpret_cast<float*>(at[i]); };
    auto ints = [&](int i) { return reinterpret_cast<int32_t*>(at[i]); };
    scratch_ = {floats(0), reinterpret_cast<int64_t*>(at[1]),
                floats(2), floats(3),
                ints(4),   floats(5),
                floats(6), ints(7),
                floats(8), floats(9),
                ints(10),  floats(11)};
    capacity_ = v;
  }

  char* memory_ = nullptr;
  int64_t capacity_ = 0;
  Scratch scratch_{};
};

// Runs rows [0, n) on up to num_threads threads. With one thread no parallel region is entered: a
// forked child of a process whose pool has run would hang in it.
template <class Args>
void run_rows(void (*kernel)(const Args&, const Scratch&, int64_t, int64_t), const Args& args,
              int64_t n, int64_t v, [[maybe_unused]] int num_threads) {
#ifdef _OPENMP
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
