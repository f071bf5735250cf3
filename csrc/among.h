// Log-odds of labels among the ids of their own lists: which pairs of row and id take part, and the
// sums over them. All in one order by one thread, so that the bits are those of any number of them.
#pragma once

#include <cstdint>

namespace fastadapt {

// What is known of N rows; the ids of row r are [offsets[r], offsets[r + 1]), ascending.
struct ListedLabels {
  int64_t n;
  const int64_t* labels;
  const bool* used;  // whose labels are not ignored
  const bool* full;  // that keep every id, and are scored elsewhere
  const int32_t* ids;
  const int64_t* offsets;
};

// The pairs of the rows whose label stands among others of its list.
struct PairsOut {
  int64_t* ids;     // room for as many as there are in all lists
  int64_t* ends;    // (N + 1)
  int64_t* own;     // (N), the place of the label's pair, or -1 in all other rows
  double* without;  // (N), the log-odds of those: infinite, or 0 where they are ignored or full
};

// Returns how many pairs there are.
int64_t pairs_among(const ListedLabels& rows, const PairsOut& out);

// Logits of pairs (ends[N]) and where the labels' are.
struct AmongArgs {
  int64_t n;
  const double* z;
  const int64_t* ends;
  const int64_t* own;
};

// m = z_own - log Σ exp(z_others), (N); `without` in rows without a pair.
void log_odds_among(const AmongArgs& args, const double* without, double* m);

// dz of its pairs, for ∂/∂m of the rows.
void log_odds_among_backward(const AmongArgs& args, const double* dm, double* dz);

}  // namespace fastadapt
