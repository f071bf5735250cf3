// Two lists of edits as one.
#pragma once

#include "kernels.h"

namespace fastadapt {

// The offsets, (n + 1,), of the lists of both.
void join_offsets(const Edits& first, const Edits& after, int64_t n, int64_t* offsets);

// Fills ids and columns, (4, offsets[n]); returns the place of the first id whose edits do not fit
// into one, or -1.
int64_t join_edits(const Edits& first, const Edits& after, int64_t n, const int64_t* offsets,
                   int32_t* ids, float* columns);

}  // namespace fastadapt
