// What the loss operators do to a stretch of logits: map, largest other, sum of exponentials.
// Here e^d is accurate to 1.1e-7 (the specified mass of sampling, to 1.8e-6); float64 has a path of
// its own in plain double arithmetic.

constexpr float kLeastExponent = -87.0f;  // e^d is 0 below: 2^-126 is the last normal number
constexpr int64_t kSumVectors = 64;       // float sums run this far, then go to a double

// (e^r - 1) / r of the reduced argument r = d - k ln 2; minimax on |r| <= ln 2 / 2, error 2e-9.
struct Exponent {
  F biased, r, q;
};
static inline Exponent exponent_of(F d) {
  const F biased = fused(d, fset(kLog2E), fset(kRound));
  const F k = sub(biased, fset(kRound));
  // the high part of ln 2 has nine bits, so that its product with k is exact
  const F r = fused(k, fset(2.12194440e-4f), fused(k, fset(-0.693359375f), d));
  F q = fset(0.001384356f);
  q = fused(q, r, fset(0.0083742365f));
  q = fused(q, r, fset(0.04166801f));
  q = fused(q, r, fset(0.1666643f));
  q = fused(q, r, fset(0.49999994f));
  q = fused(q, r, fset(1.0f));
  return {biased, r, q};
}

// e^d for d <= 0; NaN stays NaN.
static inline F exponential(F d) {
  const Exponent x = exponent_of(maximum(fset(kLeastExponent), d));
  const F e = scale_by(fused(x.q, x.r, fset(1.0f)), x.biased, 0);
  return choose(gt(fset(kLeastExponent), d), fset(0.0f), e);
}
static inline double exponential(double d) { return __builtin_exp(d); }

// e of d where d < 0, else 0.
static inline F below_one(F d, F e) { return choose(gt(fset(0.0f), d), e, fset(0.0f)); }
static inline double below_one(double d, double e) { return d < 0 ? e : 0; }

// tanh |x| = (1 - e) / (1 + e), e = e^(-2|x|), with 1 - e taken from q where it would cancel.
static inline F hyperbolic_tangent(F x) {
  const F a = absolute(x);
  const F d = mul(fset(-2.0f), a);
  const Exponent p = exponent_of(maximum(fset(kLeastExponent), d));
  const F reduced = mul(p.q, p.r);
  const F e = scale_by(add(reduced, fset(1.0f)), p.biased, 0);
  const F gone = choose(gt(fset(0.17f), a), neg(reduced), sub(fset(1.0f), e));
  const F t = quotient(gone, add(fset(1.0f), e));
  return choose(gt(fset(0.0f), x), neg(t), t);
}
static inline double hyperbolic_tangent(double x) { return __builtin_tanh(x); }

// The float type of sums and gradients, and lanes of it.
template <class T>
struct Wide {
  using type = float;
  using Lanes = F;
  static constexpr int lanes = W;
  // a NaN of the caller's may have bits that rounding would carry away; this one has not
  static F set(double x) { return fset(x == x ? static_cast<float>(x) : __builtin_nanf("")); }
  static F get(const float* p) { return load(p); }
};
template <>
struct Wide<double> {
  using type = double;
  using Lanes = double;
  static constexpr int lanes = 1;
  static double set(double x) { return x; }
  static double get(const double* p) { return *p; }
};

// The vocabulary of vec_*.h for one double.
static inline double load(const double* p) { return *p; }
static inline void store(double* p, double x) { *p = x; }
static inline double add(double a, double b) { return a + b; }
static inline double sub(double a, double b) { return a - b; }
static inline double mul(double a, double b) { return a * b; }
static inline double quotient(double a, double b) { return a / b; }
static inline double maximum(double a, double b) { return a > b ? a : b; }
static inline double neg(double a) { return -a; }
static inline double absolute(double a) { return a < 0 ? -a : a; }
static inline bool ge(double a, double b) { return a >= b; }
static inline bool eq(double a, double b) { return a == b; }
static inline double choose(bool m, double a, double b) { return m ? a : b; }
static inline double max_lane(double a) { return a; }
static inline double sum_lanes(double a) { return a; }
static inline double wide(double x) { return x; }
template <class T>
static inline float wide(T x) {
  return to_float(x);
}

// z = cap tanh(scale (x + bias) / cap); cap 0: no cap. `bias` belongs to the stretch, or is null.
template <class T>
struct LogitMap {
  using Real = typename Wide<T>::type;
  using Lanes = typename Wide<T>::Lanes;
  const Real* bias;
  double scale, cap;
  bool plain() const { return !bias && scale == 1 && cap == 0; }

  Lanes operator()(Lanes x, const Real* b) const {
    if (b) x = add(x, Wide<T>::get(b));
    x = mul(x, Wide<T>::set(scale));
    if (cap == 0) return x;
    return mul(Wide<T>::set(cap), hyperbolic_tangent(mul(x, Wide<T>::set(1 / cap))));
  }
  // One vector whose lanes from n on are past the end, and mean nothing.
  Lanes partial(const T* x, int64_t i, int64_t n) const {
    constexpr int lanes = Wide<T>::lanes;
    T part[lanes];
    Real shift[lanes];
    for (int j = 0; j < lanes; ++j) {
      const int64_t at = i + j < n ? i + j : i;
      part[j] = x[at];
      shift[j] = bias ? bias[at] : 0;
    }
    return plain() ? load(part) : (*this)(load(part), shift);
  }
  // dz / dx
  Lanes slope(Lanes z) const {
    if (cap == 0) return Wide<T>::set(scale);
    const Lanes t = mul(z, Wide<T>::set(1 / cap));
    return mul(Wide<T>::set(scale), sub(Wide<T>::set(1), mul(t, t)));
  }
  double slope_at(double z) const { return cap == 0 ? scale : scale * (1 - z / cap * (z / cap)); }
};

// Ids that a stretch leaves out: those of `id`, less `first`, that are among its own.
struct Labels {
  const int64_t* id;
  int64_t count, first;
  // Calls f(place) for each of them; whether there was one.
  template <class Fn>
  bool visit(int64_t n, Fn&& f) const {
    bool any = false;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = id[k] - first;
      if (at < 0 || at >= n) continue;
      f(at);
      any = true;
    }
    return any;
  }
};

// Mapped logits of one stretch, -inf at the labels and past the end.
template <class T>
struct Stretch {
  using Real = typename Wide<T>::type;
  using Lanes = typename Wide<T>::Lanes;
  static constexpr int lanes = Wide<T>::lanes;
  Real z[kMaxTile + 64];
  int64_t n;

  // Fills it and returns the largest; NaN is passed over here and met in the sum.
  double fill(const T* x, const LogitMap<T>& map, int64_t count, const Labels& labels) {
    n = count;
    const bool plain = map.plain();
    Lanes best[2] = {Wide<T>::set(-__builtin_inf()), Wide<T>::set(-__builtin_inf())};
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      for (int j = 0; j < 2; ++j) {
        const int64_t at = i + j * lanes;
        const Lanes x_at = load(x + at);
        const Lanes value = plain ? x_at : map(x_at, map.bias ? map.bias + at : nullptr);
        store(z + at, value);
        best[j] = maximum(value, best[j]);
      }
    }
    for (; i < n; i += lanes) store(z + i, map.partial(x, i, n));
    for (int j = 0; j < lanes; ++j) z[n + j] = -static_cast<Real>(__builtin_inf());
    if (labels.visit(n, [&](int64_t at) { z[at] = -static_cast<Real>(__builtin_inf()); }))
      return largest(0);
    const double vectors = max_lane(maximum(best[0], best[1]));
    const double rest = largest(n / (2 * lanes) * (2 * lanes));
    return vectors > rest ? vectors : rest;
  }

  // Adds the sums of e = e^(z - m), of e (z - m), of e^2 and of e where it is below 1; calls f(i,
  // e) for each vector.
  template <bool kMoments, class Fn>
  void sum(double m, double* stats, Fn&& f) const {
    const Lanes top = Wide<T>::set(m);
    constexpr int64_t block = kSumVectors * lanes;
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = begin + block < n ? begin + block : n;
      Lanes s[2] = {Wide<T>::set(0), Wide<T>::set(0)}, w = Wide<T>::set(0), q = w, rest = w;
      for (int64_t i = begin; i < end; i += 2 * lanes) {
        for (int j = 0; j < 2; ++j) {
          const int64_t at = i + j * lanes;
          if (at >= end) break;
          const Lanes d = sub(Wide<T>::get(z + at), top);
          const Lanes e = exponential(d);
          s[j] = add(s[j], e);
          if (kMoments) {  // 0 * -inf would be NaN
            w = add(w, mul(e, maximum(Wide<T>::set(kLeastExponent), d)));
            q = add(q, mul(e, e));
            rest = add(rest, below_one(d, e));
          }
          f(at, e);
        }
      }
      stats[kOthersSum] += static_cast<double>(sum_lanes(add(s[0], s[1])));
      if (!kMoments) continue;
      stats[kOthersWeighted] += static_cast<double>(sum_lanes(w));
      stats[kOthersSquared] += static_cast<double>(sum_lanes(q));
      stats[kOthersRest] += static_cast<double>(sum_lanes(rest));
    }
  }

  bool has_nan() const {
    for (int64_t i = 0; i < n; ++i)
      if (z[i] != z[i]) return true;
    return false;
  }

 private:
  double largest(int64_t begin) const {
    double m = -__builtin_inf();
    for (int64_t i = begin; i < n; ++i)
      if (z[i] > m) m = z[i];
    return m;
  }
};

// ln of a sum: log64 takes positive normal numbers only.
static inline double log_sum(double s) { return s > 0 ? log64(s) : s == 0 ? -__builtin_inf() : s; }

// z_y - logsumexp of the others: +inf where there are none.
static inline double log_odds_of(const double* stats) {
  if (stats[kOthersSum] == 0) return __builtin_inf();
  return stats[kLabelLogit] - stats[kOthersMax] - log_sum(stats[kOthersSum]);
}

// Takes the others of a stretch into the running maximum and sums of a row; calls f(i, e) for each
// vector of e^(z - m), unless there is none above -inf. Returns the factor of what was summed
// before.
template <bool kMoments, class T, class Fn>
static inline double absorb(const Stretch<T>& stretch, double high, double* stats, Fn&& f) {
  const double before = stats[kOthersMax];
  if (high == -__builtin_inf()) {
    if (stretch.has_nan()) stats[kOthersSum] = __builtin_nan("");
    return 1;
  }
  double shrink = 1;
  if (high > before) {
    shrink = before == -__builtin_inf() ? 0 : __builtin_exp(before - high);
    if (kMoments && shrink > 0) {
      stats[kOthersWeighted] =
          shrink * (stats[kOthersWeighted] + stats[kOthersSum] * (before - high));
      stats[kOthersSquared] *= shrink * shrink;
      stats[kOthersRest] = stats[kOthersSum] * shrink;
    }
    stats[kOthersSum] *= shrink;
    stats[kOthersMax] = high;
  }
  stretch.template sum<kMoments>(stats[kOthersMax], stats, static_cast<Fn&&>(f));
  return shrink;
}

// Writes as many lanes as are left before the end.
template <class T, class Lanes>
static inline void store_until(T* out, int64_t i, int64_t end, Lanes x) {
  constexpr int lanes = Wide<T>::lanes;
  if (i + lanes <= end) return store(out + i, x);
  T part[lanes];
  store(part, x);
  std::memcpy(out + i, part, static_cast<size_t>(end - i) * sizeof(T));
}

static inline void from_double(double x, double* out) { *out = x; }
template <class T>
static inline void from_double(double x, T* out) {
  from_float(x == x ? static_cast<float>(x) : __builtin_nanf(""), out);
}

// dL/dz = e (a + b d + c e), d = z - m, e = e^d.
struct Gains {
  double a, b, c;
};

// Writes dL/dz dz/dx over a stretch; 0 at the labels; b and c only with `kMoments`. May work in
// place.
template <bool kMoments, class T, class Out>
static inline void write_gradient(const T* x, const LogitMap<T>& map, int64_t n,
                                  const Labels& labels, double m, const Gains& gains, Out* out) {
  constexpr int lanes = Wide<T>::lanes;
  using Lanes = typename Wide<T>::Lanes;
  const bool capped = map.cap != 0, plain = map.plain();
  const double unit = capped ? 1 : map.scale;
  const Lanes top = Wide<T>::set(m), a = Wide<T>::set(gains.a * unit);
  const Lanes b = Wide<T>::set(gains.b * unit), c = Wide<T>::set(gains.c * unit);
  auto gradient = [&](Lanes z) {
    const Lanes d = sub(z, top), e = exponential(d);
    Lanes per_e = a;
    if (kMoments) per_e = add(add(a, mul(c, e)), mul(b, maximum(Wide<T>::set(kLeastExponent), d)));
    const Lanes g = mul(per_e, e);
    return capped ? mul(g, map.slope(z)) : g;
  };
  int64_t i = 0;
  if (plain)
    for (; i + lanes <= n; i += lanes) store(out + i, gradient(load(x + i)));
  for (; i + lanes <= n; i += lanes)
    store(out + i, gradient(map(load(x + i), map.bias ? map.bias + i : nullptr)));
  if (i < n) store_until(out, i, n, gradient(map.partial(x, i, n)));
  labels.visit(n, [&](int64_t at) { from_double(0, out + at); });
}
