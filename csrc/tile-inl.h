// The row work of linear_log_odds between the products of one tile of the vocabulary.

template <class T>
static inline LogitMap<T> map_of(const Tile& t) {
  return {static_cast<const typename Wide<T>::type*>(t.bias), t.scale, t.cap};
}

template <bool kWeighted, class T>
static void sum_tile(const TileArgs& a, int64_t r, double high, const LogitMap<T>& map,
                     const Stretch<T>& stretch) {
  double* stats = a.stats + kNumStats * r;
  const int64_t n = stretch.n, y = a.labels[r] - a.first;
  if (!a.exps) {
    absorb<kWeighted>(stretch, high, stats, [](int64_t, auto) {});
    return;
  }
  T* out = static_cast<T*>(a.exps) + r * n;
  if (high == -__builtin_inf()) std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
  const LogitMap<T> unscaled{nullptr, 1, map.cap};
  a.shrinks[r] = absorb<kWeighted>(stretch, high, stats, [&](int64_t i, typename Wide<T>::Lanes e) {
    if (map.cap != 0) e = mul(e, unscaled.slope(Wide<T>::get(stretch.z + i)));
    store_until(out, i, n, e);
  });
  if (y >= 0 && y < n) from_double(0, out + y);
}

template <class T>
static void tile_row(const TileArgs& a, int64_t r, const Scratch&) {
  const Rows& rows = a.rows;
  const T* x = static_cast<const T*>(rows.data) + r * rows.stride;
  const LogitMap<T> map = map_of<T>(a);
  Stretch<T> stretch;
  const double high = stretch.fill(x, map, rows.v, a.labels[r] - a.first);
  if (a.weighted) return sum_tile<true>(a, r, high, map, stretch);
  sum_tile<false>(a, r, high, map, stretch);
}

template <class T>
static void tile_backward_row(const TileBackwardArgs& a, int64_t r, const Scratch&) {
  const Rows& rows = a.rows;
  T* out = static_cast<T*>(a.out) + r * rows.v;
  const double* stats = a.stats + kNumStats * r;
  if (a.gains[r] == 0) {
    std::memset(out, 0, static_cast<size_t>(rows.v) * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(rows.data) + r * rows.stride;
  write_gradient(x, map_of<T>(a), rows.v, a.labels[r] - a.first, stats[kOthersMax],
                 -a.gains[r] / stats[kOthersSum], out);
}

template <class T>
static void mix_row(const MixArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  constexpr int lanes = Wide<T>::lanes;
  Real* dst = static_cast<Real*>(a.dst) + r * a.h;
  const T* src = static_cast<const T*>(a.src) + (a.index ? a.index[r] : r) * a.src_stride;
  const double f = a.factor ? a.factor[r] : 1, g = a.gain ? a.gain[r] : 1;
  const auto factor = Wide<T>::set(f), gain = Wide<T>::set(g);
  int64_t i = 0;
  for (; i + lanes <= a.h; i += lanes)
    store(dst + i, add(mul(factor, Wide<T>::get(dst + i)), mul(gain, load(src + i))));
  for (; i < a.h; ++i) dst[i] = static_cast<Real>(f) * dst[i] + static_cast<Real>(g) * wide(src[i]);
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
  const T* y = static_cast<const T*>(a.b) + (a.index ? a.index[r] : r) * a.b_stride;
  double total = 0;
  int64_t i = 0;
  while (i + lanes <= a.h) {
    auto s = Wide<T>::set(0);  // 16 products a lane, then to the double
    for (int64_t end = i + 16 * lanes; i < end && i + lanes <= a.h; i += lanes)
      s = add(s, mul(load(x + i), load(y + i)));
    total += static_cast<double>(sum_lanes(s));
  }
  for (; i < a.h; ++i) total += static_cast<double>(wide(x[i])) * static_cast<double>(wide(y[i]));
  a.out[r] = total;
}
