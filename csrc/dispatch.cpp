// The choice of an ISA: once, by CPUID, when the first kernel is asked for.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace fastadapt {
namespace {

struct Supported {
  const KernelTable* tables[3];
  const char* names[4];
  int n = 0;

  Supported() {
    offer(&kScalarKernels);
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    // every processor with AVX2 has F16C, which older compilers cannot ask for
    const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2) offer(&kAvx2Kernels);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      offer(&kAvx512Kernels);
#endif
    names[n] = nullptr;
  }

  void offer(const KernelTable* table) {
    tables[n] = table;
    names[n++] = table->name;
  }
};

const Supported& supported() {
  static const Supported found;
  return found;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{supported().tables[supported().n - 1]};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

const char* const* cpu_capabilities() { return supported().names; }

bool set_cpu_capability(const char* name) {
  for (int i = 0; i < supported().n; ++i) {
    if (std::strcmp(supported().names[i], name)) continue;
    current().store(supported().tables[i], std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace fastadapt
