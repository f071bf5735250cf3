// A row in pieces: its tokens ordered by their logit, but only from one piece to the next. Scaling
// keeps that order, so adaptors of every temperature share it, and a filter looks only at the
// pieces where it cuts; what it does to the others is known from their bounds.

// Tokens of piece p have low[p] <= x <= high[p] and indices begin(p) to end[p]. Among equal logits
// ids ascend, but where scaling makes logits of two pieces equal.
struct Pieces {
  static constexpr int kMost = 16;

  int count = 0;
  int64_t end[kMost];
  float low[kMost], high[kMost];
  int64_t z[kMost];  // mass, at the temperature at hand

  int64_t begin(int p) const { return p > 0 ? end[p - 1] : 0; }
  int64_t size(int p) const { return end[p] - begin(p); }
};

// The quartiles of a sample, from high to low.
template <class T>
static void quartiles(const T* x, int64_t n, float* pivots) {
  constexpr int kSample = 64;
  float sample[kSample];
  for (int j = 0; j < kSample; ++j) sample[j] = to_float(x[(2 * j + 1) * n / (2 * kSample)]);
  pivots[0] = pivots[1] = pivots[2] = kInf;
  for (int j = 0; j < kSample; ++j) {
    int above = 0;
    for (int i = 0; i < kSample; i += W) above += count(gt(load(sample + i), fset(sample[j])));
    for (int p = 0; p < 3; ++p)
      if (above <= (p + 1) * kSample / 4 && sample[j] < pivots[p]) pivots[p] = sample[j];
  }
  for (int p = 0; p < 3; ++p) pivots[p] = pivots[p] > kLowestKey ? pivots[p] : kLowestKey;
}

// Copies the logits above -inf to four lists, split at three pivots, each in order.
template <class T>
static void split_in_four(const T* x, int64_t n, const float* pivots, float* const* lists,
                          int64_t* sizes) {
  float *a = lists[0], *b = lists[1], *c = lists[2], *d = lists[3];
  const F low_a = fset(pivots[0]), low_b = fset(pivots[1]), low_c = fset(pivots[2]);
  for_row(x, 0, n, 1.0f, [&](int64_t, F v) __attribute__((always_inline)) {
    const M in_a = ge(v, low_a), in_ab = ge(v, low_b), in_abc = ge(v, low_c);
    const M in_b = but_not(in_ab, in_a), in_c = but_not(in_abc, in_ab);
    const M in_d = but_not(ge(v, fset(kLowestKey)), in_abc);
    compress(a, in_a, v);
    compress(b, in_b, v);
    compress(c, in_c, v);
    compress(d, in_d, v);
    a += count(in_a);
    b += count(in_b);
    c += count(in_c);
    d += count(in_d);
  });
  sizes[0] = a - lists[0];
  sizes[1] = b - lists[1];
  sizes[2] = c - lists[2];
  sizes[3] = d - lists[3];
}

static void add_piece(Pieces* pieces, int64_t size, float low, float high) {
  if (size == 0) return;
  const int p = pieces->count++;
  pieces->end[p] = (p > 0 ? pieces->end[p - 1] : 0) + size;
  pieces->low[p] = low;
  pieces->high[p] = high;
}

// Writes the logits above -inf to scratch.ordered, in pieces; returns how many there are.
template <class T>
static int64_t order_row(const T* x, int64_t v, float max, const Scratch& scratch, Pieces* pieces) {
  constexpr int64_t kLong = 512;
  float* const quarters[4] = {scratch.list_s, scratch.list_e, scratch.cand_key, scratch.cand_e};
  int64_t sizes[4], n = 0;
  float pivots[4], high = max;
  quartiles(x, v, pivots);
  pivots[3] = kLowestKey;
  split_in_four(x, v, pivots, quarters, sizes);
  for (int q = 0; q < 4; high = pivots[q++]) {
    float* const out = scratch.ordered + n;
    const size_t bytes = static_cast<size_t>(sizes[q]) * 4;
    n += sizes[q];
    if (sizes[q] < kLong) {
      std::memcpy(out, quarters[q], bytes);
      add_piece(pieces, sizes[q], pivots[q], high);
      continue;
    }
    float* const lists[4] = {out, scratch.row_e, scratch.fine_key, scratch.fine_e};
    float inner[4];
    int64_t parts[4], at = 0;
    quartiles(quarters[q], sizes[q], inner);
    inner[3] = pivots[q];
    split_in_four(quarters[q], sizes[q], inner, lists, parts);
    for (int p = 0; p < 4; at += parts[p++]) {
      if (p > 0) std::memcpy(out + at, lists[p], static_cast<size_t>(parts[p]) * 4);
      add_piece(pieces, parts[p], inner[p], p > 0 ? inner[p - 1] : high);
    }
  }
  const int last = pieces->count - 1;
  pieces->low[last] = key_range(scratch.ordered + pieces->begin(last), pieces->size(last)).low;
  for (int p = pieces->count; p < Pieces::kMost; ++p) pieces->low[p] = pieces->high[p] = -kInf;
  return n;
}

// The mass of each piece, of a row that was weighed whole.
static void weigh_pieces(Pieces* pieces, const Scratch& scratch) {
  int64_t blocks = 0, b = 0, before = 0;
  for (int p = 0; p < pieces->count; ++p) {
    for (; (b + 1) * kBlock <= pieces->end[p]; ++b) blocks += scratch.blocks[b];
    const int64_t from = b * kBlock;
    const List rest{scratch.ordered + from, scratch.row_e + from, nullptr};
    const int64_t sum = blocks + weight_of<false>(rest, pieces->end[p] - from);
    pieces->z[p] = sum - before;
    before = sum;
  }
}

// Whether a test keeps all, or may keep any, of the tokens from low to high.
struct Verdict {
  M all, any;
};

static Verdict judge(const Everything&, float, F low, F high) {
  return {gt(low, fset(-kInf)), gt(high, fset(-kInf))};
}
static Verdict judge(const RankCut& cut, float, F low, F high) {
  return {gt(low, fset(cut.key)), ge(high, fset(cut.key))};
}
// Masses fall with s but for twice the polynomial's error, 3.6e-6; 1e-5 is far from it.
static Verdict judge(const LightCut& cut, float m, F low, F high) {
  const F least = mul(mass(sub(low, fset(m))), fset(0.99999f));
  const F most = mul(mass(sub(high, fset(m))), fset(1.00001f));
  return {both(gt(low, fset(-kInf)), ge(least, fset(cut.e))), ge(most, fset(cut.e))};
}
static Verdict judge(const MassCut& cut, float m, F low, F high) {
  const Verdict v = judge(LightCut{cut.e}, m, low, high);
  return {v.all, either(v.any, ge(high, fset(cut.guard.key)))};
}

// The range of typical's key over tokens from low to high: it falls to both sides of the centre.
static void key_bounds(const TypicalKey& key, F low, F high, F* least, F* most) {
  const F zero = fset(0.0f), at_low = key(low), at_high = key(high);
  const F from = add(sub(low, fset(key.m)), fset(key.centre));
  const F to = add(sub(high, fset(key.m)), fset(key.centre));
  *least = minimum(at_low, at_high);
  *most = choose(both(ge(zero, from), ge(to, zero)), zero, maximum(at_low, at_high));
}
static Verdict judge(const Band& band, float, F low, F high) {
  F least, most;
  key_bounds(band.key, low, high, &least, &most);
  return {both(gt(low, fset(-kInf)), gt(least, fset(band.cut.key))),
          both(gt(high, fset(-kInf)), ge(most, fset(band.cut.key)))};
}

// What a test keeps of a row in pieces.
template <class Test>
static Tally tally_pieces(const View<float>& v, const Pieces& pieces, const Test& test) {
  Tally t{0, 0};
  const F scale = fset(v.inv_t);
  uint32_t all = 0, any = 0;
  for (int p = 0; p < pieces.count; p += W) {
    const F low = mul(load(pieces.low + p), scale), high = mul(load(pieces.high + p), scale);
    const Verdict verdict = judge(test, v.m, low, high);
    all |= bits(verdict.all) << p;
    any |= bits(verdict.any) << p;
  }
  for (int p = 0; p < pieces.count; ++p) {
    if (all >> p & 1) {
      t = {t.z + pieces.z[p], t.count + pieces.size(p)};
    } else if (any >> p & 1) {
      const Tally here = tally_part(v, pieces.begin(p), pieces.end[p], test, nullptr);
      t = {t.z + here.z, t.count + here.count};
    }
  }
  return t;
}

// As select by rank, for a row in pieces and a target in [1, its weight].
template <bool kCount>
static Selection select_rank(const View<float>& v, const Pieces& pieces, int64_t target,
                             bool ties_stay, const Scratch& scratch) {
  int64_t above = 0, weight = 0;
  int p = 0;
  for (;; ++p) {
    weight = kCount ? pieces.size(p) : pieces.z[p];
    if (above + weight >= target || p + 1 == pieces.count) break;
    above += weight;
  }
  const int64_t begin = pieces.begin(p);
  const View<float> piece{v.x + begin, pieces.size(p), v.inv_t, v.m, v.e + begin, nullptr};
  Selection s = select<kCount>(piece, RankKey{}, target - above, weight, ties_stay, scratch);
  if (s.cut.id != kAllIds) s.cut.id += static_cast<int32_t>(begin);
  if (s.known) s.kept = {s.kept.z + above, s.kept.count + begin};
  s.listed = -1;
  return s;
}

// As select by typicality with ties that stay, for a row in pieces of mass z.
static Selection select_band(const View<float>& v, const Pieces& pieces,
                             const TypicalRank<false>& key, int64_t target, int64_t z,
                             const Scratch& scratch) {
  if (target > z) return {{kLowestKey, kAllIds}, {0, 0}, false, -1};  // by rounding, of a large z
  float least[Pieces::kMost], most[Pieces::kMost];
  for (int p = 0; p < Pieces::kMost; p += W) {
    const F scale = fset(v.inv_t);
    F lower, upper;
    key_bounds(key, mul(load(pieces.low + p), scale), mul(load(pieces.high + p), scale), &lower,
               &upper);
    store(least + p, lower);
    store(most + p, upper);
  }
  // the cut is where pieces that are wholly as typical suffice, and where others are needed
  float low = kLowestKey, high = 0;
  for (int p = 0; p < pieces.count; ++p) {
    int64_t surely = 0, others = 0;
    for (int q = 0; q < pieces.count; ++q) {
      surely += least[q] >= least[p] ? pieces.z[q] : 0;
      others += most[q] > most[p] ? pieces.z[q] : 0;
    }
    if (surely >= target && least[p] > low) low = least[p];
    if (others < target && most[p] < high) high = most[p];
  }
  const Window window{low, high < 0 ? from_ordered(ordered(high) + 1) : kInf, false};
  Tally above{0, 0};
  int64_t n = 0;
  for (int p = 0; p < pieces.count; ++p) {
    if (most[p] < low) continue;
    Tally t{pieces.z[p], pieces.size(p)};
    if (least[p] <= high) {
      const List list{scratch.cand_key + n, scratch.cand_e + n, scratch.cand_id + n};
      const Split s =
          split_part<false, false>(v, pieces.begin(p), pieces.end[p], key, window, list, nullptr);
      t = s.above;
      n += s.n;
    }
    above = {above.z + t.z, above.count + t.count};
  }
  RankCut cut = cut_among<false, false>(n, target - above.z, scratch);
  cut.id = kAllIds;
  const Tally t = tally(candidates(n, scratch), cut, nullptr, nullptr);
  return {cut, {above.z + t.z, above.count + t.count}, true, -1};
}
