// The window of a cut: pivots, sums of weights above them, and what a sample of a view says.

constexpr int kPivots = 8;

struct RankKey {
  static constexpr bool kHeaviestFirst = true;  // and equal keys have equal masses
  F operator()(F s) const { return s; }
};

// Typical's key in a search; the plain form where s - m cannot overflow, that is m < 2^102.
template <bool kHuge>
struct TypicalRank : TypicalKey {
  static constexpr bool kHeaviestFirst = false;
  F operator()(F s) const {
    if (kHuge) return TypicalKey::operator()(s);
    return neg(absolute(add(sub(s, fset(m)), fset(centre))));
  }
};

struct Window {
  float low, high;  // low <= key < high
  bool sparse;      // few elements are at or above low
};
constexpr Window kEverywhere{kLowestKey, kInf, false};

// The candidates that the last split has found.
static inline View<float> candidates(int64_t n, const Scratch& scratch) {
  return view_of({scratch.cand_key, scratch.cand_e, scratch.cand_id}, n);
}

// Weights are masses, or 1 where elements are counted.
template <bool kCount>
static inline F weight(const View<float>& v, int64_t i) {
  if (kCount) return fset(1.0f);
  return load(v.e + i);
}

// Exact weight of a list.
template <bool kCount>
static int64_t weight_of(const List& list, int64_t n) {
  if (kCount) return n;
  L z = lzero();
  for_view(view_of(list, n), [&](int64_t i, F k) {
    z = add_truncated(z, keep_if(gt(k, fset(-kInf)), load(list.e + i)));
  });
  return total(z);
}

// Approximate sums of weights at or above each pivot.
template <bool kCount>
static void sums_above(const View<float>& v, const float* pivots, double* sums) {
  F acc[kPivots];
  for (int p = 0; p < kPivots; ++p) acc[p] = fset(0.0f);
  for_view(v, [&](int64_t i, F k) {
    const F w = weight<kCount>(v, i);
    for (int p = 0; p < kPivots; ++p) acc[p] = add_if(ge(k, fset(pivots[p])), acc[p], w);
  });
  for (int p = 0; p < kPivots; ++p) sums[p] = sum_lanes(acc[p]);
}

// The same, exact.
template <bool kCount>
static void exact_sums_above(const View<float>& v, const float* pivots, int64_t* sums) {
  L acc[kPivots];
  for (int p = 0; p < kPivots; ++p) acc[p] = lzero();
  for_view(v, [&](int64_t i, F k) {
    const F w = weight<kCount>(v, i);
    for (int p = 0; p < kPivots; ++p)
      acc[p] = add_truncated(acc[p], keep_if(ge(k, fset(pivots[p])), w));
  });
  for (int p = 0; p < kPivots; ++p) sums[p] = total(acc[p]);
}

struct Range {
  float low, high;
};
static Range key_range(const float* keys, int64_t n) {
  F low = fset(kInf), high = fset(-kInf);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F k = load(keys + i);
    low = minimum(low, k);
    high = maximum(high, k);
  }
  Range r{min_lane(low), max_lane(high)};
  for (; i < n; ++i) {
    r.low = keys[i] < r.low ? keys[i] : r.low;
    r.high = keys[i] > r.high ? keys[i] : r.high;
  }
  return r;
}

// Pivots from high to low: evenly spaced, or evenly spaced among the floats, which always ends.
static void spread_pivots(Range r, bool among_floats, float* pivots) {
  const int64_t low = ordered(r.low), high = ordered(r.high);
  const float width = r.high - r.low;
  for (int p = 0; p < kPivots; ++p) {
    pivots[p] = among_floats || !(width < kInf)
                    ? from_ordered(high - (high - low) * (p + 1) / (kPivots + 1))
                    : r.high - width * (static_cast<float>(p + 1) / (kPivots + 1));
  }
}

// A strided sample of a view, and the window in which, by its word, a target lies almost surely.
template <bool kCount>
class Sample {
 public:
  static constexpr int64_t kMost = 1024, kOneIn = 16, kLeast = 64;
  static bool pays(int64_t n) { return n >= kLeast * kOneIn; }

  template <class T, class Key>
  Sample(const View<T>& v, Key key) {
    n_ = v.n / kOneIn < kMost ? v.n / kOneIn / kLeast * kLeast : kMost;
    share_ = static_cast<double>(n_) / static_cast<double>(v.n);
    const int64_t step = v.n / n_;
    const F m = fset(v.m);
    for (int64_t j = 0; j < n_; ++j) keys_[j] = v.s_at(j * step + step / 2);
    for (int64_t j = 0; j < n_; j += W) {
      const F s = load(keys_ + j);
      store(weights_ + j, kCount ? fset(1.0f) : mass(sub(s, m)));
      store(keys_ + j, key(s));
    }
    sum_up(kInf);
  }

  // Counts the heavy tokens one by one and samples only the others: where heavy tokens may lie on
  // the far side of a target, a sample of them would say nothing.
  template <class T, class Key>
  Sample(const View<T>& v, Key key, int64_t all, const List& list) : Sample(v, key) {
    // at most 8192 tokens have so much
    const double heavy = static_cast<double>(all) / 8192;
    const float floor = static_cast<float>(v.m + log64(heavy / kUnit));
    heavy_ = view_of(list, gather(v, RankCut{floor, kAllIds}, list));
    for (int64_t i = 0; i < heavy_.n; i += W) store(list.key + i, key(load(list.key + i)));
    sum_up(max_lane(mass(fset(floor - v.m))));
    heavy_sum_ = static_cast<double>(weight_of<false>(list, heavy_.n));
  }

  // The window of a cut that removes some weight.
  Window window(int64_t removed) {
    removed_ = static_cast<double>(removed) * share_;
    removed_part_ = 0;
    return narrow();
  }

  // The window of a cut that removes a part of the whole weight, which is not known yet.
  Window window_of_part(double part) {
    removed_ = 0;
    removed_part_ = part;
    return narrow();
  }

  // Whether the whole weight is known to some per cent.
  bool even() const { return 100 * (sum_of_squares_ - sum_ * sum_ / n_) < sum_ * sum_; }

 private:
  Window narrow() {
    window_ = kEverywhere;
    const Range range = key_range(keys_, n_);
    unsafe_low_ = range.high;
    unsafe_high_ = range.low;
    float pivots[kPivots];
    quantiles(pivots);
    probe(pivots);
    for (int round = 0; round < 2; ++round) {
      spread_pivots({window_.low > kLowestKey ? window_.low : range.low, unsafe_low_}, false,
                    pivots);
      probe(pivots);
      spread_pivots({unsafe_high_, window_.high < kInf ? window_.high : range.high}, false, pivots);
      probe(pivots);
    }
    int64_t present = 0;
    for (int64_t j = 0; j < n_; j += W) present += count(ge(load(keys_ + j), fset(window_.low)));
    window_.sparse = present * 16 < n_;
    return window_;
  }

  // Sums over the sample, without what is heavy.
  void sum_up(float heavy) {
    F sum = fset(0.0f), sum_of_squares = fset(0.0f);
    for (int64_t j = 0; j < n_; j += W) {
      const F w = load(weights_ + j), light = keep_if(gt(fset(heavy), w), w);
      store(weights_ + j, light);
      store(squares_ + j, mul(light, light));
      sum = add(sum, light);
      sum_of_squares = add(sum_of_squares, mul(light, light));
    }
    sum_ = sum_lanes(sum);
    sum_of_squares_ = sum_lanes(sum_of_squares);
  }

  // Eight of 64 sorted keys.
  void quantiles(float* pivots) const {
    float sorted[kLeast];
    for (int64_t j = 0; j < kLeast; ++j) {
      const float k = keys_[j * (n_ / kLeast)];
      int64_t at = j;
      for (; at > 0 && sorted[at - 1] < k; --at) sorted[at] = sorted[at - 1];
      sorted[at] = k;
    }
    for (int p = 0; p < kPivots; ++p) pivots[p] = sorted[3 + p * 8];
  }

  // Narrows the window to the pivots that are three standard deviations from the target. The tail
  // below a pivot is known better than the head above it, which a few heavy tokens make up.
  void probe(const float* pivots) {
    double sums[kPivots], squares[kPivots], heavy[kPivots] = {};
    sums_above<false>(View<float>{keys_, n_, 1.0f, 0.0f, weights_, nullptr}, pivots, sums);
    sums_above<false>(View<float>{keys_, n_, 1.0f, 0.0f, squares_, nullptr}, pivots, squares);
    if (heavy_.n > 0) sums_above<false>(heavy_, pivots, heavy);
    for (int p = 0; p < kPivots; ++p) {
      const double below = sum_ - sums[p], below_squares = sum_of_squares_ - squares[p];
      // what the pivot removes over what is to be removed: a sum over the sample, its variance, and
      // the square of the weight that might come next
      const double part = removed_part_, excess = below - part * sum_;
      const double next = below > 0 ? below_squares / below : 0;
      const double variance = (1 - part) * (1 - part) * below_squares + part * part * squares[p] -
                              excess * excess / static_cast<double>(n_) + next * next;
      const double slack = 3 * __builtin_sqrt(variance > 0 ? variance : 0);
      const double over = excess + share_ * (heavy_sum_ - heavy[p]) - removed_;
      const bool low = below > 0 && over + slack <= 0, high = over - slack >= 0;
      if (low && pivots[p] > window_.low) window_.low = pivots[p];
      if (!low && pivots[p] < unsafe_low_) unsafe_low_ = pivots[p];
      if (high && pivots[p] < window_.high) window_.high = pivots[p];
      if (!high && pivots[p] > unsafe_high_) unsafe_high_ = pivots[p];
    }
  }

  float keys_[kMost], weights_[kMost], squares_[kMost];
  int64_t n_;
  double share_;                   // of the view in the sample
  double sum_, sum_of_squares_;    // over the sample
  double removed_, removed_part_;  // below the target, in the sample's measure
  View<float> heavy_{};            // keys of the heavy tokens
  double heavy_sum_ = 0;
  Window window_ = kEverywhere;
  float unsafe_low_, unsafe_high_;  // the nearest pivots that are not far enough from the target
};
