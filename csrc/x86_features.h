// What an x86-64 processor and its operating system can run, asked of them directly: the compilers'
// own answer, __builtin_cpu_supports, needs a library that clang-cl does not link.
#pragma once

#include <cstdint>

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace fastadapt {

struct CpuId {
  uint32_t eax, ebx, ecx, edx;
};

inline CpuId cpuid(uint32_t leaf) {
  CpuId r{};
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (static_cast<uint32_t>(words[0]) < leaf) return r;
  __cpuidex(words, static_cast<int>(leaf), 0);
  r = {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]),
       static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3])};
#else
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros beyond the last leaf
#endif
  return r;
}

// The registers that the operating system saves, XCR0; the instruction is written in bytes, which
// needs no flag of the compiler.
inline uint32_t saved_registers() {
  const uint32_t kOsxsave = 1u << 27;
  if (!(cpuid(1).ecx & kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// AVX2 and F16C, and registers of 256 bits.
inline bool has_avx2() {
  constexpr uint32_t kF16c = 1u << 29, kAvx = 1u << 28, kAvx2 = 1u << 5, kSaved = 0x6;
  const uint32_t basic = cpuid(1).ecx, extended = cpuid(7).ebx;
  return (basic & kF16c) && (basic & kAvx) && (extended & kAvx2) &&
         (saved_registers() & kSaved) == kSaved;
}

// AVX-512 F, DQ, BW and VL, and registers of 512 bits with their masks.
inline bool has_avx512() {
  constexpr uint32_t kAll = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, kSaved = 0xe6;
  return has_avx2() && (cpuid(7).ebx & kAll) == kAll && (saved_registers() & kSaved) == kSaved;
}

}  // namespace fastadapt
