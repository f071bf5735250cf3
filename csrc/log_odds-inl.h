// The label against the surviving others, and its gradient. The support is decided by the integer
// rule on float32 values; for float64 rows the log-odds are float64.

static inline bool in_support(const uint8_t* support, int64_t i) {
  return support[i >> 3] >> (i & 7) & 1;
}

// Writes W bits of a row's support; never past its last byte.
static inline void store_bits(uint8_t* support, int64_t bytes, int64_t i, uint32_t b) {
  if (W == 1) {
    support[i >> 3] |= static_cast<uint8_t>(b << (i & 7));
    return;
  }
  for (int64_t j = 0; j < W / 8 && i / 8 + j < bytes; ++j)
    support[i / 8 + j] = static_cast<uint8_t>(b >> 8 * j);
}
static inline uint32_t load_bits(const uint8_t* support, int64_t bytes, int64_t i) {
  if (W == 1) return in_support(support, i);
  uint32_t b = 0;
  for (int64_t j = 0; j < W / 8 && i / 8 + j < bytes; ++j)
    b |= static_cast<uint32_t>(support[i / 8 + j]) << 8 * j;
  return b;
}

// Writes the survivors of a row of V logits, one bit each; the others' bits are 0 already.
template <class T>
static void set_survivors(const Survivors<T>& survivors, int64_t v, uint8_t* support) {
  const int64_t bytes = (v + 7) / 8;
  survivors.visit([&](const auto& view, const auto& test) {
    for_survivors(view, test, [&](int64_t i, F, M chosen) {
      uint32_t b = bits(chosen);
      if (!view.id) return store_bits(support, bytes, i, b);
      for (; b; b &= b - 1) {
        const int32_t id = view.id[i + __builtin_ctz(b)];
        support[id >> 3] |= static_cast<uint8_t>(1 << (id & 7));
      }
    });
  });
}

// Decides the support of a row; false leaves it empty and the log-odds NaN.
template <class T>
static bool write_support(const T* x, int64_t v, const RowStats& stats, const RowKnobs& k,
                          uint8_t* support, const Scratch& scratch) {
  std::memset(support, 0, static_cast<size_t>((v + 7) / 8));
  Row<T> row;
  if (!in_range(k) || k.greedy() || open_row(x, v, k.inv_t, stats, &row) != kOk) return false;
  const Survivors<T> survivors(row, k, scratch);
  if (survivors.status() != kOk) return false;
  set_survivors(survivors, v, support);
  return true;
}

// Calls f(i, s, others): the surviving lanes other than y.
template <class T, class Fn>
static inline void for_others(const T* x, int64_t v, float inv_t, const uint8_t* support, int64_t y,
                              Fn&& f) {
  const int64_t bytes = (v + 7) / 8;
  for_row(x, 0, v, inv_t, [&](int64_t i, F s) {
    const M alive = from_bits(load_bits(support, bytes, i));
    f(i, s, but_not(alive, ieq(iota(static_cast<int32_t>(i)), iset(static_cast<int32_t>(y)))));
  });
}

// Maximum and summed mass, in units of 1, of the surviving others.
template <class T>
static void others_stats(const T* x, int64_t v, const RowKnobs& k, const uint8_t* support,
                         int64_t y, double* stats) {
  F best = fset(-kInf);
  for_others(x, v, k.whole_inv_t(), support, y,
             [&](int64_t, F s, M others) { best = maximum(best, choose(others, s, fset(-kInf))); });
  const float m = max_lane(best) + 0.0f;
  L z = lzero();
  for_others(x, v, k.whole_inv_t(), support, y, [&](int64_t, F s, M others) {
    z = add_truncated(z, keep_if(others, mass(sub(s, fset(m)))));
  });
  stats[kOthersMax] = m;
  stats[kOthersSum] = m == -kInf ? 0 : static_cast<double>(total(z)) / kUnit;
}

static void others_stats(const double* x, int64_t v, const RowKnobs& k, const uint8_t* support,
                         int64_t y, double* stats) {
  const double t = k[kTemperature];
  double m = -__builtin_inf(), z = 0;
  for (int64_t i = 0; i < v; ++i)
    if (i != y && in_support(support, i) && x[i] / t > m) m = x[i] / t;
  for (int64_t i = 0; i < v; ++i)
    if (i != y && in_support(support, i)) z += __builtin_exp(x[i] / t - m);
  stats[kOthersMax] = m;
  stats[kOthersSum] = z;
}

template <class T>
struct LogOddsOf {
  using type = float;
};
template <>
struct LogOddsOf<double> {
  using type = double;
};

static inline const float* as_float32(const double* x, int64_t v, const Scratch& scratch) {
  for (int64_t i = 0; i < v; ++i) scratch.row_f32[i] = static_cast<float>(x[i]);
  return scratch.row_f32;
}

static inline double scaled(double x, const RowKnobs& k) { return x / k[kTemperature]; }
template <class T>
static inline double scaled(T x, const RowKnobs& k) {
  return to_float(x) * k.whole_inv_t();
}

// The log-odds of the token of row r, whose logits are x; of float64, rounded ones decide.
template <class T, class Decides>
static double token_log_odds(const LogOddsArgs& a, int64_t r, const T* x, const Decides* rounded,
                             const RowStats& of_row, const Scratch& scratch) {
  const int64_t v = a.rows.v, y = a.tokens[r];
  uint8_t* support = a.support + r * ((v + 7) / 8);
  double* stats = a.stats + 2 * r;
  const RowKnobs k = knobs_of(a.knobs, r);
  if (!write_support(rounded, v, of_row, k, support, scratch)) return __builtin_nan("");
  if (!in_support(support, y)) return -__builtin_inf();
  others_stats(x, v, k, support, y, stats);
  if (!(stats[kOthersSum] > 0)) return __builtin_inf();
  return scaled(x[y], k) - stats[kOthersMax] - log64(stats[kOthersSum]);
}

template <class T>
static void log_odds_row(const LogOddsArgs& a, int64_t r, const Scratch& scratch) {
  const int64_t v = a.rows.v;
  double* stats = a.stats + 2 * r;
  double log_odds = 0;
  stats[kOthersMax] = stats[kOthersSum] = 0;
  if (a.tokens[r] == a.ignore_index) {
    std::memset(a.support + r * ((v + 7) / 8), 0, static_cast<size_t>((v + 7) / 8));
  } else if constexpr (sizeof(T) == sizeof(double)) {
    const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
    const float* rounded = as_float32(x, v, scratch);
    log_odds = token_log_odds(a, r, x, rounded, scan(rounded, v, scratch.team), scratch);
  } else {
    with_row<T>(a.rows, a.edits, r, scratch, [&](const auto* x, const RowStats& of_row) {
      log_odds = token_log_odds(a, r, x, x, of_row, scratch);
    });
  }
  using Out = typename LogOddsOf<T>::type;
  static_cast<Out*>(a.log_odds)[r] = static_cast<Out>(log_odds);
}

// dlogits = g / T (onehot(y) - q), q the distribution of the surviving others.
template <class T>
static void log_odds_gradient(const T* x, int64_t v, const RowKnobs& k, const uint8_t* support,
                              int64_t y, const double* stats, double g, T* out) {
  // a NaN of the caller's may have bits that rounding would carry away; this one has not
  const double gain = g == g ? g * k.whole_inv_t() : __builtin_nan("");
  const F per_mass = fset(static_cast<float>(-gain / stats[kOthersSum]));
  const F unit = fset(static_cast<float>(1 / kUnit));
  const F m = fset(static_cast<float>(stats[kOthersMax]));
  for_others(x, v, k.whole_inv_t(), support, y, [&](int64_t i, F s, M others) {
    const F d = sub(s, m);
    const F dx = keep_if(both(others, ge(d, fset(kLowest))), mul(per_mass, mul(mass(d), unit)));
    if (i + W <= v) return store(out + i, dx);
    T tail[W];
    store(tail, dx);
    std::memcpy(out + i, tail, static_cast<size_t>(v - i) * sizeof(T));
  });
  from_float(static_cast<float>(gain), out + y);
}

static void log_odds_gradient(const double* x, int64_t v, const RowKnobs& k, const uint8_t* support,
                              int64_t y, const double* stats, double g, double* out) {
  const double t = k[kTemperature];
  for (int64_t i = 0; i < v; ++i) {
    const bool other = i != y && in_support(support, i);
    out[i] = other ? -g / t * __builtin_exp(x[i] / t - stats[kOthersMax]) / stats[kOthersSum] : 0;
  }
  out[y] = g / t;
}

// Takes the gradient of an edited row, float32, to the logits that were edited, rounded once.
template <class T>
static void through_edits(const T* x, int64_t v, const RowEdits& edits, float* dy, float* dgiven,
                          T* out) {
  for (const int32_t* at = edits.first; at < edits.last; ++at) {
    const bool there = *at >= 0 && *at < v;
    if (dgiven) dgiven[at - edits.all.ids] = there ? dy[*at] : 0;
    if (there) dy[*at] = edits.through(dy[*at], to_float(x[*at]), at);
  }
  for_row(dy, 0, v, 1.0f, [&](int64_t i, F s) {
    if (i + W <= v) return store(out + i, s);
    T tail[W];
    store(tail, s);
    std::memcpy(out + i, tail, static_cast<size_t>(v - i) * sizeof(T));
  });
}

template <class T>
static void log_odds_backward_row(const LogOddsBackwardArgs& a, int64_t r, const Scratch& scratch) {
  const int64_t v = a.rows.v, y = a.tokens[r];
  const RowEdits edits(a.edits, r);
  T* out = static_cast<T*>(a.dlogits) + r * v;
  const double* stats = a.stats + 2 * r;
  using In = typename LogOddsOf<T>::type;
  const double g = static_cast<double>(static_cast<const In*>(a.dlog_odds)[r]);
  // ignored and bad rows, tokens outside the support or alone in it: no gradient, whatever g is
  if (y == a.ignore_index || !(stats[kOthersSum] > 0)) {
    std::memset(out, 0, static_cast<size_t>(v) * sizeof(T));
    for (const int32_t* at = edits.first; a.dgiven && at < edits.last; ++at)
      a.dgiven[at - edits.all.ids] = 0;
    return;
  }
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  const uint8_t* support = a.support + r * ((v + 7) / 8);
  const RowKnobs k = knobs_of(a.knobs, r);
  if constexpr (sizeof(T) != sizeof(double)) {
    if (!a.edits.none()) {
      const float* edited = scratch.row_f32;
      write_edited(x, v, edits, scratch);
      log_odds_gradient(edited, v, k, support, y, stats, g, scratch.ordered);
      return through_edits(x, v, edits, scratch.ordered, a.dgiven, out);
    }
  }
  log_odds_gradient(x, v, k, support, y, stats, g, out);
}
