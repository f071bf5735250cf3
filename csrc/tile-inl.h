// The row work of linear_log_odds between the products of one tile of the vocabulary.

template <class T>
static inline LogitMap<T> map_of(const Tile& t) {
  return {static_cast<const typename Wide<T>::type*>(t.bias), t.scale, t.cap};
}

static inline Labels labels_of(const Tile& t, int64_t r) {
  return {t.labels + r * t.k, t.k, t.first};
}

template <bool kMoments, class T>
static void sum_tile(const TileArgs& a, int64_t r, double high, const LogitMap<T>& map,
                     const Stretch<T>& stretch) {
  double* stats = a.stats + kNumTileStats * r;
  const int64_t n = stretch.n;
  if (!a.exps) {
    absorb<kMoments>(stretch, high, stats, [](int64_t, auto) {});
    return;
  }
  T* out = static_cast<T*>(a.exps) + r * n;
  if (high == -__builtin_inf()) std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
  const LogitMap<T> unscaled{nullptr, 1, map.cap};
  a.shrinks[r] = absorb<kMoments>(stretch, high, stats, [&](int64_t i, typename Wide<T>::Lanes e) {
    if (map.cap != 0) e = mul(e, unscaled.slope(Wide<T>::get(stretch.z + i)));
    store_until(out, i, n, e);
  });
  labels_of(a, r).visit(n, [&](int64_t at) { from_double(0, out + at); });
}

template <class T>
static void tile_row(const TileArgs& a, int64_t r, const Scratch&) {
  const Rows& rows = a.rows;
  const T* x = static_cast<const T*>(rows.data) + r * rows.stride;
  const LogitMap<T> map = map_of<T>(a);
  Stretch<T> stretch;
  const double high = stretch.fill(x, map, rows.v, labels_of(a, r));
  if (a.moments) return sum_tile<true>(a, r, high, map, stretch);
  sum_tile<false>(a, r, high, map, stretch);
}

template <class T>
static void tile_backward_row(const TileBackwardArgs& a, int64_t r, const Scratch&) {
  const Rows& rows = a.rows;
  T* out = static_cast<T*>(a.out) + r * rows.v;
  const Gains gains{a.gains[3 * r], a.gains[3 * r + 1], a.gains[3 * r + 2]};
  if (gains.a == 0 && gains.b == 0 && gains.c == 0) {
    std::memset(out, 0, static_cast<size_t>(rows.v) * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(rows.data) + r * rows.stride;
  const double m = a.stats[kNumTileStats * r + kOthersMax];
  const Labels labels = labels_of(a, r);
  if (a.moments) return write_gradient<true>(x, map_of<T>(a), rows.v, labels, m, gains, out);
  write_gradient<false>(x, map_of<T>(a), rows.v, labels, m, gains, out);
}

// Asks for a row that is read soon: rows of a head that lists name are anywhere in memory. The
// first lines are enough for the processor to follow.
template <class T>
static inline void ahead(const T* base, const int64_t* index, int64_t k, int64_t end,
                         int64_t stride) {
  constexpr int64_t kPairs = 4, kLines = 4;
  if (!index || k + kPairs >= end) return;
  const char* row = reinterpret_cast<const char*>(base + index[k + kPairs] * stride);
  for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(row + 64 * line);
}

template <class T>
static void mix_row(const MixArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  constexpr int lanes = Wide<T>::lanes;
  Real* dst = static_cast<Real*>(a.dst) + r * a.h;
  double f = a.factor ? a.factor[r] : 1;
  for (int64_t k = a.begin(r); k < a.begin(r + 1); ++k, f = 1) {
    const double g = a.gain ? a.gain[k] : 1;
    const T* src = static_cast<const T*>(a.src) + (a.index ? a.index[k] : r) * a.src_stride;
    ahead(static_cast<const T*>(a.src), a.index, k, a.begin(a.n), a.src_stride);
    const auto factor = Wide<T>::set(f), gain = Wide<T>::set(g);
    int64_t i = 0;
    for (; i + lanes <= a.h; i += lanes)
      store(dst + i, add(mul(factor, Wide<T>::get(dst + i)), mul(gain, load(src + i))));
    for (; i < a.h; ++i)
      dst[i] = static_cast<Real>(f) * dst[i] + static_cast<Real>(g) * wide(src[i]);
  }
}

template <class T>
static void scatter_row(const ScatterArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  const Real* src = static_cast<const Real*>(a.src) + r * a.h;
  T* out = static_cast<T*>(a.out) + (a.index ? a.index[r] : r) * a.h;
  const double g = a.gain ? a.gain[r] : 1;
  const auto gain = Wide<T>::set(g);
  constexpr int lanes = Wide<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= a.h; i += lanes) store(out + i, mul(gain, Wide<T>::get(src + i)));
  for (; i < a.h; ++i) from_double(static_cast<double>(static_cast<Real>(g) * src[i]), out + i);
}

template <class T>
static void dot_row(const DotArgs& a, int64_t r, const Scratch&) {
  constexpr int lanes = Wide<T>::lanes;
  const T* x = static_cast<const T*>(a.a) + r * a.a_stride;
  for (int64_t k = a.begin(r); k < a.begin(r + 1); ++k) {
    const T* y = static_cast<const T*>(a.b) + (a.index ? a.index[k] : r) * a.b_stride;
    ahead(static_cast<const T*>(a.b), a.index, k, a.begin(a.n), a.b_stride);
    double total = 0;
    int64_t i = 0;
    while (i + lanes <= a.h) {
      auto s = Wide<T>::set(0);  // 16 products a lane, then to the double
      for (int64_t end = i + 16 * lanes; i < end && i + lanes <= a.h; i += lanes)
        s = add(s, mul(load(x + i), load(y + i)));
      total += static_cast<double>(sum_lanes(s));
    }
    for (; i < a.h; ++i) total += static_cast<double>(wide(x[i])) * static_cast<double>(wide(y[i]));
    a.out[k] = total;
  }
}
