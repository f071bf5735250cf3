// Passes over a view: the whole row, or the list of its survivors.

constexpr int64_t kBlock = 1024;  // elements whose masses are summed together for the draw
constexpr int32_t kAllIds = 0x7fffffff;
constexpr float kInf = __builtin_inff();
constexpr float kLowestKey = -0x1.fffffep127f;  // the smallest key of a token above -inf

// Scaled logits are x[i] * inv_t; a survivor of a filter has an entry in the lists of a view.
template <class T>
struct View {
  const T* x;
  int64_t n;
  float inv_t;
  float m;            // the row's largest scaled logit
  const float* e;     // masses, or null while not known
  const int32_t* id;  // token ids, or null where the index is the id

  int32_t id_at(int64_t i) const { return id ? id[i] : static_cast<int32_t>(i); }
  float s_at(int64_t i) const { return to_float(x[i]) * inv_t; }
};

struct Sums {
  int64_t z;  // sum of masses
  int64_t u;  // sum of surprisal masses
};

// Calls f(i, s) for each vector of a row; lanes past the end hold -inf.
template <class T, class Fn>
static inline void for_row(const T* x, int64_t begin, int64_t end, float inv_t, Fn&& f) {
  const F scale = fset(inv_t);
  int64_t i = begin;
  for (; i + W <= end; i += W) f(i, mul(load(x + i), scale));
  if (i < end) {
    T tail[W];
    for (int j = 0; j < W; ++j) set_minus_inf(tail + j);
    std::memcpy(tail, x + i, static_cast<size_t>(end - i) * sizeof(T));
    f(i, mul(load(tail), scale));
  }
}

template <class T, class Fn>
static inline void for_view(const View<T>& v, Fn&& f) {
  for_row(v.x, 0, v.n, v.inv_t, static_cast<Fn&&>(f));
}

template <class T>
static inline I ids_of(const View<T>& v, int64_t i) {
  return v.id ? iload(v.id + i) : iota(static_cast<int32_t>(i));
}

struct RowStats {
  float max, min;
  bool nan;
};

// Extremes of the logits, and whether any is NaN: the only pass that may see special values.
template <class T>
static RowStats scan(const T* x, int64_t n) {
  F high[2] = {fset(-kInf), fset(-kInf)}, low[2] = {fset(kInf), fset(kInf)};
  M nan = unordered(fset(0.0f), fset(0.0f));
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const F a = load(x + i), b = load(x + i + W);
    nan = either(nan, unordered(a, b));
    high[0] = maximum(a, high[0]);
    high[1] = maximum(b, high[1]);
    low[0] = minimum(a, low[0]);
    low[1] = minimum(b, low[1]);
  }
  RowStats stats{max_lane(maximum(high[0], high[1])), min_lane(minimum(low[0], low[1])), any(nan)};
  for (; i < n; ++i) {
    const float a = to_float(x[i]);
    stats.nan |= a != a;
    stats.max = a > stats.max ? a : stats.max;
    stats.min = a < stats.min ? a : stats.min;
  }
  return stats;
}

// Masses of a view: their sums, one sum per block, and the masses themselves where e is not null.
template <bool kWithU, class T>
static Sums weigh(const View<T>& v, float* e_out, int64_t* blocks) {
  Sums sums{0, 0};
  const F m = fset(v.m);
  for (int64_t begin = 0, b = 0; begin < v.n; begin += kBlock, ++b) {
    const int64_t end = begin + kBlock < v.n ? begin + kBlock : v.n;
    L z = lzero(), u = lzero();
    for_row(v.x, begin, end, v.inv_t, [&](int64_t i, F s) {
      const F d = sub(s, m);
      const F e = mass(d);
      if (e_out) store(e_out + i, e);
      z = add_truncated(z, e);
      if (kWithU) u = add_truncated(u, surprisal_mass(e, d));
    });
    const int64_t block = total(z);
    if (blocks) blocks[b] = block;
    sums.z += block;
    if (kWithU) sums.u += total(u);
  }
  return sums;
}

// A survivor test: the conjunction that one filter adds, evaluated on (s, e, id).
struct Everything {
  M operator()(F s, F, I) const { return gt(s, fset(-kInf)); }
};

// Ranked no lower than (key, id); with id = kAllIds ties all stay.
struct RankCut {
  float key;
  int32_t id;
  M operator()(F s, F, I ids) const {
    return either(gt(s, fset(key)), both(eq(s, fset(key)), ile(ids, iset(id))));
  }
};

// Mass at least e, or ranked no lower than the guard.
struct MassCut {
  float e;
  RankCut guard;
  M operator()(F s, F mass, I ids) const {
    return both(gt(s, fset(-kInf)), either(ge(mass, fset(e)), guard(s, mass, ids)));
  }
};

// Minus the distance to the mean surprisal: typical's key, the larger the more typical.
struct TypicalKey {
  float m, centre;
  F operator()(F s) const {
    const F key = neg(absolute(add(sub(s, fset(m)), fset(centre))));
    // s - m may overflow: such a token is the least typical, but alive
    return choose(gt(s, fset(-kInf)), maximum(key, fset(kLowestKey)), fset(-kInf));
  }
};

struct Band {
  TypicalKey key;
  RankCut cut;
  M operator()(F s, F e, I ids) const { return both(gt(s, fset(-kInf)), cut(key(s), e, ids)); }
};

// Calls f(i, s, e, ids, chosen) for each vector of a view; e is 0 where masses are not known.
template <class T, class Test, class Fn>
static inline void for_survivors(const View<T>& v, const Test& test, Fn&& f) {
  for_view(v, [&](int64_t i, F s) {
    const F e = v.e ? load(v.e + i) : fset(0.0f);
    const I ids = ids_of(v, i);
    f(i, s, e, ids, test(s, e, ids));
  });
}

// Number of survivors and their masses; one sum per block for the draw.
struct Tally {
  int64_t count;
  int64_t z;
};
template <class T, class Test>
static Tally tally(const View<T>& v, const Test& test, int64_t* blocks) {
  Tally t{0, 0};
  for (int64_t begin = 0, b = 0; begin < v.n; begin += kBlock, ++b) {
    View<T> part = v;
    part.n = begin + kBlock < v.n ? begin + kBlock : v.n;
    L z = lzero();
    for_row(v.x, begin, part.n, v.inv_t, [&](int64_t i, F s) {
      const F e = load(v.e + i);
      const M chosen = test(s, e, ids_of(v, i));
      t.count += count(chosen);
      z = add_truncated(z, keep_if(chosen, e));
    });
    blocks[b] = total(z);
    t.z += blocks[b];
  }
  return t;
}

// Copies the survivors, in order, to a list; the view may be that list itself.
template <class T, class Test>
static int64_t gather(const View<T>& v, const Test& test, float* s_out, float* e_out,
                      int32_t* id_out) {
  int64_t n = 0;
  for_survivors(v, test, [&](int64_t, F s, F e, I ids, M chosen) {
    if (!any(chosen)) return;
    compress(s_out + n, chosen, s);
    compress(e_out + n, chosen, e);
    compress(id_out + n, chosen, ids);
    n += count(chosen);
  });
  return n;
}
