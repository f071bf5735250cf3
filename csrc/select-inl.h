// Where a filter cuts: the last element, in (key descending, id ascending) order, before which the
// sum of weights is still below a target. A sample guesses a window, one exact pass splits the view
// there, and a few rounds of eight pivots narrow what is left.

constexpr int kPivots = 8;
constexpr int kSamples = 64;
constexpr int64_t kSmall = 1024;  // from here on a sample pays
constexpr int64_t kSorted = 32;   // candidates that are simply sorted

struct RankKey {
  static constexpr bool kEqualKeysEqualMass = true;
  F operator()(F s) const { return s; }
  float scalar(float s) const { return s; }
};

// Typical's key in a search; the plain form where s - m cannot overflow, that is m < 2^102.
template <bool kHuge>
struct TypicalRank : TypicalKey {
  static constexpr bool kEqualKeysEqualMass = false;
  F operator()(F s) const {
    if (kHuge) return TypicalKey::operator()(s);
    return neg(absolute(add(sub(s, fset(m)), fset(centre))));
  }
  float scalar(float s) const {
    const float key = -__builtin_fabsf((s - m) + centre);
    return key < kLowestKey && s > -kInf ? kLowestKey : key;
  }
};

struct Window {
  float low, high;  // low <= key < high
};

// Weights are masses, or 1 where elements are counted.
template <bool kCount, class T>
static inline F weight(const View<T>& v, int64_t i) {
  if (kCount) return fset(1.0f);
  return load(v.e + i);
}

// Approximate sums of weights at or above each pivot.
template <bool kCount, class T, class Key>
static void sums_above(const View<T>& v, Key key, const float* pivots, double* sums) {
  F acc[kPivots];
  for (int p = 0; p < kPivots; ++p) acc[p] = fset(0.0f);
  for_view(v, [&](int64_t i, F s) {
    const F k = key(s), w = weight<kCount>(v, i);
    for (int p = 0; p < kPivots; ++p) acc[p] = add_if(ge(k, fset(pivots[p])), acc[p], w);
  });
  for (int p = 0; p < kPivots; ++p) sums[p] = sum_lanes(acc[p]);
}

// Exact sums of integer weights at or above each pivot.
template <bool kCount, class T, class Key>
static void exact_sums_above(const View<T>& v, Key key, const float* pivots, int64_t* sums) {
  L acc[kPivots];
  for (int p = 0; p < kPivots; ++p) acc[p] = lzero();
  for_view(v, [&](int64_t i, F s) {
    const F k = key(s), w = weight<kCount>(v, i);
    for (int p = 0; p < kPivots; ++p)
      acc[p] = add_truncated(acc[p], keep_if(ge(k, fset(pivots[p])), w));
  });
  for (int p = 0; p < kPivots; ++p) sums[p] = total(acc[p]);
}

struct Split {
  int64_t above;   // exact weight of key >= window.high
  int64_t inside;  // exact weight of the candidates
  int64_t n;       // number of candidates
};

// Copies key, mass and id of the elements inside a window to the candidate buffers, in order.
template <bool kCount, class T, class Key>
static Split split(const View<T>& v, Key key, Window window, const Scratch& scratch) {
  Split out{0, 0, 0};
  L above = lzero(), inside = lzero();
  const F low = fset(window.low), high = fset(window.high);
  for_view(v, [&](int64_t i, F s) {
    const F k = key(s);
    const M is_above = ge(k, high), is_inside = but_not(ge(k, low), is_above);
    const F w = weight<kCount>(v, i);
    if (kCount) {
      out.above += count(is_above);
    } else if (any(is_above)) {
      above = add_truncated(above, keep_if(is_above, w));
    }
    if (!any(is_inside)) return;
    const I ids = ids_of(v, i);
    compress(scratch.cand_key + out.n, is_inside, k);
    compress(scratch.cand_id + out.n, is_inside, ids);
    if (!kCount) {
      compress(scratch.cand_e + out.n, is_inside, w);
      inside = add_truncated(inside, keep_if(is_inside, w));
    }
    out.n += count(is_inside);
  });
  if (!kCount) out.above = total(above);
  out.inside = kCount ? out.n : total(inside);
  return out;
}

// Keys and weights of a strided sample, keys descending.
template <bool kCount, class T, class Key>
static void sorted_sample(const View<T>& v, Key key, float* keys, float* weights) {
  for (int j = 0; j < kSamples; ++j) {
    const int64_t i = (2 * j + 1) * v.n / (2 * kSamples);
    const float k = key.scalar(v.s_at(i)), w = kCount ? 1.0f : v.e[i];
    int at = j;
    for (; at > 0 && keys[at - 1] < k; --at) {
      keys[at] = keys[at - 1];
      weights[at] = weights[at - 1];
    }
    keys[at] = k;
    weights[at] = w;
  }
}

// The window between two neighbouring pivots, or beyond the last, that holds the target.
template <class Sum>
static Window window_of(const float* pivots, const Sum* sums, Sum target) {
  for (int p = 0; p < kPivots; ++p)
    if (sums[p] >= target) return {pivots[p], p ? pivots[p - 1] : kInf};
  return {kLowestKey, pivots[kPivots - 1]};
}

// A strided sample, keys descending, and where among it the target probably lies.
struct Sample {
  float keys[kSamples], weights[kSamples];
  int at;

  float key(int i) const {
    const float k = keys[i < 0 ? 0 : i < kSamples ? i : kSamples - 1];
    return k > kLowestKey ? k : kLowestKey;
  }
  // Three equal keys in a row: a value that a few per cent of the elements share.
  bool tied() const { return at > 0 && at + 1 < kSamples && keys[at - 1] == keys[at + 1]; }
};

template <bool kCount, class T, class Key>
static Sample take_sample(const View<T>& v, Key key, int64_t target, int64_t all) {
  Sample sample;
  sorted_sample<kCount>(v, key, sample.keys, sample.weights);
  const double removed = static_cast<double>(all - target);
  const double step = static_cast<double>(v.n) / kSamples;
  // the sample tells the tail well, the head (few heavy tokens) badly: count from below
  int at = kSamples;
  for (double tail = 0; at > 0 && tail <= removed; --at) tail += step * sample.weights[at - 1];
  sample.at = at;
  return sample;
}

// A window that very probably holds the target.
template <bool kCount, class T, class Key>
static Window guess(const View<T>& v, Key key, int64_t target, const Sample& sample) {
  const int slack = kCount ? 1 : 3;
  if (sample.at <= slack) return {sample.key(sample.at + slack), kInf};
  static constexpr int kOffsets[kPivots] = {-9, -5, -3, -1, 1, 3, 5, 9};
  float pivots[kPivots];
  double sums[kPivots];
  for (int p = 0; p < kPivots; ++p) pivots[p] = sample.key(sample.at + kOffsets[p]);
  sums_above<kCount>(v, key, pivots, sums);
  return window_of(pivots, sums, static_cast<double>(target));
}

// Decides a target among many equal keys without copying them; false if it lies elsewhere.
template <bool kCount, class T, class Key>
static bool cut_at_tie(const View<T>& v, Key key, float tie, int64_t mass, int64_t target,
                       RankCut* cut) {
  const F value = fset(tie);
  L above = lzero(), equal = lzero();
  for_view(v, [&](int64_t i, F s) {
    const F k = key(s), w = weight<kCount>(v, i);
    above = add_truncated(above, keep_if(gt(k, value), w));
    equal = add_truncated(equal, keep_if(eq(k, value), w));
  });
  const int64_t before = total(above);
  if (before >= target || before + total(equal) < target) return false;
  if (!kCount && !Key::kEqualKeysEqualMass) {
    *cut = {tie, kAllIds};  // two masses, one on either side of the centre; ties stay
    return true;
  }
  int64_t left = (target - before - 1) / mass;
  for (int64_t begin = 0; begin < v.n; begin += kBlock) {
    const int64_t end = begin + kBlock < v.n ? begin + kBlock : v.n;
    int64_t here = 0;
    for_row(v.x, begin, end, v.inv_t, [&](int64_t, F s) { here += count(eq(key(s), value)); });
    if (left >= here) {
      left -= here;
      continue;
    }
    for (int64_t i = begin;; ++i) {
      if (key.scalar(v.s_at(i)) != tie || left--) continue;
      *cut = {tie, v.id_at(i)};
      return true;
    }
  }
  return false;
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

// The cut among candidates whose weights start at `before`.
template <bool kCount, bool kEqualMass>
static RankCut cut_among(int64_t n, int64_t before, int64_t target, const Scratch& scratch) {
  float* keys = scratch.cand_key;
  float* e = scratch.cand_e;
  int32_t* ids = scratch.cand_id;
  bool among_floats = false;
  while (n > kSorted) {
    const Range r = key_range(keys, n);
    if (r.low == r.high) {
      if (kCount) return {r.low, ids[target - before - 1]};
      if (!kEqualMass) return {r.low, kAllIds};
      return {r.low, ids[(target - before - 1) / static_cast<int64_t>(e[0])]};
    }
    const View<float> v{keys, n, 1.0f, 0.0f, e, ids};
    float pivots[kPivots];
    int64_t sums[kPivots];
    spread_pivots(r, among_floats, pivots);
    exact_sums_above<kCount>(v, RankKey{}, pivots, sums);
    for (int p = 0; p < kPivots; ++p) sums[p] += before;
    const Split s = split<kCount>(v, RankKey{}, window_of(pivots, sums, target), scratch);
    before += s.above;
    among_floats = 2 * s.n > n;
    n = s.n;
  }
  for (int64_t i = 1; i < n; ++i) {  // stable, so ids stay ascending among equal keys
    const float k = keys[i], w = e[i];
    const int32_t id = ids[i];
    int64_t at = i;
    for (; at > 0 && keys[at - 1] < k; --at) {
      keys[at] = keys[at - 1];
      e[at] = e[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = k;
    e[at] = w;
    ids[at] = id;
  }
  RankCut cut{kInf, 0};
  for (int64_t i = 0; i < n && before < target; ++i) {
    cut = {keys[i], ids[i]};
    before += kCount ? 1 : static_cast<int64_t>(e[i]);
  }
  return cut;
}

// The cut of a view for a target in [1, all]; everything stays where the weights do not reach it.
template <bool kCount, class T, class Key>
static RankCut select(const View<T>& v, Key key, int64_t target, int64_t all,
                      const Scratch& scratch) {
  Window window{kLowestKey, kInf};
  if (v.n > kSmall) {
    const Sample sample = take_sample<kCount>(v, key, target, all);
    if (sample.tied()) {
      const int64_t mass = kCount ? 1 : static_cast<int64_t>(sample.weights[sample.at]);
      RankCut cut;
      if (cut_at_tie<kCount>(v, key, sample.keys[sample.at], mass, target, &cut)) return cut;
    }
    window = guess<kCount>(v, key, target, sample);
  }
  Split s = split<kCount>(v, key, window, scratch);
  if (s.above >= target) {
    s = split<kCount>(v, key, {window.high, kInf}, scratch);
  } else if (s.above + s.inside < target) {
    if (window.low == kLowestKey) return {kLowestKey, kAllIds};
    s = split<kCount>(v, key, {kLowestKey, window.low}, scratch);
    if (s.above + s.inside < target) return {kLowestKey, kAllIds};
  }
  return cut_among<kCount, Key::kEqualKeysEqualMass>(s.n, s.above, target, scratch);
}
