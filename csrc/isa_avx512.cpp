// The kernels for avx512; nothing on other processors, so that every source can always be compiled.
#if defined(__x86_64__) || defined(_M_X64)
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels.h"
#include "slice.h"
#include "vec_types.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), apply_to = function)
#elif defined(__GNUC__)
// GCC 12 takes the undefined operands of its own avx512fintrin.h for mistakes
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#endif

namespace fastadapt {
namespace avx512 {

#include "vec_avx512.h"

#include "all-inl.h"

}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
}  // namespace fastadapt

#endif
