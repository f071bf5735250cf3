// Arguments of the kernels of a slice: rows whose vocabulary is split over ranks, of which this one
// has ids [first, first + V). Keys are integers by which tokens rank, fastadapt/_ops/sharded: the
// upper 32 bits are an ordered float, the lower 31 fall with the id.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fastadapt {

// P problems, rows.n of them, each a row under the tests of its support: Support of
// fastadapt/_ops/sharded/support.py.
struct SliceArgs {
  Rows rows;
  int64_t first;
  const int64_t* row;    // (P,), the row of each
  const float* inverse;  // (P,), 1 / T
  const float* m;        // (P,), the largest scaled logit of the whole row
  const int64_t* cut;    // (P,)
  const int64_t* least;  // (P, kMassTests)
  const int64_t* guard;  // (P, kMassTests)
  const float* centre;   // (P,)
  const int64_t* band;   // (P,)
};
constexpr int kMassTests = 3;

// Number, mass and surprisal mass of the survivors: all of them, or those from G pivots on.
struct SliceTallyArgs : SliceArgs {
  bool typicality;        // whether pivots are keys by typicality
  int64_t g;              // 0: all of them
  const int64_t* pivots;  // (P, G), ascending; or null
  int64_t* sums;          // (P, 3) or (P, G, 3)
};

// The best survivors with keys below an end, in their order; -1 behind the last.
struct SliceBestArgs : SliceArgs {
  bool typicality;
  const int64_t* end;  // (P,)
  int64_t count;
  float* x;      // (P, count), their logits
  int32_t* ids;  // (P, count)
};

// The best tokens of rows by logit and id, whatever they are, NaN and +inf aside; -1 behind the
// last.
struct SliceTopArgs {
  Rows rows;
  int64_t first;
  int64_t count;
  float* x;      // (N, count)
  int32_t* ids;  // (N, count)
};

// The first survivor by id whose running mass exceeds a target.
struct SliceFindArgs : SliceArgs {
  const int64_t* target;  // (P,), below the mass of the survivors
  float* x;               // (P,), its logit
  int64_t* ids;           // (P,)
};

// The ids of all survivors, a list a problem; none where there are none.
struct SliceListArgs : SliceArgs {
  Supports supports;
};

// The rule's arithmetic on n numbers, for what all ranks decide alike.
struct MassesArgs : Vectors {
  const float* d;  // distances to the largest scaled logit
  int64_t* w;      // their masses
  int64_t* u;      // their surprisal masses
};
struct TargetsArgs : Vectors {
  const int64_t* seeds;
  const int64_t* positions;
  const int64_t* totals;
  int64_t* targets;  // floor(X total / 2^64), X of Philox
};
struct LogsArgs : Vectors {
  const int64_t* masses;
  double* logs;  // ln(mass / 2^40)
};
struct ExpsArgs : Vectors {
  const double* x;  // in [-700, 700]
  double* exps;
};

}  // namespace fastadapt
