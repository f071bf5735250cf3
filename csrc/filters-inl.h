// The filters of an adaptor, run one after the other on the survivors of the one before. Each adds
// one test.

template <class T>
class Survivors : public Kept<T> {
 public:
  Survivors(Row<T>& row, const RowKnobs& knobs, const Scratch& scratch)
      : Kept<T>(row, knobs, scratch) {
    for (Filters left = knobs.filters; left; left >>= kBitsOfFilter) {
      const int knob = static_cast<int>(left & 15);
      if (neutral(knobs, knob)) continue;
      if (pending_ != Pending::kNone) to_list();
      const int64_t alive = listed_ ? list_.n : row_.finite;
      if (knobs.keep >= alive) continue;  // all stay
      if (listed_) {
        run(knob, list_, alive);
      } else {
        run(knob, row_.view, alive);
      }
    }
    if (knobs.last_inv_t != 1.0f) rescale(knobs.last_inv_t);
  }

 private:
  using Kept<T>::to_list;
  using Kept<T>::rescale;
  using Kept<T>::largest;
  using Kept<T>::heaviest;
  using Kept<T>::sums;
  using Kept<T>::best;
  using Kept<T>::keep_rank;
  using Kept<T>::keep_selection;
  using Kept<T>::know;
  using Kept<T>::keep_mass;
  using Kept<T>::may_be_in_pieces;
  using Kept<T>::in_pieces;
  using Kept<T>::constant;
  using Kept<T>::row_;
  using Kept<T>::k_;
  using Kept<T>::scratch_;
  using Kept<T>::listed_;
  using Kept<T>::listed_by_id_;
  using Kept<T>::summed_;
  using Kept<T>::kept_known_;
  using Kept<T>::top_gone_;
  using Kept<T>::floor_;
  using Kept<T>::pending_;
  using Kept<T>::list_;
  using Kept<T>::kept_;
  using Kept<T>::band_;
  using Kept<T>::below_;
  using Summed = typename Kept<T>::Summed;

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
        return typical(view);
      case kTopNSigma:
        return top_n_sigma(view, alive);
      case kMinK:
        return min_k(view, alive);
      case kTopA:
        return top_a(view);
      case kTopH:
        return top_h(view, alive);
      case kXtcProbability:
        return xtc(view, alive);
      default:
        return cutoff(view, knob);
    }
  }

  template <class V>
  void top_k(V& view, int64_t alive) {
    const double wanted = k_[kTopK] > k_[kKeep] ? k_[kTopK] : k_[kKeep];
    if (constant() || wanted >= static_cast<double>(alive)) return;
    const int64_t n = static_cast<int64_t>(wanted);
    keep_selection(this->template by_rank<true>(view, n, view.n, true));
  }

  template <class V>
  void top_p(V& view, int64_t alive) {
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
    keep_nucleus(view, nucleus, this->template by_rank<false>(view, nucleus.most, z, false));
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

  template <class V>
  void min_p(V& view) {
    if (constant()) return;
    keep_above(view, static_cast<float>(k_[kMinP]) * heaviest(view));
  }

  template <class V>
  void top_a(V& view) {
    const double most = heaviest(view), z = static_cast<double>(sums(false, false).z);
    keep_above(view, k_[kTopA] * (most / z) * most);
  }

  // Keeps what has about a mass, and the best-ranked.
  template <class V>
  void keep_above(V& view, double wanted) {
    const double least = __builtin_ceil(wanted * kNearly);
    MassCut cut{float_at_least(static_cast<int64_t>(least)), {kInf, 0}};
    if (k_.keep > 1) {
      cut.guard = best(view, k_.keep);
    } else if (!view.e && least > 1) {
      // masses are not stored: first drop what is clearly below, then weigh the rest
      keep_rank({clearly_below(view.m, least), kAllIds});
      if (pending_ != Pending::kNone) to_list();
    }
    keep_mass(cut);
  }

  template <class V>
  void typical(V& view) {
    if (constant()) return;
    const Sums s = sums(true, true);
    const double z = static_cast<double>(s.z);
    const TypicalKey key{view.m, static_cast<float>(static_cast<double>(s.u) / z)};
    pending_ = Pending::kBand;
    const Selection selection = view.m < kHuge ? band(view, TypicalRank<false>{key}, s.z)
                                               : band(view, TypicalRank<true>{key}, s.z);
    band_ = {key, selection.cut};
    know(selection);
    top_gone_ = true;  // it may be
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
  void cutoff(V& view, int knob) {
    if (constant()) return;
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
    } else {
      cut.guard.key = largest(view);
    }
    keep_mass(cut);
  }

  template <class V>
  void top_n_sigma(V& view, int64_t alive) {
    if (constant()) return;
    const double sigma = deviation(view, alive, lowest(view), scratch_.team);
    const double below = k_[kTopNSigma] * sigma;
    const double key = static_cast<double>(largest(view)) - below * (1 + 0x1p-19);
    const RankCut cut{static_cast<float>(key), kAllIds};
    keep_rank(k_.keep > 1 ? lower(cut, best(view, k_.keep)) : cut);
    if (pending_ != Pending::kNone) to_list();  // of few, mostly: fewer masses to make
  }

  template <class V>
  void min_k(V& view, int64_t alive) {
    if (constant()) return;
    const float least = lowest(view);
    const Cliff cliff(view, alive, least, scratch_);
    keep_best(view, cliff.best, count_above(cliff, k_[kMinK], least, alive), alive);
  }

  // The smallest survivor.
  template <class V>
  float lowest(const V& view) const {
    return !listed_ && row_.lowest > -kInf ? row_.lowest : lowest_of(view);
  }

  template <class V>
  void top_h(V& view, int64_t alive) {
    constexpr int64_t kMost = 100;  // tokens that it looks at
    const Best first(view, alive < kMost ? alive : kMost, alive, scratch_);
    keep_best(view, first, count_by_entropy(first, view.m, k_[kTopH]), alive);
  }

  // Keeps so many of the best-ranked, some of which are known.
  template <class V>
  void keep_best(V& view, const Best& known, int64_t count, int64_t alive) {
    count = count > k_.keep ? count : k_.keep;
    if (count >= alive) return;
    if (count > known.n) return keep_rank(best(view, count));
    const List out{scratch_.list_s, scratch_.list_e, scratch_.list_id};
    known.write(count, out);
    list_ = {out.key, count, 1.0f, row_.view.m, out.e, out.id};
    summed_ = Summed::kNone;
    listed_ = listed_by_id_ = true;
    floor_ = known.key[count - 1] > floor_ ? known.key[count - 1] : floor_;
  }

  // Excludes all but the least probable of several tokens that reach the threshold.
  template <class V>
  void xtc(V& view, int64_t alive) {
    if (k_[kXtcThreshold] > 0.5) return;
    const int64_t z = sums(false, false).z;
    const LeastOfMany least(view, k_[kXtcThreshold], z, scratch_);
    if (least.better.count == 0 || alive - least.better.count < k_.keep) return;
    pending_ = Pending::kBelow;
    below_ = {least.last};
    top_gone_ = true;
    if (listed_) return;
    least.take_from_blocks(scratch_);
    kept_known_ = true;
    kept_ = {z - least.better.z, alive - least.better.count};
  }

  static constexpr float kHuge = 0x1p102f;  // from here on s - m may overflow
};
