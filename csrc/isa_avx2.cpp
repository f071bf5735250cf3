// The kernels for avx2; nothing on other processors, so that every source can always be compiled.
#if defined(__x86_64__) || defined(_M_X64)
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "kernels.h"
#include "vec_types.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace fastadapt {
namespace avx2 {

#include "vec_avx2.h"

#include "all-inl.h"

}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

extern const KernelTable kAvx2Kernels = {"avx2",
                                         avx2::filter_rows,
                                         avx2::sample_rows,
                                         avx2::score_rows,
                                         avx2::log_odds_rows,
                                         avx2::log_odds_backward_rows,
                                         avx2::label_log_odds_rows,
                                         avx2::label_log_odds_backward_rows,
                                         avx2::candidate_rows,
                                         avx2::candidate_backward_rows,
                                         avx2::tile_rows,
                                         avx2::tile_backward_rows,
                                         avx2::mix_rows,
                                         avx2::scatter_rows,
                                         avx2::dot_rows};
}  // namespace fastadapt

#endif
