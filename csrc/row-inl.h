// A row: its knobs, and what is known of it.

// Knobs of one row.
struct RowKnobs {
  double value[kNumKnobs];
  Order order;
  float inv_t;
  int64_t keep;

  double operator[](int knob) const { return value[knob]; }
  bool greedy() const { return value[kTemperature] == 0; }
};

static RowKnobs knobs_of(const Knobs& knobs, int64_t row) {
  RowKnobs k;
  for (int i = 0; i < kNumKnobs; ++i)
    k.value[i] = knobs.data[i * knobs.knob_step + row * knobs.row_step];
  k.order = knobs.order;
  k.inv_t = k.greedy() ? 1.0f : 1.0f / static_cast<float>(k[kTemperature]);
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
         k[kEpsilon] >= 0 && k[kEpsilon] < 1 && k[kEta] >= 0 && k[kEta] < 1 && k[kKeep] >= 1;
}

static bool neutral(const RowKnobs& k, int knob) {
  return knob == kTopP || knob == kTypicalP ? k[knob] == 1 : k[knob] == 0;
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

template <class T>
static Status open_row(const T* x, int64_t v, float inv_t, const RowStats& stats, Row<T>* row) {
  const float m = stats.max * inv_t + 0.0f;  // +0 of the two zeros, on every ISA
  row->view = {x, v, inv_t, m, nullptr, nullptr};
  row->finite = v;
  row->lowest = stats.min * inv_t;
  row->weighed = row->with_u = false;
  row->pieces = nullptr;
  if (stats.nan) return kNaN;
  if (m == kInf) return kPosInf;
  if (m == -kInf) return kNoFinite;
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
