// A slice of rows whose vocabulary is split over ranks.

constexpr int64_t kLastId = 0x7fffffff;
constexpr int64_t kNoKey = (int64_t{-0x7f800000} + 1) * (int64_t{1} << 31);  // below every token

// Keys from here on, in terms of this slice's ids.
static RankCut cut_of(int64_t key, int64_t first) {
  const int64_t value = key >> 31, id = kLastId - (key & kLastId);
  if (value > 0x7f800000) return {kInf, -1};
  const int64_t local = id == kLastId ? kAllIds : id - first;
  return {from_ordered(value), static_cast<int32_t>(local < -1 ? -1 : local)};
}

static int64_t key_of(float value, int64_t id) {
  return int64_t{ordered(value)} * (int64_t{1} << 31) + (kLastId - id);
}

// The tests of one problem.
struct SupportTest {
  RankCut cut;
  int heavy = 0;  // how many tests of masses there are
  MassCut mass_cuts[kMassTests];
  bool banded;
  Band band;

  SupportTest(const SliceArgs& a, int64_t p)
      : cut(cut_of(a.cut[p], a.first)),
        banded(a.band[p] > kNoKey),
        band{{a.m[p], a.centre[p]}, cut_of(a.band[p], a.first)} {
    for (int64_t i = p * kMassTests; i < (p + 1) * kMassTests; ++i)
      if (a.least[i] > 0)
        mass_cuts[heavy++] = {float_at_least(a.least[i]), cut_of(a.guard[i], a.first)};
  }

  M operator()(F s, F e, I ids) const {
    M alive = cut(s, e, ids);
    for (int i = 0; i < heavy; ++i) alive = both(alive, mass_cuts[i](s, e, ids));
    return banded ? both(alive, band(s, e, ids)) : alive;
  }
};

// Those that survive and are not from an end on.
struct BelowTest {
  const SupportTest& support;
  TypicalKey typicality;
  bool by_typicality;
  RankCut end;

  M operator()(F s, F e, I ids) const {
    const F key = by_typicality ? typicality(s) : s;
    return but_not(support(s, e, ids), end(key, e, ids));
  }
};

template <class T>
static View<T> slice_view(const SliceArgs& a, int64_t p) {
  const T* x = static_cast<const T*>(a.rows.data) + a.row[p] * a.rows.stride;
  return {x, a.rows.v, a.inverse[p], a.m[p], nullptr, nullptr};
}

template <class T, class Test>
static void tally_survivors(const View<T>& view, const Test& test, const Team* team, int64_t* out) {
  int64_t of_part[kMaxTeam][3];
  const F m = fset(view.m);
  const int parts = in_parts(team, view.n, [&](int part, int64_t begin, int64_t end) {
    int64_t n = 0;
    L z = lzero(), u = lzero();
    for_row(view.x, begin, end, view.inv_t, [&](int64_t i, F s) {
      const F d = sub(s, m), e = mass(d);
      const M alive = test(s, e, ids_of(view, i));
      n += count(alive);
      z = add_truncated(z, keep_if(alive, e));
      u = add_truncated(u, keep_if(alive, surprisal_mass(e, d)));
    });
    of_part[part][0] = n;
    of_part[part][1] = total(z);
    of_part[part][2] = total(u);
  });
  for (int i = 0; i < 3; ++i) {
    out[i] = 0;
    for (int part = 0; part < parts; ++part) out[i] += of_part[part][i];
  }
}

// The survivors as a list, their keys in place of scaled logits; surprisal masses to fine_e where
// they are asked for.
template <class T, class Test>
static View<float> list_survivors(const View<T>& view, const Test& test, bool typicality,
                                  float centre, bool with_u, const Scratch& scratch) {
  const List list{scratch.list_s, scratch.list_e, scratch.list_id};
  const int64_t n = gather(view, test, list);
  const TypicalKey key{view.m, centre};
  for (int64_t i = 0; i < n; i += W) {
    const F s = load(list.key + i), e = load(list.e + i);
    if (with_u) store(scratch.fine_e + i, surprisal_mass(e, sub(s, fset(view.m))));
    if (typicality) store(list.key + i, key(s));
  }
  View<float> listed = view_of(list, n);
  listed.m = view.m;
  return listed;
}

template <class T>
static void slice_tally_row(const SliceTallyArgs& a, int64_t p, const Scratch& scratch) {
  const View<T> view = slice_view<T>(a, p);
  const SupportTest test(a, p);
  if (a.g == 0) {
    int64_t* out = a.sums + 3 * p;
    if (test.heavy == 0 && !test.banded) return tally_survivors(view, test.cut, scratch.team, out);
    return tally_survivors(view, test, scratch.team, out);
  }
  const View<float> listed = list_survivors(view, test, a.typicality, a.centre[p], true, scratch);
  const int64_t* pivots = a.pivots + p * a.g;
  int64_t* sums = a.sums + 3 * p * a.g;
  for (int64_t i = 0; i < 3 * a.g; ++i) sums[i] = 0;
  for (int64_t i = 0; i < listed.n; ++i) {
    const int64_t key = key_of(listed.x[i], listed.id[i] + a.first);
    int64_t low = 0, high = a.g;  // the number of pivots that it reaches
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (pivots[middle] <= key)
        low = middle + 1;
      else
        high = middle;
    }
    if (low == 0) continue;
    int64_t* at = sums + 3 * (low - 1);
    at[0] += 1;
    at[1] += static_cast<int64_t>(listed.e[i]);
    at[2] += static_cast<int64_t>(scratch.fine_e[i]);
  }
  for (int64_t i = 3 * a.g - 4; i >= 0; --i) sums[i] += sums[i + 3];
}

// Writes the best of a view by (key, id), at most so many; returns how many there are.
template <class T>
static int64_t best_of(const View<T>& view, int64_t wanted, int32_t* ids, const Scratch& scratch) {
  if (wanted == 0) return 0;
  const RankCut cut = select<true>(view, RankKey{}, wanted, view.n, false, scratch).cut;
  const List list{scratch.cand_key, scratch.cand_e, scratch.cand_id};
  const int64_t n = gather(view, cut, list);
  for (int64_t i = 0; i < n; ++i) {  // stable, so ids stay ascending among equal keys
    const float key = list.key[i];
    const int32_t id = list.id[i];
    int64_t at = i;
    for (; at > 0 && list.key[at - 1] < key; --at) {
      list.key[at] = list.key[at - 1];
      ids[at] = ids[at - 1];
    }
    list.key[at] = key;
    ids[at] = id;
  }
  return n;
}

// Fills in the logits of n ids, which then count from the first of all; -1 behind them.
template <class T>
static void name_best(const T* x, int64_t n, int64_t count, int64_t first, float* logits,
                      int32_t* ids) {
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = i < n ? to_float(x[ids[i]]) : -kInf;
    ids[i] = i < n ? static_cast<int32_t>(ids[i] + first) : -1;
  }
}

template <class T>
static void slice_best_row(const SliceBestArgs& a, int64_t p, const Scratch& scratch) {
  const View<T> view = slice_view<T>(a, p);
  const SupportTest test(a, p);
  const BelowTest below{test, {a.m[p], a.centre[p]}, a.typicality, cut_of(a.end[p], a.first)};
  const View<float> listed = list_survivors(view, below, a.typicality, a.centre[p], false, scratch);
  int32_t* ids = a.ids + p * a.count;
  const int64_t n = best_of(listed, listed.n < a.count ? listed.n : a.count, ids, scratch);
  name_best(view.x, n, a.count, a.first, a.x + p * a.count, ids);
}

template <class T>
static void slice_top_row(const SliceTopArgs& a, int64_t r, const Scratch& scratch) {
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  int32_t* ids = a.ids + r * a.count;
  float* logits = a.x + r * a.count;
  const RowStats stats = scan(x, a.rows.v, scratch.team);
  if (stats.nan || stats.max == kInf) return name_best(x, 0, a.count, a.first, logits, ids);
  const View<T> view{x, a.rows.v, 1.0f, stats.max > -kInf ? stats.max : 0.0f, nullptr, nullptr};
  const int64_t finite =
      stats.min > -kInf ? view.n : count_chosen(view, RankCut{kLowestKey, kAllIds});
  int64_t n = best_of(view, finite < a.count ? finite : a.count, ids, scratch);
  for (int32_t i = 0; n < a.count && i < view.n; ++i)
    if (to_float(x[i]) == -kInf) ids[n++] = i;
  name_best(x, n, a.count, a.first, logits, ids);
}

template <class T>
static void slice_find_row(const SliceFindArgs& a, int64_t p, const Scratch& scratch) {
  const View<T> view = slice_view<T>(a, p);
  const SupportTest test(a, p);
  tally(view, test, scratch.blocks, scratch.team);
  const int64_t id =
      locate(view, test, a.target[p], [&](int64_t b) { return scratch.blocks[b]; }, scratch);
  a.x[p] = to_float(view.x[id]);
  a.ids[p] = id + a.first;
}

template <class T>
static void slice_list_row(const SliceListArgs& a, int64_t p, const Scratch& scratch) {
  const View<T> view = slice_view<T>(a, p);
  const int64_t n = write_ids(view, 0, view.n, SupportTest(a, p), scratch.list_id);
  if (n == 0) return;
  int32_t* ids = a.supports.room(a.supports.lists, p, n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(scratch.list_id[i] + a.first);
}

static void masses_of(const MassesArgs& a, const Scratch&, int64_t begin, int64_t end) {
  for_row(a.d, begin, end, 1.0f, [&](int64_t i, F d) {
    float w[W], u[W];
    const F e = mass(d);
    store(w, e);
    store(u, surprisal_mass(e, d));
    for (int64_t j = 0; j < W && i + j < end; ++j) {
      a.w[i + j] = static_cast<int64_t>(w[j]);
      a.u[i + j] = static_cast<int64_t>(u[j]);
    }
  });
}

static void targets_of(const TargetsArgs& a, const Scratch&, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    a.targets[i] = draw_target(philox(a.seeds[i], a.positions[i], 0).first, a.totals[i]);
}

static void logs_of(const LogsArgs& a, const Scratch&, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) a.logs[i] = log_mass(a.masses[i]);
}

static void exps_of(const ExpsArgs& a, const Scratch&, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) a.exps[i] = exp64(a.x[i]);
}
