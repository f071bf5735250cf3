// The choice of an ISA: once, by CPUID, when the first kernel is asked for.
#include <atomic>
#include <cstring>

#include "kernels.h"

// Every ISA, worst first: the namespace of its kernels, and whether this processor can run them.
#define FASTADAPT_ISAS(ISA) ISA(scalar, true) FASTADAPT_X86_ISAS(ISA)
#if defined(__x86_64__) || defined(_M_X64)
#include "x86_features.h"
#define FASTADAPT_X86_ISAS(ISA) ISA(avx2, has_avx2()) ISA(avx512, has_avx512())
#else
#define FASTADAPT_X86_ISAS(ISA)
#endif

namespace fastadapt {

#define FASTADAPT_DECLARE(isa, here) \
  namespace isa {                    \
  extern const KernelTable kTable;   \
  }
FASTADAPT_ISAS(FASTADAPT_DECLARE)

namespace {

#define FASTADAPT_COUNT(isa, here) +1
constexpr int kIsas = FASTADAPT_ISAS(FASTADAPT_COUNT);

struct Supported {
  const KernelTable* tables[kIsas];
  const char* names[kIsas + 1];
  int n = 0;

  Supported() {
#define FASTADAPT_OFFER(isa, here) \
  if (here) offer(#isa, &isa::kTable);
    FASTADAPT_ISAS(FASTADAPT_OFFER)
    names[n] = nullptr;
  }

  void offer(const char* name, const KernelTable* table) {
    tables[n] = table;
    names[n++] = name;
  }
};

const Supported& supported() {
  static const Supported found;
  return found;
}

// The place of the one in use.
std::atomic<int>& current() {
  static std::atomic<int> place{supported().n - 1};
  return place;
}

}  // namespace

const KernelTable& kernels() {
  return *supported().tables[current().load(std::memory_order_relaxed)];
}

const char* cpu_capability() {
  return supported().names[current().load(std::memory_order_relaxed)];
}

const char* const* cpu_capabilities() { return supported().names; }

bool set_cpu_capability(const char* name) {
  for (int i = 0; i < supported().n; ++i) {
    if (std::strcmp(supported().names[i], name)) continue;
    current().store(i, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace fastadapt
