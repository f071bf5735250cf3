// The filters of an adaptor, run one after the other on the survivors of the one before. Each adds
// one test; the test of the last one stays pending, so that its survivors need not be copied.

enum class Pending { kNone, kRank, kMass, kLight, kBand };

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

  // Mass and number of the survivors, in the view that visit gives.
  template <class V, class Test>
  Tally settle(const V& view, const Test& test) const {
    if (kept_known_) return kept_;
    if constexpr (may_be_in_pieces(V{})) {
      if (in_pieces()) return tally_pieces(view, *row_.pieces, test);
    }
    return tally(view, test, scratch_.blocks, scratch_.team);
  }

  // After settle: the mass of the survivors in a block of that view.
  int64_t mass_of_block(int64_t b) const {
    if (!kept_known_) return scratch_.blocks[b];
    return kept_of_block(b, pending_ == Pending::kBand ? band_.cut : rank_, scratch_);
  }

  // All finite tokens of the row survive, untested.
  bool untouched() const { return !listed_ && pending_ == Pending::kNone; }
  bool listed() const { return listed_; }
  // Some of equal tokens may be missing from the list.
  bool listed_by_id() const { return listed_by_id_; }

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
      case Pending::kLight:
        return f(view, LightCut{mass_.e});
      case Pending::kBand:
        return f(view, band_);
    }
  }

  // The pending test may part equal tokens.
  bool by_id() const {
    switch (pending_) {
      case Pending::kRank:
        return rank_.id != kAllIds;
      case Pending::kMass:
        return mass_.guard.id != kAllIds;
      case Pending::kBand:
        return band_.cut.id != kAllIds;
      default:
        return false;
    }
  }

  // Applies the pending test: the survivors become a list.
  void to_list() {
    listed_by_id_ |= by_id();
    const List out{scratch_.list_s, scratch_.list_e, scratch_.list_id};
    int64_t n = 0;
    if (candidates_ >= 0) {
      n = gather(candidates(candidates_, scratch_), rank_, out);
    } else {
      visit([&](const auto& view, const auto& test) { n = gather(view, test, out); });
    }
    list_ = {out.key, n, 1.0f, row_.view.m, out.e, out.id};
    list_sums_ = {kept_.z, 0};
    summed_ = kept_known_ ? Summed::kZ : Summed::kNone;
    listed_ = true;
    kept_known_ = false;
    candidates_ = -1;
    pending_ = Pending::kNone;
  }

  // Sums over the survivors; masses that a pass over the row makes are kept for the next one.
  Sums sums(bool with_u, bool keep_masses) {
    if (!listed_) {
      weigh_row(row_, with_u, keep_masses, scratch_);
      return row_.sums;
    }
    const Summed wanted = with_u ? Summed::kZAndU : Summed::kZ;
    if (summed_ < wanted) {
      list_sums_ = sums_of(list_);
      summed_ = Summed::kZAndU;
    }
    return list_sums_;
  }

  template <bool kCount, class V>
  Selection by_rank(const V& view, int64_t target, int64_t all, bool ties_stay) const {
    if constexpr (may_be_in_pieces(V{})) {
      if (in_pieces()) return select_rank<kCount>(view, *row_.pieces, target, ties_stay, scratch_);
    }
    return select<kCount>(view, RankKey{}, target, all, ties_stay, scratch_);
  }

  template <class V>
  RankCut best(const V& view, int64_t n) const {
    return select<true>(view, RankKey{}, n, view.n, false, scratch_).cut;
  }

  void keep_rank(RankCut cut) {
    if (cut.id == kAllIds && cut.key <= floor_) return;
    pending_ = Pending::kRank;
    rank_ = cut;
    floor_ = cut.key > floor_ ? cut.key : floor_;
  }

  void keep_selection(const Selection& selection) {
    keep_rank(selection.cut);
    know(selection);
  }

  void know(const Selection& selection) {
    kept_known_ = selection.known && pending_ != Pending::kNone;
    kept_ = selection.kept;
    candidates_ = pending_ == Pending::kRank ? selection.listed : -1;
  }

  void keep_mass(MassCut cut) {
    // masses fall with s but for twice the polynomial's error, 3.6e-6; 1e-5 is far from it
    const F lowest = mass(fset(floor_ - row_.view.m));
    if (max_lane(lowest) >= cut.e * 1.00001f) return;
    // one token of all the mass is the guard's, and nothing of less can be
    const bool light = cut.guard.key >= row_.view.m && !typical_ran_ && cut.e >= 1 &&
                       cut.e <= static_cast<float>(kUnit);
    pending_ = light ? Pending::kLight : Pending::kMass;
    mass_ = cut;
  }

  // The filter at hand looks at a row in pieces: of float32, and not where s - m may overflow.
  static constexpr bool may_be_in_pieces(const View<float>&) { return true; }
  static constexpr bool may_be_in_pieces(const TypicalRank<false>&) { return true; }
  template <class Other>
  static constexpr bool may_be_in_pieces(const Other&) {
    return false;
  }
  bool in_pieces() const { return !listed_ && row_.pieces; }

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
    if (constant() || wanted >= static_cast<double>(alive)) return;
    const int64_t n = static_cast<int64_t>(wanted);
    keep_selection(by_rank<true>(view, n, view.n, true));
  }

  template <class V>
  void top_p(V& view, int64_t alive) {
    if (k_.keep >= alive) return;
    if (constant()) {
      const int64_t one = static_cast<int64_t>(kUnit);
      const int64_t last = (Nucleus(k_[kTopP], alive * one).target(one) - 1) / one;
      return keep_rank({view.m, view.id_at(last >= k_.keep ? last : k_.keep - 1)});
    }
    if (!listed_ && !row_.weighed && Sample<false>::pays(view.n)) {
      Sample<false> sample(view, RankKey{});
      if (sample.even()) return top_p_in(sample.window_of_part(1 - k_[kTopP]), view);
    }
    const int64_t z = sums(false, false).z;
    const Nucleus nucleus(k_[kTopP], z);
    keep_nucleus(view, nucleus, by_rank<false>(view, nucleus.most, z, false));
  }

  // Top-p of a row that is not weighed yet, in the pass that weighs it.
  template <class V>
  void top_p_in(Window window, V& view) {
    const Split s = split<false, true>(view, RankKey{}, window, scratch_);
    row_.sums = {s.all, 0};
    row_.weighed = true;
    const Nucleus nucleus(k_[kTopP], s.all);
    keep_nucleus(view, nucleus,
                 select_in<false>(window, s, view, RankKey{}, nucleus.most, false, scratch_));
  }

  template <class V>
  void keep_nucleus(const V& view, const Nucleus& nucleus, const Selection& selection) {
    const RankCut cut = selection.cut;
    const Tally last{truncated_mass(cut.key - view.m), 1};
    keep_at_least(view, less_heavy(selection, nucleus, last, {cut.key, cut.id - 1}));
  }

  template <class V>
  void keep_at_least(const V& view, Selection selection) {
    if (k_.keep > 1) selection = {lower(selection.cut, best(view, k_.keep)), {0, 0}, false, -1};
    keep_selection(selection);
  }

  // Of two cuts in rank order, the one that keeps more.
  static RankCut lower(RankCut a, RankCut b) {
    return a.key < b.key || (a.key == b.key && a.id > b.id) ? a : b;
  }

  template <class V>
  void min_p(V& view) {
    if (constant()) return;
    // the most probable token is among the survivors and has mass 2^40
    const double least = __builtin_ceil(static_cast<float>(k_[kMinP]) * kUnit * kNearly);
    MassCut cut{float_at_least(static_cast<int64_t>(least)), {kInf, 0}};
    if (k_.keep > 1) {
      cut.guard = best(view, k_.keep);
    } else if (!view.e && least > 1) {
      // no mass is known yet: first drop what is clearly below, then weigh the rest
      const double low = view.m + log64(least / kUnit) - 1e-4;
      const float key = static_cast<float>(low);
      keep_rank({key - __builtin_fabsf(key) * 1e-6f, kAllIds});
      if (pending_ != Pending::kNone) to_list();
    }
    keep_mass(cut);
  }

  template <class V>
  void typical(V& view, int64_t alive) {
    if (constant() || k_.keep >= alive) return;
    const Sums s = sums(true, true);
    const double z = static_cast<double>(s.z);
    const TypicalKey key{view.m, static_cast<float>(static_cast<double>(s.u) / z)};
    pending_ = Pending::kBand;
    typical_ran_ = true;
    const Selection selection = view.m < kHuge ? band(view, TypicalRank<false>{key}, s.z)
                                               : band(view, TypicalRank<true>{key}, s.z);
    band_ = {key, selection.cut};
    know(selection);
  }

  // The least typical tokens that stay: ties stay, unless the minimum decides.
  template <class V, class Key>
  Selection band(const V& view, Key key, int64_t z) const {
    const Nucleus nucleus(k_[kTypicalP], z);
    const Selection s = by_typicality(view, key, nucleus.most, z);
    const View<float> undecided = candidates(s.n, scratch_);
    const Tally last = tally(undecided, Equals{s.cut.key}, nullptr, nullptr);
    const float above = from_ordered(ordered(s.cut.key) + 1);
    const Selection band = less_heavy(s, nucleus, last, {above, kAllIds});
    if (k_.keep == 1) return band;
    const RankCut least = select<true>(view, key, k_.keep, view.n, false, scratch_).cut;
    return {lower(band.cut, least), {0, 0}, false, -1};
  }

  template <class V, class Key>
  Selection by_typicality(const V& view, Key key, int64_t target, int64_t z) const {
    if constexpr (may_be_in_pieces(V{}) && may_be_in_pieces(key)) {
      if (in_pieces()) return select_band(view, *row_.pieces, key, target, z, scratch_);
    }
    return select<false>(view, key, target, z, true, scratch_);
  }

  // Epsilon, and eta with its cutoff lowered by the entropy.
  template <class V>
  void cutoff(V& view, int64_t alive, int knob) {
    if (constant() || k_.keep >= alive) return;
    const Sums s = sums(knob == kEta, true);
    double p = k_[knob];
    if (knob == kEta) {
      const double lowered = __builtin_sqrt(p) * exp64(-entropy_of(s.z, s.u));
      p = lowered < p ? lowered : p;
    }
    const double wanted = p * static_cast<double>(s.z);
    const int64_t least = static_cast<int64_t>(__builtin_ceil(wanted * kNearly));
    MassCut cut{float_at_least(least), {view.m, kAllIds}};
    if (k_.keep > 1) {
      cut.guard = {best(view, k_.keep).key, kAllIds};
    } else if (typical_ran_) {  // the row's maximum may be gone
      cut.guard.key = scan(view.x, view.n, scratch_.team).max * view.inv_t;
    }
    keep_mass(cut);
  }

  static constexpr float kHuge = 0x1p102f;  // from here on s - m may overflow

  Row<T>& row_;
  const RowKnobs& k_;
  const Scratch& scratch_;
  bool listed_ = false, listed_by_id_ = false;
  enum class Summed { kNone, kZ, kZAndU } summed_ = Summed::kNone;  // what list_sums_ hold
  bool kept_known_ = false;  // kept_ is what the pending test keeps, also by block
  bool typical_ran_ = false;
  float floor_;  // no survivor is below
  Pending pending_ = Pending::kNone;
  View<float> list_{};
  Sums list_sums_{};
  Tally kept_{};
  int64_t candidates_ = -1;  // how many there are, where they hold all that the test keeps
  RankCut rank_{};
  MassCut mass_{};
  Band band_{};
};
