// The kernels for any processor.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vec_types.h"

namespace fastadapt {
namespace scalar {

#include "vec_scalar.h"

#include "all-inl.h"

}  // namespace scalar
extern const KernelTable kScalarKernels = {"scalar",
                                           scalar::filter_rows,
                                           scalar::sample_rows,
                                           scalar::score_rows,
                                           scalar::log_odds_rows,
                                           scalar::log_odds_backward_rows,
                                           scalar::label_log_odds_rows,
                                           scalar::label_log_odds_backward_rows,
                                           scalar::candidate_rows,
                                           scalar::candidate_backward_rows,
                                           scalar::tile_rows,
                                           scalar::tile_backward_rows,
                                           scalar::mix_rows,
                                           scalar::scatter_rows,
                                           scalar::dot_rows};
}  // namespace fastadapt
