// What filters have kept of a row so far: a view with the test of the last one pending, so that its
// survivors need not be copied.

enum class Pending { kNone, kRank, kMass, kLight, kBand, kBelow };

template <class T>
class Kept {
 public:
  Kept(Row<T>& row, const RowKnobs& knobs, const Scratch& scratch)
      : row_(row), k_(knobs), scratch_(scratch), floor_(row.lowest) {}

  // What a temperature that comes last leaves: the largest survivor may be beyond float32.
  Status status() const { return status_; }

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
    if (!kept_known_ || pending_ == Pending::kBelow) return scratch_.blocks[b];
    return kept_of_block(b, pending_ == Pending::kBand ? band_.cut : rank_, scratch_);
  }

  // After settle, and before a draw: writes the ids of the survivors, ascending.
  void list_ids(int32_t* out) const {
    if (candidates_ >= 0) {
      write_ids(candidates(candidates_, scratch_), 0, candidates_, rank_, out);
      return;
    }
    const bool all_weigh = this->all_weigh();
    visit([&](const auto& view, const auto& test) {
      for (int64_t b = 0; b * kBlock < view.n; ++b) {
        if (all_weigh && !weighs(b)) continue;
        const int64_t end = (b + 1) * kBlock < view.n ? (b + 1) * kBlock : view.n;
        out += write_ids(view, b * kBlock, end, test, out);
      }
    });
  }

  // All finite tokens of the row survive, untested.
  bool untouched() const { return !listed_ && pending_ == Pending::kNone; }
  bool listed() const { return listed_; }
  // Some of equal tokens may be missing from the list.
  bool listed_by_id() const { return listed_by_id_; }

 protected:
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
      case Pending::kBelow:
        return f(view, below_);
    }
  }

  // Whether every survivor has mass, by a margin: a block that has none then keeps none.
  bool all_weigh() const {
    const float m = row_.view.m;
    const auto enough = [](float d) { return truncated_mass(d < 0 ? d : 0) > 1; };
    switch (pending_) {
      case Pending::kRank:
        return enough(rank_.key - m);
      case Pending::kMass:
        return mass_.e > 1 && enough(mass_.guard.key - m);
      case Pending::kLight:
        return mass_.e > 1;
      case Pending::kBand:
        return enough(band_.cut.key - band_.key.centre);
      default:
        return false;
    }
  }

  // After settle: whether any of a block of a view that was tested weighs.
  bool weighs(int64_t b) const {
    if (!kept_known_) return scratch_.blocks[b] > 0;
    const int64_t begin = b > 0 ? scratch_.cand_end[b - 1] : 0;
    return scratch_.above[b] > 0 || scratch_.cand_end[b] > begin;
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
      case Pending::kBelow:
        return true;
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

  // Scales survivors of temperature 1, relative to the largest of them; the row stays as it is.
  void rescale(float inv_t) {
    if (!listed_ || pending_ != Pending::kNone) to_list();
    list_ = {list_.x, list_.n, inv_t, largest(list_) * inv_t + 0.0f, nullptr, list_.id};
    status_ = status_of_largest(row_.view.m * inv_t);  // else it is that of survivors
    if (list_.m == -kInf) status_ = kNoFinite;
  }

  // The largest survivor, and the greatest mass.
  template <class V>
  float largest(const V& view) const {
    return top_gone_ ? scan(view.x, view.n, scratch_.team).max * view.inv_t : view.m;
  }
  template <class V>
  double heaviest(const V& view) const {
    if (!top_gone_) return kUnit;
    return static_cast<double>(static_cast<int64_t>(key_range(view.e, view.n).high));
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
    return Best::best_of(view, n, scratch_);
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
    const bool light = cut.guard.key >= row_.view.m && !top_gone_ && cut.e >= 1 &&
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

  Row<T>& row_;
  const RowKnobs& k_;
  const Scratch& scratch_;
  bool listed_ = false, listed_by_id_ = false;
  enum class Summed { kNone, kZ, kZAndU } summed_ = Summed::kNone;  // what list_sums_ hold
  bool kept_known_ = false;  // kept_ is what the pending test keeps, also by block
  bool top_gone_ = false;    // the row's maximum may be
  Status status_ = kOk;
  float floor_;  // no survivor is below
  Pending pending_ = Pending::kNone;
  View<float> list_{};
  Sums list_sums_{};
  Tally kept_{};
  int64_t candidates_ = -1;  // how many there are, where they hold all that the test keeps
  RankCut rank_{};
  MassCut mass_{};
  Band band_{};
  Below below_{};
};
