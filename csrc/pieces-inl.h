// A row in pieces: its tokens ordered by their logit, but only from one piece to the next. Scaling
// keeps that order, so adaptors of every temperature share it, and a filter looks only at the
// pieces where it cuts; what it does to the others is known from their bounds.

// Tokens of piece p have low[p] <= x <= high[p] and indices begin(p) to end[p]. Among equal logits
// ids ascend, but where scaling makes logits of two pieces equal.
struct Pieces {
  static constexpr int kMost = 32;  // at most 4 + 4 * 3, and 3 for each level of the best

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

// Writes the logits above -inf in four parts, split at three pivots and each in order; out may be
// x.
template <class T>
static void split_in_four(const T* x, int64_t n, const float* pivots, float* out, int64_t* sizes,
                          const Scratch& scratch) {
  float* const lists[4] = {out, scratch.row_e, scratch.fine_key, scratch.fine_e};
  float *a = lists[0], *b = lists[1], *c = lists[2], *d = lists[3];
  const F behind = load(out + n);  // of the next part: the last vectors are written whole
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
  store(out + n, behind);
  float* const ends[4] = {a, b, c, d};
  for (int q = 0; q < 4; out += sizes[q++]) {
    sizes[q] = ends[q] - lists[q];
    if (q > 0) std::memcpy(out, lists[q], static_cast<size_t>(sizes[q]) * 4);
  }
}

// Splits a part of a row, with low <= x <= high and in place where it is one already, until its
// pieces are short. The best of them hold most of the mass and are split further.
template <class T>
static void order_part(const T* x, int64_t n, float low, float high, int depth, int64_t piece,
                       const Scratch& scratch, Pieces* pieces) {
  constexpr int64_t kShort = 64;
  const int64_t begin = pieces->begin(pieces->count);
  const bool best = begin == 0;
  if (depth > 0 && (n <= (best ? kShort : piece) || depth >= (best ? 7 : 2))) {
    if (n == 0) return;
    const int p = pieces->count++;
    pieces->end[p] = begin + n;
    pieces->low[p] = low;
    pieces->high[p] = high;
    return;
  }
  float pivots[4], *out = scratch.ordered + begin;
  int64_t sizes[4];
  quartiles(x, n, pivots);
  pivots[3] = low;
  split_in_four(x, n, pivots, out, sizes, scratch);
  for (int q = 0; q < 4; high = pivots[q], out += sizes[q++])
    order_part(out, sizes[q], pivots[q], high, depth + 1, piece, scratch, pieces);
}

// Writes the logits above -inf to scratch.ordered, in pieces; returns how many there are.
template <class T>
static int64_t order_row(const T* x, int64_t v, float max, const Scratch& scratch, Pieces* pieces) {
  order_part(x, v, kLowestKey, max, 0, v / 8, scratch, pieces);
  const int last = pieces->count - 1;
  pieces->low[last] = key_range(scratch.ordered + pieces->begin(last), pieces->size(last)).low;
  for (int p = pieces->count; p < Pieces::kMost; ++p) pieces->low[p] = pieces->high[p] = -kInf;
  return pieces->end[last];
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

// Typical's keys in a row in pieces.
class KeyedPieces {
 public:
  KeyedPieces(const View<float>& v, const Pieces& pieces, const TypicalRank<false>& key)
      : v_(v), pieces_(pieces), key_(key) {
    const F scale = fset(v.inv_t);
    for (int p = 0; p < Pieces::kMost; p += W) {
      F least, most;
      key_bounds(key, mul(load(pieces.low + p), scale), mul(load(pieces.high + p), scale), &least,
                 &most);
      store(least_ + p, least);
      store(most_ + p, most);
    }
  }

  // The window that holds the cut: from where pieces that are wholly inside suffice, to where those
  // that begin above do not.
  Window window(int64_t target) const {
    float low = kLowestKey, high = 0;
    for (int p = 0; p < pieces_.count; ++p) {
      int64_t surely = 0, perhaps = 0;
      for (int q = 0; q < pieces_.count; ++q) {
        surely += least_[q] >= least_[p] ? pieces_.z[q] : 0;
        perhaps += most_[q] > most_[p] ? pieces_.z[q] : 0;
      }
      if (surely >= target && least_[p] > low) low = least_[p];
      if (perhaps < target && most_[p] < high) high = most_[p];
    }
    return {low, high < 0 ? from_ordered(ordered(high) + 1) : kInf, false};
  }

  // Splits what is undecided at a window into the candidates.
  Split split(Window window, const Scratch& scratch) const {
    Split sum{{0, 0}, 0, 0};
    for (int p = 0; p < pieces_.count; ++p) {
      if (most_[p] < window.low) continue;
      Split s{{pieces_.z[p], pieces_.size(p)}, 0, 0};
      if (undecided(p, window)) {
        const List list{scratch.cand_key + sum.n, scratch.cand_e + sum.n, scratch.cand_id + sum.n};
        s = split_part<false, false>(v_, pieces_.begin(p), pieces_.end[p], key_, window, list,
                                     nullptr);
      }
      sum = {{sum.above.z + s.above.z, sum.above.count + s.above.count}, sum.n + s.n, 0};
    }
    return sum;
  }

 private:
  bool undecided(int p, Window window) const {
    return most_[p] >= window.low && least_[p] < window.high;
  }

  const View<float>& v_;
  const Pieces& pieces_;
  const TypicalRank<false>& key_;
  float least_[Pieces::kMost], most_[Pieces::kMost];  // keys of each piece lie between
};

// As select by typicality with ties that stay, for a row in pieces of mass z.
static Selection select_band(const View<float>& v, const Pieces& pieces,
                             const TypicalRank<false>& key, int64_t target, int64_t z,
                             const Scratch& scratch) {
  if (target > z) return {{kLowestKey, kAllIds}, {0, 0}, false, -1};  // by rounding, of a large z
  const KeyedPieces keyed(v, pieces, key);
  const Split s = keyed.split(keyed.window(target), scratch);
  return decide<false, TypicalRank<false>>(s, target, true, scratch);
}
