// A row: its knobs, and what is known of it.

// Knobs of one row.
struct RowKnobs {
  double value[kNumKnobs];
  Filters filters;
  float inv_t;       // 1 / T where the temperature comes first, else 1
  float last_inv_t;  // 1 / T where it comes last, else 1
  int64_t keep;
  bool temperature_last;
  bool tossed;  // XTC's coin, where it has one
  bool excludes;

  double operator[](int knob) const { return value[knob]; }
  bool greedy() const { return value[kTemperature] == 0; }
  float whole_inv_t() const { return inv_t * last_inv_t; }  // one of them is 1

  // Throws the coin of XTC: a 32-bit number of the row's own draw.
  void toss(Random random) {
    tossed = true;
    excludes =
        static_cast<double>(static_cast<uint32_t>(random.second)) < value[kXtcProbability] * 0x1p32;
  }
};

static RowKnobs knobs_of(const Knobs& knobs, int64_t row) {
  RowKnobs k;
  for (int i = 0; i < kNumKnobs; ++i)
    k.value[i] = knobs.data[i * knobs.knob_step + row * knobs.row_step];
  k.filters = knobs.filters;
  k.temperature_last = knobs.temperature_last;
  const float inv_t = k.greedy() ? 1.0f : 1.0f / static_cast<float>(k[kTemperature]);
  k.inv_t = knobs.temperature_last ? 1.0f : inv_t;
  k.last_inv_t = knobs.temperature_last ? inv_t : 1.0f;
  k.excludes = k[kXtcProbability] == 1;
  k.tossed = k.excludes || k[kXtcProbability] == 0;
  // a NaN becomes 1 here and a bad knob in in_range
  const double most = static_cast<double>(kMaxVocab);
  k.keep = k[kKeep] >= 1 ? static_cast<int64_t>(k[kKeep] < most ? k[kKeep] : most) : 1;
  return k;
}

// NaN fails every comparison, so it counts as out of range.
static bool in_range(const RowKnobs& k) {
  const double t = k[kTemperature];
  return (t == 0 || (t >= 1e-6 && t <= 3.4028234663852886e38)) && k[kTopK] >= 0 && k[kTopP] >= 0 &&
         k[kTopP] <= 1 && k[kMinP] >= 0 && k[kMinP] <= 1 && k[kTypicalP] > 0 && k[kTypicalP] <= 1 &&
         k[kEpsilon] >= 0 && k[kEpsilon] < 1 && k[kEta] >= 0 && k[kEta] < 1 && k[kKeep] >= 1 &&
         k[kTopNSigma] >= 0 && k[kTopNSigma] <= 1e6 && k[kMinK] >= 0 && k[kMinK] <= 1e6 &&
         k[kTopA] >= 0 && k[kTopA] <= 1 && k[kTopH] >= 0 && k[kTopH] <= 1 && k.tossed &&
         k[kXtcProbability] >= 0 && k[kXtcProbability] <= 1 && k[kXtcThreshold] >= 0 &&
         k[kXtcThreshold] <= 1;
}

static bool neutral(const RowKnobs& k, int knob) {
  if (knob == kXtcProbability) return !k.excludes;
  return knob == kTopP || knob == kTypicalP ? k[knob] == 1 : k[knob] == 0;
}

// Whether a filter acts that looks at the shape of the logits.
static bool by_shape(const RowKnobs& k) {
  for (Filters left = k.filters; left; left >>= kBitsOfFilter)
    if (const int knob = static_cast<int>(left & 15); knob > kKeep && !neutral(k, knob))
      return true;
  return false;
}

// A row of scaled logits with what is known of it. Adaptors of equal temperature share it.
template <class T>
struct Row {
  View<T> view;
  int64_t finite;  // number of tokens above -inf
  float lowest;    // the smallest scaled logit
  Sums sums;
  bool weighed;  // sums.z, scratch.blocks; with masses, view.e too
  bool with_u;
  const Pieces* pieces;  // where the row is in pieces and they are weighed, else null
};

template <class T>
static int64_t count_chosen(const View<T>& v, const RankCut& cut) {
  int64_t n = 0;
  for_survivors(v, cut, [&](int64_t, F, M chosen) { n += count(chosen); });
  return n;
}

static Status status_of_largest(float m) {
  return m == kInf ? kPosInf : m == -kInf ? kNoFinite : kOk;
}

template <class T>
static Status open_row(const T* x, int64_t v, float inv_t, const RowStats& stats, Row<T>* row) {
  const float m = stats.max * inv_t + 0.0f;  // +0 of the two zeros, on every ISA
  row->view = {x, v, inv_t, m, nullptr, nullptr};
  row->finite = v;
  row->lowest = stats.min * inv_t;
  row->weighed = row->with_u = false;
  row->pieces = nullptr;
  if (stats.nan) return kNaN;
  if (const Status status = status_of_largest(m); status != kOk) return status;
  if (row->lowest == -kInf) row->finite = count_chosen(row->view, {kLowestKey, kAllIds});
  return kOk;
}

// Sums of the row, with U and with stored masses where asked for; nothing is done twice.
template <class T>
static void weigh_row(Row<T>& row, bool with_u, bool with_masses, const Scratch& scratch) {
  const bool have = row.weighed && (row.with_u || !with_u) && (row.view.e || !with_masses);
  if (have) return;
  float* e = with_masses ? scratch.row_e : nullptr;
  row.sums = with_u ? weigh<true>(row.view, e, scratch.blocks, scratch.team)
                    : weigh<false>(row.view, e, scratch.blocks, scratch.team);
  row.view.e = with_masses ? e : row.view.e;
  row.weighed = true;
  row.with_u = with_u;
}

// Sums over a list whose masses are known.
static Sums sums_of(const View<float>& v) {
  L z = lzero(), u = lzero();
  for_view(v, [&](int64_t i, F s) {
    const F alive = keep_if(gt(s, fset(-kInf)), load(v.e + i));
    z = add_truncated(z, alive);
    u = add_truncated(u, surprisal_mass(alive, sub(s, fset(v.m))));
  });
  return {total(z), total(u)};
}
