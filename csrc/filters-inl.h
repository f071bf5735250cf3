// The filters of an adaptor, run one after the other on the survivors of the one before. Each adds
// one test; the test of the last one stays pending, so that its survivors need not be copied.

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
  View<float> head;  // the tokens at or above head_floor, or none
  float head_floor;
  int64_t head_z;
};

template <class T>
static int64_t count_chosen(const View<T>& v, const RankCut& cut) {
  int64_t n = 0;
  for_survivors(v, cut, [&](int64_t, F, F, I, M chosen) { n += count(chosen); });
  return n;
}

template <class T>
static Status open_row(const T* x, int64_t v, float inv_t, const RowStats& stats, Row<T>* row) {
  const float m = stats.max * inv_t + 0.0f;  // +0 of the two zeros, on every ISA
  row->view = {x, v, inv_t, m, nullptr, nullptr};
  row->finite = v;
  row->lowest = stats.min * inv_t;
  row->weighed = row->with_u = false;
  row->head.n = 0;
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
  row.sums =
      with_u ? weigh<true>(row.view, e, scratch.blocks) : weigh<false>(row.view, e, scratch.blocks);
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

// Copies the best sixteenth or so of a long row whose masses are known: most filters of most
// adaptors cut inside it. Not where many tokens are equal.
template <class T>
static void make_head(Row<T>& row, const Scratch& scratch) {
  constexpr int64_t kLong = 8192;
  constexpr int kRank = 4;  // of kSamples
  if (row.view.n < kLong) return;
  float keys[kSamples], weights[kSamples];
  sorted_sample<false>(row.view, RankKey{}, keys, weights);
  if (!(keys[kRank] > kLowestKey) || keys[0] == keys[kRank] || keys[kRank] == keys[2 * kRank])
    return;
  row.head_floor = keys[kRank];
  const int64_t n = gather(row.view, RankCut{row.head_floor, kAllIds}, scratch.head_s,
                           scratch.head_e, scratch.head_id);
  row.head = {scratch.head_s, n, 1.0f, row.view.m, scratch.head_e, scratch.head_id};
  row.head_z = sums_of(row.head).z;
}

enum class Pending { kNone, kRank, kMass, kBand };

template <class T>
class Survivors {
 public:
  Survivors(Row<T>& row, const RowKnobs& knobs, const Scratch& scratch)
      : row_(row), k_(knobs), scratch_(scratch), floor_(row.lowest) {
    static constexpr int kHfOrder[] = {kTopK, kTopP, kMinP, kTypicalP, kEpsilon, kEta};
    static constexpr int kVllmOrder[] = {kMinP, kTopK, kTopP, kTypicalP, kEpsilon, kEta};
    for (int knob : knobs.order == Order::kHf ? kHfOrder : kVllmOrder) {
      if (neutral(knobs, knob)) continue;
      if (pending_ != Pending::kNone) to_list();
      if (listed_) {
        run(knob, list_, list_.n);
      } else {
        run(knob, row_.view, row_.finite);
      }
    }
  }

  // Calls f(view, test) with the view and the test that make the survivors.
  template <class Fn>
  void visit(Fn&& f) const {
    if (listed_) {
      visit_test(list_, f);
    } else {
      visit_test(row_.view, f);
    }
  }

  // As visit, on a view whose masses are known.
  template <class Fn>
  void visit_weighed(Fn&& f) {
    if (!listed_ && pending_ == Pending::kRank && !row_.view.e) to_list();
    weigh_view(false);
    visit(f);
  }

  // All finite tokens of the row survive, untested.
  bool untouched() const { return !listed_ && pending_ == Pending::kNone; }
  bool listed() const { return listed_; }

 private:
  template <class V, class Fn>
  void visit_test(const V& view, Fn& f) const {
    switch (pending_) {
      case Pending::kNone:
        return f(view, Everything{});
      case Pending::kRank:
        return f(view, rank_);
      case Pending::kMass:
        return f(view, mass_);
      case Pending::kBand:
        return f(view, band_);
    }
  }

  // Applies the pending test: the survivors become a list.
  void to_list() {
    int64_t n = 0;
    bool masses = false;
    visit([&](const auto& view, const auto& test) {
      masses = view.e != nullptr;
      n = gather(view, test, scratch_.list_s, scratch_.list_e, scratch_.list_id);
    });
    list_ = {scratch_.list_s, n, 1.0f, row_.view.m, masses ? scratch_.list_e : nullptr,
             scratch_.list_id};
    listed_ = true;
    summed_ = false;
    pending_ = Pending::kNone;
  }

  void weigh_list() {
    if (list_.e) return;
    weigh<false>(list_, scratch_.list_e, nullptr);
    list_.e = scratch_.list_e;
  }

  void weigh_view(bool with_u) {
    if (listed_) {
      weigh_list();
    } else {
      weigh_row(row_, with_u, true, scratch_);
    }
  }

  Sums sums(bool with_u) {
    weigh_view(with_u);
    if (!listed_) return row_.sums;
    if (!summed_) list_sums_ = sums_of(list_);
    summed_ = true;
    return list_sums_;
  }

  template <class V>
  RankCut best(const V& view, int64_t n) const {
    return select<true>(view, RankKey{}, n, view.n, scratch_);
  }

  void keep_rank(RankCut cut) {
    if (cut.id == kAllIds && cut.key <= floor_) return;
    pending_ = Pending::kRank;
    rank_ = cut;
    floor_ = cut.key > floor_ ? cut.key : floor_;
  }

  void keep_mass(MassCut cut) {
    // masses fall with s but for twice the polynomial's error, 3.6e-6; 1e-5 is far from it
    const F lowest = mass(fset(floor_ - row_.view.m));
    if (max_lane(lowest) >= cut.e * 1.00001f) return;
    pending_ = Pending::kMass;
    mass_ = cut;
  }

  // The filter at hand may look at the head of the row instead of the row.
  bool head_holds(int64_t weight, int64_t n) const {
    return !listed_ && row_.head.n > 0 && row_.head_z >= weight && row_.head.n >= n;
  }

  // All tokens of at least this mass are in the head.
  bool head_holds_mass(float e) const {
    return head_holds(0, k_.keep) &&
           max_lane(mass(fset(row_.head_floor - row_.view.m))) * 1.00001f < e;
  }

  // The pending test was found in the head and is applied there.
  void adopt_head() {
    if (pending_ == Pending::kNone) return;
    list_ = row_.head;
    listed_ = true;
    summed_ = false;
  }

  // All survivors are equal, so that ties decide.
  bool constant() const { return floor_ == row_.view.m; }

  template <class V>
  void run(int knob, V& view, int64_t alive) {
    switch (knob) {
      case kTopK:
        return top_k(view, alive);
      case kTopP:
        return top_p(view, alive);
      case kMinP:
        return min_p(view);
      case kTypicalP:
        return typical(view, alive);
      default:
        return cutoff(view, alive, knob);
    }
  }

  template <class V>
  void top_k(V& view, int64_t alive) {
    const double wanted = k_[kTopK] > k_[kKeep] ? k_[kTopK] : k_[kKeep];
    if (wanted >= static_cast<double>(alive)) return;
    const int64_t n = static_cast<int64_t>(wanted);
    const bool head = head_holds(0, n);
    RankCut cut = head ? best(row_.head, n) : best(view, n);
    cut.id = kAllIds;
    keep_rank(cut);
    if (head) adopt_head();
  }

  template <class V>
  void top_p(V& view, int64_t alive) {
    const int64_t z = constant() ? alive * static_cast<int64_t>(kUnit) : sums(false).z;
    const double removed = __builtin_floor((1 - k_[kTopP]) * static_cast<double>(z));
    int64_t target = z - static_cast<int64_t>(removed);
    target = target > 0 ? target : 1;
    if (k_.keep >= alive) return;
    if (constant()) {
      const int64_t last = (target - 1) / static_cast<int64_t>(kUnit);
      return keep_rank({view.m, view.id_at(last >= k_.keep ? last : k_.keep - 1)});
    }
    if (!head_holds(target, k_.keep)) return keep_rank(mass_cut(view, target, z));
    keep_rank(mass_cut(row_.head, target, row_.head_z));
    adopt_head();
  }

  template <class V>
  RankCut mass_cut(const V& view, int64_t target, int64_t all) const {
    const RankCut cut = select<false>(view, RankKey{}, target, all, scratch_);
    return k_.keep > 1 ? lower(cut, best(view, k_.keep)) : cut;
  }

  // Of two cuts in rank order, the one that keeps more.
  static RankCut lower(RankCut a, RankCut b) {
    return a.key < b.key || (a.key == b.key && a.id > b.id) ? a : b;
  }

  template <class V>
  void min_p(V& view) {
    if (constant()) return;
    // the most probable token is among the survivors and has mass 2^40
    const double least = __builtin_ceil(static_cast<float>(k_[kMinP]) * kUnit);
    MassCut cut{float_at_least(static_cast<int64_t>(least)), {kInf, 0}};
    const bool head = head_holds_mass(cut.e);
    if (k_.keep > 1) {
      cut.guard = head ? best(row_.head, k_.keep) : best(view, k_.keep);
    } else if (!view.e && least > 1) {
      // no mass is known yet: first drop what is clearly below, then weigh the rest
      const double low = view.m + log64(least / kUnit) - 1e-4;
      const float key = static_cast<float>(low);
      keep_rank({key - __builtin_fabsf(key) * 1e-6f, kAllIds});
      if (pending_ != Pending::kNone) to_list();
    }
    keep_mass(cut);
    if (head) return adopt_head();
    if (pending_ != Pending::kNone) weigh_view(false);
  }

  template <class V>
  void typical(V& view, int64_t alive) {
    if (constant() || k_.keep >= alive) return;
    const Sums s = sums(true);
    const double z = static_cast<double>(s.z);
    const TypicalKey key{view.m, static_cast<float>(static_cast<double>(s.u) / z)};
    const int64_t target = static_cast<int64_t>(__builtin_ceil(k_[kTypicalP] * z));
    const TypicalRank<false> rank{key};
    pending_ = Pending::kBand;
    typical_ran_ = true;
    // below the centre typicality falls with s, so that no token outside the head is nearer
    if (view.m < kHuge && head_holds(target, k_.keep) && row_.head_floor - view.m < -key.centre) {
      band_ = {key, band(row_.head, rank, target, row_.head_z)};
      if (band_.cut.key > rank.scalar(row_.head_floor)) return adopt_head();
    }
    band_ = {key, view.m < kHuge ? band(view, rank, target, s.z)
                                 : band(view, TypicalRank<true>{key}, target, s.z)};
  }

  // The least typical token that stays: ties stay, unless the minimum decides.
  template <class V, class Key>
  RankCut band(const V& view, Key key, int64_t target, int64_t z) const {
    RankCut cut = select<false>(view, key, target, z, scratch_);
    cut.id = kAllIds;
    if (k_.keep > 1) cut = lower(cut, select<true>(view, key, k_.keep, view.n, scratch_));
    return cut;
  }

  // Epsilon, and eta with its cutoff lowered by the entropy.
  template <class V>
  void cutoff(V& view, int64_t alive, int knob) {
    if (constant() || k_.keep >= alive) return;
    const Sums s = sums(knob == kEta);
    double p = k_[knob];
    if (knob == kEta) {
      const double lowered = __builtin_sqrt(p) * exp64(-entropy_of(s.z, s.u));
      p = lowered < p ? lowered : p;
    }
    const int64_t least = static_cast<int64_t>(__builtin_ceil(p * static_cast<double>(s.z)));
    MassCut cut{float_at_least(least), {view.m, kAllIds}};
    const bool head = head_holds_mass(cut.e);
    if (k_.keep > 1) {
      cut.guard = {(head ? best(row_.head, k_.keep) : best(view, k_.keep)).key, kAllIds};
    } else if (typical_ran_) {  // the row's maximum may be gone
      cut.guard.key = scan(view.x, view.n).max * view.inv_t;
    }
    keep_mass(cut);
    if (head) adopt_head();
  }

  static constexpr float kHuge = 0x1p102f;  // from here on s - m may overflow

  Row<T>& row_;
  const RowKnobs& k_;
  const Scratch& scratch_;
  bool listed_ = false;
  bool summed_ = false;  // list_sums_ are those of the list
  bool typical_ran_ = false;
  float floor_;  // no survivor is below
  Pending pending_ = Pending::kNone;
  View<float> list_{};
  Sums list_sums_{};
  RankCut rank_{};
  MassCut mass_{};
  Band band_{};
};
