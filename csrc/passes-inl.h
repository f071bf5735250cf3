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
  const float* e;     // masses, or null: they are made where they are needed
  const int32_t* id;  // token ids, or null where the index is the id

  int32_t id_at(int64_t i) const { return id ? id[i] : static_cast<int32_t>(i); }
  float s_at(int64_t i) const { return to_float(x[i]) * inv_t; }
};

struct Sums {
  int64_t z;  // sum of masses
  int64_t u;  // sum of surprisal masses
};

// Calls f(i, s) for each vector of a row; lanes past the end hold -inf. A short f gains a tenth
// from four copies of it side by side, a long one is no longer inlined.
template <int kUnroll = 1, class T, class Fn>
static inline void for_row(const T* x, int64_t begin, int64_t end, float inv_t, Fn&& f) {
  const F scale = fset(inv_t);
  int64_t i = begin;
  for (; kUnroll == 4 && i + 4 * W <= end; i += 4 * W) {
    const F a = mul(load(x + i), scale), b = mul(load(x + i + W), scale);
    const F c = mul(load(x + i + 2 * W), scale), d = mul(load(x + i + 3 * W), scale);
    f(i, a);
    f(i + W, b);
    f(i + 2 * W, c);
    f(i + 3 * W, d);
  }
  for (; i + W <= end; i += W) f(i, mul(load(x + i), scale));
  if (i < end) {
    T tail[W];
    for (int j = 0; j < W; ++j) set_minus_inf(tail + j);
    std::memcpy(tail, x + i, static_cast<size_t>(end - i) * sizeof(T));
    f(i, mul(load(tail), scale));
  }
}

// As for_row, but only where `wanted` chooses a lane, and at the end of the row. Which vectors
// these are is noted first, without a branch: one that is taken for a few vectors in a hundred
// would be mispredicted at most of them, at the cost of fifteen vectors each.
template <class T, class Wanted, class Fn>
static inline void for_wanted(const T* x, int64_t begin, int64_t end, float inv_t, Wanted&& wanted,
                              Fn&& f) {
  constexpr int64_t kChunk = 64 * W;
  const F scale = fset(inv_t);
  uint8_t at[64];
  int64_t i = begin;
  while (i + W <= end) {
    const int64_t vectors = end - i < kChunk ? (end - i) / W : 64;
    int64_t n = 0;
    for (int64_t j = 0; j < vectors; ++j) {
      at[n] = static_cast<uint8_t>(j);
      n += any(wanted(i + j * W, mul(load(x + i + j * W), scale)));
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t here = i + at[j] * W;
      f(here, mul(load(x + here), scale));
    }
    i += vectors * W;
  }
  for_row(x, i, end, inv_t, static_cast<Fn&&>(f));
}

template <class T, class Fn>
static inline void for_view(const View<T>& v, Fn&& f) {
  for_row(v.x, 0, v.n, v.inv_t, static_cast<Fn&&>(f));
}

template <class T>
static inline I ids_of(const View<T>& v, int64_t i) {
  return v.id ? iload(v.id + i) : iota(static_cast<int32_t>(i));
}

// Calls f(part, begin, end) for parts of [0, n) that begin with a block, at the same time where
// there is a team and a part is worth a thread. Returns how many there were.
template <class Fn>
static int in_parts(const Team* team, int64_t n, Fn&& f) {
  const int64_t most = team ? team->size : 1;
  const int64_t parts = n / kLeastPart < most ? n / kLeastPart : most;
  if (parts <= 1) {
    f(0, int64_t{0}, n);
    return 1;
  }
  const int64_t step = (n / kBlock + parts) / parts * kBlock;
  auto part = [&](int i) { f(i, i * step, (i + 1) * step < n ? (i + 1) * step : n); };
  const auto call = [](void* context, int i) { (*static_cast<decltype(part)*>(context))(i); };
  const int full = static_cast<int>((n + step - 1) / step);
  team->run(full, call, &part);
  return full;
}

struct RowStats {
  float max, min;
  bool nan;
};

static void join(RowStats* stats, const RowStats& others) {
  stats->max = others.max > stats->max ? others.max : stats->max;
  stats->min = others.min < stats->min ? others.min : stats->min;
  stats->nan |= others.nan;
}

// What f(begin, end) says of the parts of a row together.
template <class Fn>
static RowStats stats_in_parts(const Team* team, int64_t n, Fn&& f) {
  RowStats of_part[kMaxTeam];
  const int parts = in_parts(
      team, n, [&](int part, int64_t begin, int64_t end) { of_part[part] = f(begin, end); });
  for (int i = 1; i < parts; ++i) join(&of_part[0], of_part[i]);
  return of_part[0];
}

template <class T>
static RowStats scan_part(const T* x, int64_t n) {
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

// Extremes of the logits, and whether any is NaN: the only pass that may see special values.
template <class T>
static RowStats scan(const T* x, int64_t n, const Team* team) {
  return stats_in_parts(
      team, n, [&](int64_t begin, int64_t end) { return scan_part(x + begin, end - begin); });
}

// Masses of a part of a view that begins with a block: their sums, one sum per block, and the
// masses themselves where e is not null.
template <bool kWithU, class T>
static Sums weigh_part(const View<T>& v, int64_t from, int64_t to, float* e_out, int64_t* blocks) {
  Sums sums{0, 0};
  const F m = fset(v.m);
  for (int64_t begin = from, b = from / kBlock; begin < to; begin += kBlock, ++b) {
    const int64_t end = begin + kBlock < to ? begin + kBlock : to;
    L z = lzero(), u = lzero();
    for_row<4>(v.x, begin, end, v.inv_t, [&](int64_t i, F s) {
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

template <bool kWithU, class T>
static Sums weigh(const View<T>& v, float* e_out, int64_t* blocks, const Team* team) {
  Sums of_part[kMaxTeam];
  const int parts = in_parts(team, v.n, [&](int part, int64_t begin, int64_t end) {
    of_part[part] = weigh_part<kWithU>(v, begin, end, e_out, blocks);
  });
  Sums sums{0, 0};
  for (int i = 0; i < parts; ++i) sums = {sums.z + of_part[i].z, sums.u + of_part[i].u};
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

// Of one key.
struct Equals {
  float key;
  M operator()(F s, F, I) const { return eq(s, fset(key)); }
};

// Mass at least e, or ranked no lower than the guard.
struct MassCut {
  float e;
  RankCut guard;
  M operator()(F s, F mass, I ids) const {
    return both(gt(s, fset(-kInf)), either(ge(mass, fset(e)), guard(s, mass, ids)));
  }
};

// The same where the guard keeps nothing else.
struct LightCut {
  float e;
  M operator()(F s, F mass, I) const { return both(gt(s, fset(-kInf)), ge(mass, fset(e))); }
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

// Calls f(mass_at), mass_at(i, s) being the masses at i: stored ones, or made from s.
template <class T, class Fn>
static inline auto with_masses(const View<T>& v, Fn&& f) {
  const float* e = v.e;
  if (e) return f([e](int64_t i, F) { return load(e + i); });
  const F m = fset(v.m);
  return f([m](int64_t, F s) { return mass(sub(s, m)); });
}

// Calls f(i, s, chosen) for each vector of a view.
template <class T, class Test, class Fn>
static inline void for_survivors(const View<T>& v, const Test& test, Fn&& f) {
  with_masses(v, [&](const auto& mass_at) {
    for_view(v, [&](int64_t i, F s) { f(i, s, test(s, mass_at(i, s), ids_of(v, i))); });
  });
}

// Exact integer mass and number of some tokens.
struct Tally {
  int64_t z;
  int64_t count;
};

// What a test keeps of a part of a view that begins with a block; one sum per block where asked
// for.
template <class T, class Test>
static Tally tally_part(const View<T>& v, int64_t from, int64_t to, const Test& test,
                        int64_t* blocks) {
  Tally t{0, 0};
  with_masses(v, [&](const auto& mass_at) {
    for (int64_t begin = from, b = from / kBlock; begin < to; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < to ? begin + kBlock : to;
      L z = lzero();
      for_row(v.x, begin, end, v.inv_t, [&](int64_t i, F s) {
        const F e = mass_at(i, s);
        const M chosen = test(s, e, ids_of(v, i));
        t.count += count(chosen);
        z = add_if(chosen, z, truncated(e));
      });
      const int64_t block = total(z);
      if (blocks) blocks[b] = block;
      t.z += block;
    }
  });
  return t;
}

template <class T, class Test>
static Tally tally(const View<T>& v, const Test& test, int64_t* blocks, const Team* team) {
  Tally of_part[kMaxTeam];
  const int parts = in_parts(team, v.n, [&](int part, int64_t begin, int64_t end) {
    of_part[part] = tally_part(v, begin, end, test, blocks);
  });
  Tally t{0, 0};
  for (int i = 0; i < parts; ++i) t = {t.z + of_part[i].z, t.count + of_part[i].count};
  return t;
}

// Elements side by side: keys, masses and ids, in the order of the view they come from.
struct List {
  float* key;
  float* e;
  int32_t* id;
};
static inline View<float> view_of(const List& list, int64_t n) {
  return {list.key, n, 1.0f, 0.0f, list.e, list.id};
}

// Writes the ids of the survivors of a part of a view; returns how many there are.
template <class T, class Test>
static int64_t write_ids(const View<T>& view, int64_t begin, int64_t end, const Test& test,
                         int32_t* out) {
  const View<T> v = view;  // a copy, as in gather
  return with_masses(v, [&](const auto& mass_at) {
    int64_t n = 0;
    const auto chosen = [&](int64_t i, F s) { return test(s, mass_at(i, s), ids_of(v, i)); };
    for_wanted(v.x, begin, end, v.inv_t, chosen,
               [&](int64_t i, F s) __attribute__((always_inline)) {
                 const M m = chosen(i, s);
                 compress(out + n, m, ids_of(v, i));
                 n += count(m);
               });
    return n;
  });
}

// Copies the survivors, in order, to a list; the view may be that list itself.
template <class T, class Test>
static int64_t gather(const View<T>& view, const Test& test, const List& list) {
  // copies: the compiler takes every vector that is written for a change of what a reference holds
  const View<T> v = view;
  const List out = list;
  return with_masses(v, [&](const auto& mass_at) {
    int64_t n = 0;
    const auto chosen = [&](int64_t i, F s) { return test(s, mass_at(i, s), ids_of(v, i)); };
    for_wanted(v.x, 0, v.n, v.inv_t, chosen, [&](int64_t i, F s) __attribute__((always_inline)) {
      const F e = mass_at(i, s);
      const I ids = ids_of(v, i);
      const M m = test(s, e, ids);
      compress(out.key + n, m, s);
      compress(out.e + n, m, e);
      compress(out.id + n, m, ids);
      n += count(m);
    });
    return n;
  });
}
