// The row work of linear_divergence between the products of one tile of the vocabulary.

// e^x, and e^x - 1 in `less`, for x in [kLeastExponent, 0]; neither by cancellation, NaN stays NaN.
static inline F power(F x, F* less) {
  const Exponent p = exponent_of(x);
  const F reduced = mul(p.q, p.r);
  const F e = scale_by(add(reduced, fset(1.0f)), p.biased, 0);
  *less = choose(gt(x, fset(-0.34f)), reduced, sub(e, fset(1.0f)));  // above, k is 0
  return e;
}
static inline double power(double x, double* less) {
  *less = __builtin_expm1(x);
  return x > -0.5 ? 1 + *less : __builtin_exp(x);
}

// ln w for w in (0, 1], and y = w - 1 to more digits where w is near 1: 2 atanh(y / (2 + y)), of
// which the first term left out is below 3e-9 of the result.
static inline F logarithm(F w, F y) {
  F k;
  const F f = significand(w, &k);
  const F g = choose(eq(k, fset(0.0f)), y, sub(f, fset(1.0f)));
  const F s = quotient(g, add(fset(2.0f), g));
  const F z = mul(s, s);
  F series = fset(1.0f / 9);
  series = fused(series, z, fset(1.0f / 7));
  series = fused(series, z, fset(1.0f / 5));
  series = fused(series, z, fset(1.0f / 3));
  series = fused(series, z, fset(1.0f));
  return fused(k, fset(0.69314718f), mul(add(s, s), series));
}
static inline double logarithm(double w, double y) {
  return y > -0.5 ? __builtin_log1p(y) : __builtin_log(w);
}

// What the mixture m = beta q + (1 - beta) p needs of the logarithms of p and q.
template <class T>
struct Mixture {
  using Lanes = typename Wide<T>::Lanes;
  struct Terms {
    Lanes p, u, divergence;  // u = ln(p / m), 0 where p = q = 0; beta q ln(q / m) + (1 - beta) p u
  };
  Lanes beta, rest;

  explicit Mixture(double b) : beta(Wide<T>::set(b)), rest(Wide<T>::set(1 - b)) {}

  // From the larger of p and q, and their ratio e^x, x <= 0: ln(larger / m) = -ln(1 + c (e^x - 1)),
  // c the share of the smaller. So p = q gives 0, and a share of 0 none.
  Terms operator()(Lanes log_p, Lanes log_q) const {
    const Lanes zero = Wide<T>::set(0);
    const Lanes ratio = sub(log_p, log_q);
    const auto student = ge(ratio, zero);  // has the larger one
    const Lanes c = choose(student, beta, rest), d = choose(student, rest, beta);
    const Lanes x = maximum(Wide<T>::set(kLeastExponent), neg(absolute(ratio)));
    Lanes less;
    const Lanes e = power(x, &less);
    const Lanes upper = neg(logarithm(add(d, mul(c, e)), mul(c, less))), lower = add(upper, x);
    const Lanes larger = exponential(maximum(log_p, log_q)), smaller = mul(larger, e);
    const auto nothing = eq(larger, zero);
    const Lanes sum = mul(larger, add(mul(d, upper), mul(c, mul(e, lower))));
    return {choose(nothing, zero, choose(student, larger, smaller)),
            choose(nothing, zero, choose(student, upper, lower)), choose(nothing, zero, sum)};
  }
};

// Both logits of a tile of a row.
template <class T>
struct PairStretch {
  using Real = typename Wide<T>::type;
  using Lanes = typename Wide<T>::Lanes;
  LogitMap<T> student_map, teacher_map;
  Stretch<T> student, teacher;
  double student_high, teacher_high;

  PairStretch(const PairTile& a, int64_t r)
      : student_map{static_cast<const Real*>(a.bias), a.scale, a.cap},
        teacher_map{static_cast<const Real*>(a.teacher_bias), a.teacher_scale, a.teacher_cap} {
    const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
    const T* y = static_cast<const T*>(a.teacher) + r * a.teacher_stride;
    student_high = student.fill(x, student_map, a.rows.v, {nullptr, 0, 0});
    teacher_high = teacher.fill(y, teacher_map, a.rows.v, {nullptr, 0, 0});
  }

  // Calls f(i, z - m of the student, z - m of the teacher) for each vector from `begin` to `end`.
  template <class Fn>
  void each(int64_t begin, int64_t end, double student_top, double teacher_top, Fn&& f) const {
    const Lanes s = Wide<T>::set(student_top), t = Wide<T>::set(teacher_top);
    for (int64_t i = begin; i < end; i += Wide<T>::lanes)
      f(i, sub(Wide<T>::get(student.z + i), s), sub(Wide<T>::get(teacher.z + i), t));
  }
};

// Entries of a tile whose sums stay floats.
template <class T>
static constexpr int64_t float_block() {
  return kSumVectors * Wide<T>::lanes;
}

// A maximum as the origin of distances: 0 where there is nothing above -inf, which stays -inf.
static inline double origin(double top) { return top == -__builtin_inf() ? 0 : top; }

// What a larger maximum does to the sums of a row: distances that were d are d + shift.
struct Rescaling {
  double before, shift, shrink;

  Rescaling(double high, double* max, double* sum) : before(*sum) {
    const double last = *max;
    if (high > last) *max = high;
    shift = origin(last) - origin(*max);
    shrink = last == -__builtin_inf() ? 0 : shift == 0 ? 1 : __builtin_exp(shift);
    *sum = shrink > 0 ? *sum * shrink : *sum == *sum ? 0 : *sum;  // a NaN stays
  }
};

// The sums of a law, of a tile's e^(z - m), and of e^(z - m) ((z - m) - (z' - m')) under the first
// of the pair, the teacher where `kTeacherFirst`; none where `kPlain`.
template <bool kPlain, bool kTeacherFirst, class T>
static void sum_pair(const PairStretch<T>& pair, double* stats) {
  using Lanes = typename Wide<T>::Lanes;
  const Rescaling s(pair.student_high, stats + kStudentMax, stats + kStudentSum);
  const Rescaling t(pair.teacher_high, stats + kTeacherMax, stats + kTeacherSum);
  const Rescaling &first = kTeacherFirst ? t : s, &second = kTeacherFirst ? s : t;
  double& cross = stats[kDivergence];
  if (!kPlain)
    cross =
        first.shrink > 0 ? first.shrink * (cross + first.before * (first.shift - second.shift)) : 0;
  const Lanes zero = Wide<T>::set(0);
  const double tops[2] = {origin(stats[kStudentMax]), origin(stats[kTeacherMax])};
  const int64_t n = pair.student.n;
  for (int64_t begin = 0; begin < n; begin += float_block<T>()) {
    const int64_t end = begin + float_block<T>() < n ? begin + float_block<T>() : n;
    Lanes student = zero, teacher = zero, w = zero;
    pair.each(begin, end, tops[0], tops[1], [&](int64_t, Lanes ds, Lanes dt) {
      const Lanes es = exponential(ds), et = exponential(dt);
      student = add(student, es);
      teacher = add(teacher, et);
      if (kPlain) return;
      const Lanes e = kTeacherFirst ? et : es;
      const Lanes d = kTeacherFirst ? sub(dt, ds) : sub(ds, dt);
      w = add(w, choose(eq(e, zero), zero, mul(e, d)));  // 0 times infinite is 0 here
    });
    stats[kStudentSum] += static_cast<double>(sum_lanes(student));
    stats[kTeacherSum] += static_cast<double>(sum_lanes(teacher));
    if (!kPlain) cross += static_cast<double>(sum_lanes(w));
  }
}

// The second pass of kJsd: the divergence, and KL(student | m).
template <class T>
static void mix_pair(const PairStretch<T>& pair, double beta, double* stats) {
  using Lanes = typename Wide<T>::Lanes;
  const Mixture<T> mixture(beta);
  const Lanes log_s = Wide<T>::set(log_sum(stats[kStudentSum]));
  const Lanes log_t = Wide<T>::set(log_sum(stats[kTeacherSum]));
  const int64_t n = pair.student.n;
  for (int64_t begin = 0; begin < n; begin += float_block<T>()) {
    const int64_t end = begin + float_block<T>() < n ? begin + float_block<T>() : n;
    Lanes divergence = Wide<T>::set(0), centre = divergence;
    pair.each(begin, end, origin(stats[kStudentMax]), origin(stats[kTeacherMax]),
              [&](int64_t, Lanes ds, Lanes dt) {
                const auto terms = mixture(sub(ds, log_s), sub(dt, log_t));
                divergence = add(divergence, terms.divergence);
                centre = add(centre, mul(terms.p, terms.u));
              });
    stats[kDivergence] += static_cast<double>(sum_lanes(divergence));
    stats[kCentre] += static_cast<double>(sum_lanes(centre));
  }
}

template <class T>
static void pair_sum_row(const PairSumArgs& a, int64_t r, const Scratch&) {
  const PairStretch<T> pair(a, r);
  double* stats = a.stats + kNumPairStats * r;
  if (a.mixing) return mix_pair(pair, a.beta, stats);
  if (a.kind == kJsd) return sum_pair<true, false>(pair, stats);
  if (a.kind == kKl) return sum_pair<false, true>(pair, stats);
  sum_pair<false, false>(pair, stats);
}

// dL/dx = gain dD/dz dz/dx. dD/dz is p - q for kKl, and p (v - centre) for the others, where v is
// the difference of both z - m for kReverseKl and (1 - beta) ln(p / m) for kJsd.
template <int kKind, class T>
static void pair_gradient(const PairBackwardArgs& a, int64_t r, const PairStretch<T>& pair) {
  using Lanes = typename Wide<T>::Lanes;
  const double* stats = a.stats + kNumPairStats * r;
  const LogitMap<T>& map = pair.student_map;
  const bool capped = map.cap != 0;
  const double gain = a.gains[r] * (capped ? 1 : map.scale);
  const Lanes zero = Wide<T>::set(0), centre = Wide<T>::set(stats[kCentre]);
  const Lanes gain_s = Wide<T>::set(gain / stats[kStudentSum]);
  const Lanes gain_t = Wide<T>::set(gain / stats[kTeacherSum]);
  const Lanes gain_m = Wide<T>::set(gain * (1 - a.beta));
  const Lanes log_s = Wide<T>::set(log_sum(stats[kStudentSum]));
  const Lanes log_t = Wide<T>::set(log_sum(stats[kTeacherSum]));
  const Mixture<T> mixture(a.beta);
  const int64_t n = a.rows.v;
  T* out = static_cast<T*>(a.out) + r * n;
  pair.each(0, n, origin(stats[kStudentMax]), origin(stats[kTeacherMax]),
            [&](int64_t i, Lanes ds, Lanes dt) {
              Lanes g;
              if constexpr (kKind == kJsd) {
                const auto terms = mixture(sub(ds, log_s), sub(dt, log_t));
                g = mul(gain_m, mul(terms.p, sub(terms.u, centre)));
              } else {
                const Lanes e = exponential(ds);
                g = kKind == kKl
                        ? sub(mul(gain_s, e), mul(gain_t, exponential(dt)))
                        : choose(eq(e, zero), zero, mul(mul(gain_s, e), sub(sub(ds, dt), centre)));
              }
              if (capped) g = mul(g, map.slope(Wide<T>::get(pair.student.z + i)));
              store_until(out, i, n, g);
            });
}

template <class T>
static void pair_backward_row(const PairBackwardArgs& a, int64_t r, const Scratch&) {
  const PairStretch<T> pair(a, r);  // before `out` is written, which may be what it was read from
  if (a.kind == kKl) return pair_gradient<kKl>(a, r, pair);
  if (a.kind == kReverseKl) return pair_gradient<kReverseKl>(a, r, pair);
  pair_gradient<kJsd>(a, r, pair);
}
