// The label, or several candidates, against all other entries of a row of logits.

template <class T>
static void label_log_odds_row(const LabelArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  const int64_t v = a.rows.v, y = a.labels[r];
  double* stats = a.stats + kNumStats * r;
  Real* log_odds = static_cast<Real*>(a.log_odds) + r;
  stats[kOthersMax] = -__builtin_inf();
  stats[kOthersSum] = stats[kOthersWeighted] = stats[kLabelLogit] = 0;
  *log_odds = 0;
  if (y == a.ignore_index) return;
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  const LogitMap<T> map{nullptr, 1, 0};
  Stretch<T> stretch;
  for (int64_t begin = 0; begin < v; begin += kMaxTile) {
    const int64_t n = begin + kMaxTile < v ? kMaxTile : v - begin;
    const double high = stretch.fill(x + begin, map, n, {&y, 1, begin});
    absorb<false>(stretch, high, stats, [](int64_t, auto) {});
  }
  stats[kLabelLogit] = wide(x[y]);
  *log_odds = static_cast<Real>(log_odds_of(stats));
}

// dlogits = g (onehot(y) - q), q the softmax of the others.
template <class T>
static void label_log_odds_backward_row(const LabelBackwardArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  const int64_t v = a.rows.v, y = a.labels[r];
  T* out = static_cast<T*>(a.dlogits) + r * v;
  const double* stats = a.stats + kNumStats * r;
  // ignored rows, and labels without others: no gradient, whatever g is
  if (y == a.ignore_index || stats[kOthersSum] == 0) {
    std::memset(out, 0, static_cast<size_t>(v) * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  const double g = static_cast<double>(static_cast<const Real*>(a.dlog_odds)[r]);
  const LogitMap<T> map{nullptr, 1, 0};
  for (int64_t begin = 0; begin < v; begin += kMaxTile) {
    const int64_t n = begin + kMaxTile < v ? kMaxTile : v - begin;
    write_gradient<false>(x + begin, map, n, {&y, 1, begin}, stats[kOthersMax],
                          {-g / stats[kOthersSum], 0, 0}, out + begin);
  }
  from_double(g, out + y);
}

// The first id of the largest entry; NaN is passed over.
template <class T>
static int64_t first_largest(const T* x, int64_t v) {
  int64_t best = 0;
  for (int64_t i = 1; i < v; ++i)
    if (wide(x[i]) > wide(x[best]) || (wide(x[best]) != wide(x[best]))) best = i;
  return best;
}

// The sum of e^(z - M) over all entries but c, in units of the row's largest entry M, c not M's.
// It is at least 1, so nothing cancels; NaN where M is +inf.
static inline double without(const double* stats, double z) {
  const double top = stats[kLabelLogit];
  if (top == __builtin_inf()) return __builtin_nan("");
  const double rest =
      stats[kOthersSum] == 0 ? 0 : stats[kOthersSum] * __builtin_exp(stats[kOthersMax] - top);
  const double others = rest - __builtin_exp(z - top);
  return 1 + (others > 0 ? others : others != others ? others : 0);
}

// A row of nothing but -inf: no candidate has others.
static inline bool nothing_finite(const double* stats) {
  return stats[kOthersSum] == 0 && stats[kLabelLogit] == -__builtin_inf();
}

// The entries but the largest are summed once; from them follow the log-odds of every candidate.
template <class T>
static void candidate_row(const CandidateArgs& a, int64_t r, const Scratch&) {
  using Real = typename Wide<T>::type;
  const int64_t v = a.rows.v;
  double* stats = a.stats + kNumStats * r;
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  const int64_t best = first_largest(x, v);
  stats[kOthersMax] = -__builtin_inf();
  stats[kOthersSum] = 0;
  stats[kTopId] = static_cast<double>(best);
  const LogitMap<T> map{nullptr, 1, 0};
  Stretch<T> stretch;
  for (int64_t begin = 0; begin < v; begin += kMaxTile) {
    const int64_t n = begin + kMaxTile < v ? kMaxTile : v - begin;
    const double high = stretch.fill(x + begin, map, n, {&best, 1, begin});
    absorb<false>(stretch, high, stats, [](int64_t, auto) {});
  }
  stats[kLabelLogit] = wide(x[best]);
  for (int64_t k = r * a.k; k < (r + 1) * a.k; ++k) {
    double log_odds = 0;
    if (!a.mask || a.mask[k]) {
      const double z = wide(x[a.index[k]]);
      log_odds = a.index[k] == best || nothing_finite(stats)
                     ? log_odds_of(stats)
                     : z - stats[kLabelLogit] - log_sum(without(stats, z));
    }
    static_cast<Real*>(a.log_odds)[k] = static_cast<Real>(log_odds);
  }
}

// Where a gradient is summed: in place, or for half precision in a float32 row.
template <class T>
static inline typename Wide<T>::type* gradient_row(T* out,
                                                   [[maybe_unused]] const Scratch& scratch) {
  if constexpr (sizeof(T) < sizeof(float))
    return scratch.row_f32;
  else
    return out;
}

// Sum over candidates c of g_c (onehot(c) - q_c), q_c the softmax of all entries but c.
template <class T>
static void candidate_backward_row(const CandidateBackwardArgs& a, int64_t r,
                                   const Scratch& scratch) {
  using Real = typename Wide<T>::type;
  const int64_t v = a.rows.v;
  const double* stats = a.stats + kNumStats * r;
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  T* out = static_cast<T*>(a.dlogits) + r * v;
  Real* sum = gradient_row(out, scratch);
  const int64_t best = static_cast<int64_t>(stats[kTopId]);
  const double top = stats[kLabelLogit], second = stats[kOthersMax];
  const bool alone = stats[kOthersSum] == 0;
  const Real* g = static_cast<const Real*>(a.dlog_odds);
  auto chosen = [&](int64_t k) { return !a.mask || a.mask[k]; };
  auto g_at = [&](int64_t k) { return static_cast<double>(g[k]); };

  double own = 0,
         beside = 0;  // sum of g of the largest; sum of g_c / (mass without c) of the others
  for (int64_t k = r * a.k; k < (r + 1) * a.k; ++k) {
    if (!chosen(k)) continue;
    if (a.index[k] == best)
      own += alone ? 0 : g_at(k);
    else
      beside += g_at(k) / without(stats, wide(x[a.index[k]]));
  }
  if (nothing_finite(stats)) {
    for (int64_t i = 0; i < v; ++i) from_double(0, out + i);
    return;
  }
  if (alone || (own == 0 && beside == 0)) {  // 0 times what may be NaN
    for (int64_t i = 0; i < v; ++i) sum[i] = 0;
  } else {
    const double per_e = -own / stats[kOthersSum] - beside * __builtin_exp(second - top);
    const LogitMap<T> map{nullptr, 1, 0};
    for (int64_t begin = 0; begin < v; begin += kMaxTile) {
      const int64_t n = begin + kMaxTile < v ? kMaxTile : v - begin;
      write_gradient<false>(x + begin, map, n, {&best, 1, begin}, second, {per_e, 0, 0},
                            sum + begin);
    }
  }
  sum[best] = static_cast<Real>(own - beside);
  for (int64_t k = r * a.k; k < (r + 1) * a.k; ++k) {
    const int64_t c = a.index[k];
    if (!chosen(k) || c == best) continue;
    const double z = wide(x[c]);  // its own share, which `beside` has taken from it, comes back
    sum[c] += static_cast<Real>(g_at(k) * (1 + __builtin_exp(z - top) / without(stats, z)));
  }
  if constexpr (sizeof(T) < sizeof(float))
    for (int64_t i = 0; i < v; ++i) from_double(static_cast<double>(sum[i]), out + i);
}
