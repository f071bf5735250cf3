// Filters of the rule that look at the shape of the logits, as sorts and loops. A part of
// fuzz_kernels.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "problems-inl.h"

namespace {

// The survivors of a row, best first: their scaled logits, masses and surprisal masses.
struct Ranked {
  std::vector<float> s;
  std::vector<int64_t> w, u;
  float m;  // the row's largest

  int64_t size() const { return static_cast<int64_t>(s.size()); }

  // How many of them top-n-sigma, min-k and top-h keep, without a minimum.
  int64_t within(double n) const {
    int64_t sum = 0, squares = 0;
    const float most = std::numeric_limits<float>::max(), range = std::min(m - s.back(), most);
    int exponent = -127;
    if (range >= std::numeric_limits<float>::min()) exponent = std::ilogb(range);
    const float scale = std::ldexp(1.f, std::min(19 - exponent, 127));
    for (float z : s) {
      const int64_t q = static_cast<int64_t>(std::nearbyint(std::max(z - m, -most) * -scale));
      sum += q;
      squares += q * q;
    }
    const double count = static_cast<double>(size()), mean = static_cast<double>(sum) / count;
    const double variance = static_cast<double>(squares) / count - mean * mean;
    const double sigma = std::sqrt(std::max(variance, 0.)) / static_cast<double>(scale);
    const float least = static_cast<float>(static_cast<double>(s[0]) - n * sigma * (1 + 0x1p-19));
    return std::count_if(s.begin(), s.end(), [&](float z) { return z >= least; });
  }

  int64_t above_cliff(double tau) const {
    const double range = static_cast<double>(s.front()) - static_cast<double>(s.back());
    if (range == 0) return size();
    double steepest = -1;
    int64_t k = 1;
    for (int64_t i = 1; i < size(); ++i) {
      const double fall = static_cast<double>(s[i - 1]) - static_cast<double>(s[i]);
      if (fall / static_cast<double>(i) <= steepest) continue;
      steepest = fall / static_cast<double>(i);
      k = i;
    }
    const double least = std::min(tau / range, static_cast<double>(size()));
    return std::max(k, static_cast<int64_t>(least));
  }

  int64_t by_entropy(double h) const {
    const int64_t n = std::min<int64_t>(size(), 100);
    int64_t z = 0, sum_w = 0, sum_u = 0;
    for (int64_t i = 0; i < n; ++i) z += w[i];
    const double log_z = std::log(static_cast<double>(z) * 0x1p-40);
    std::vector<double> share;
    for (int64_t i = 0; i < n; ++i) {
      sum_w += w[i];
      sum_u += u[i];
      share.push_back(static_cast<double>(sum_u) + static_cast<double>(sum_w) * log_z);
    }
    int64_t kept = 1;
    while (kept < n && w[kept] > 0 && share[kept] <= h * share[n - 1] * (1 + 0x1p-19)) ++kept;
    return kept;
  }

  // How many XTC excludes.
  int64_t excluded(double threshold, double keep) const {
    int64_t z = 0, many = 0, last = 0;
    for (int64_t one : w) z += one;
    const double wanted = std::ceil(threshold * static_cast<double>(z) * (1 - 0x1p-19));
    for (int64_t i = 0; i < size(); ++i)
      if (static_cast<double>(w[i]) >= std::max(wanted, 1.)) ++many, last = i;
    const bool acts = threshold <= .5 && many > 1 && static_cast<double>(size() - last) >= keep;
    return acts ? last : 0;
  }
};

}  // namespace
