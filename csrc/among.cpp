#include "among.h"

#include <cmath>
#include <limits>

namespace fastadapt {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// The largest of the others, 0 where there is none but -inf, and their mass over it.
struct Others {
  double top, mass;
};

Others others_of(const AmongArgs& a, int64_t r) {
  double top = -kInf;
  for (int64_t k = a.ends[r]; k < a.ends[r + 1]; ++k)
    if (k != a.own[r] && a.z[k] > top) top = a.z[k];
  if (top == -kInf) top = 0;
  double mass = 0;  // NaN if one of them is
  for (int64_t k = a.ends[r]; k < a.ends[r + 1]; ++k)
    if (k != a.own[r]) mass += std::exp(a.z[k] - top);
  return {top, mass};
}

}  // namespace

int64_t pairs_among(const ListedLabels& rows, const PairsOut& out) {
  int64_t count = 0;
  out.ends[0] = 0;
  for (int64_t r = 0; r < rows.n; ++r) {
    const int64_t first = rows.offsets[r], last = rows.offsets[r + 1];
    int64_t own = -1;
    if (rows.used[r])
      for (int64_t k = first; k < last && own < 0; ++k)
        if (rows.ids[k] == rows.labels[r]) own = k;
    out.own[r] = -1;
    out.without[r] = rows.used[r] && !rows.full[r] ? (own < 0 ? -kInf : kInf) : 0;
    if (own >= 0 && last - first > 1) {
      out.own[r] = count + own - first;
      for (int64_t k = first; k < last; ++k) out.ids[count++] = rows.ids[k];
    }
    out.ends[r + 1] = count;
  }
  return count;
}

void log_odds_among(const AmongArgs& a, const double* without, double* m) {
  for (int64_t r = 0; r < a.n; ++r) {
    if (a.own[r] < 0) {
      m[r] = without[r];
      continue;
    }
    const double own = a.z[a.own[r]];
    const Others others = others_of(a, r);
    const bool alone = others.mass == 0 && !std::isnan(own);
    m[r] = alone ? kInf : own - (others.top + std::log(others.mass));
  }
}

void log_odds_among_backward(const AmongArgs& a, const double* dm, double* dz) {
  for (int64_t r = 0; r < a.n; ++r) {
    if (a.own[r] < 0) continue;
    const Others others = others_of(a, r);
    const double g = others.mass == 0 ? 0 : dm[r];
    for (int64_t k = a.ends[r]; k < a.ends[r + 1]; ++k)
      dz[k] = g == 0 ? 0 : -g * (std::exp(a.z[k] - others.top) / others.mass);
    dz[a.own[r]] = g;
  }
}

}  // namespace fastadapt
