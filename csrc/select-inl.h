// Where a filter cuts: the last element, in (key descending, id ascending) order, before which the
// sum of weights is still below a target. A sample guesses a window, one exact pass splits the view
// there, and a few rounds of eight pivots narrow what is left.

constexpr int64_t kSorted = 32;  // candidates that are simply sorted

struct Split {
  Tally above;  // exact weight and number of key >= window.high
  int64_t n;    // number of candidates
  int64_t all;  // exact weight of the view, where it is asked for
};

// Where a split notes, for each block, the weight above the window and where its candidates end;
// with kAll also the weight of the block.
struct Marks {
  int64_t* above;
  int64_t* cand_end;
  int64_t* blocks;
};

// Copies key, mass and id of the elements inside a window to a list, in order, for a part of a view
// that begins with a block. Marks may be null.
template <bool kCount, bool kAll, class T, class Key>
static Split split_part(const View<T>& view, int64_t from, int64_t to, Key key, Window window,
                        const List& list, const Marks* marks) {
  // copies: the compiler takes every vector that is written for a change of what a reference holds
  const View<T> v = view;
  const List out = list;
  int64_t all = 0, z = 0, above_count = 0, n = 0;
  const F low = fset(window.low), high = fset(window.high);
  with_masses(v, [&](const auto& mass_at) {
    for (int64_t begin = from, b = from / kBlock; begin < to; begin += kBlock, ++b) {
      const int64_t end = begin + kBlock < to ? begin + kBlock : to;
      L above = lzero(), whole = lzero();
      const auto sort_out = [&](int64_t i, F x) __attribute__((always_inline)) {
        const F k = key(x), e = mass_at(i, x);
        const M not_below = ge(k, low), is_above = ge(k, high);
        const M is_inside = but_not(not_below, is_above);
        const Q q = truncated(e);
        if (kAll) whole = add(whole, q);
        above_count += count(is_above);
        if (!kCount) above = add_if(is_above, above, q);
        compress(out.key + n, is_inside, k);
        compress(out.id + n, is_inside, ids_of(v, i));
        compress(out.e + n, is_inside, e);
        n += count(is_inside);
      };
      if (window.sparse && !kAll) {
        const auto not_below = [&](int64_t, F x) { return ge(key(x), low); };
        for_wanted(v.x, begin, end, v.inv_t, not_below, sort_out);
      } else {
        for_row(v.x, begin, end, v.inv_t, sort_out);
      }
      const int64_t here = total(above);
      z += here;
      if (kAll) all += total(whole);
      if (!marks) continue;
      marks->above[b] = here;
      marks->cand_end[b] = n;
      if (kAll) marks->blocks[b] = total(whole);
    }
  });
  return {{kCount ? above_count : z, above_count}, n, all};
}

// Splits a view; the candidates and their marks go to the scratch buffers.
template <bool kCount, bool kAll, class T, class Key>
static Split split(const View<T>& v, Key key, Window window, const Scratch& scratch) {
  const List list{scratch.cand_key, scratch.cand_e, scratch.cand_id};
  const Marks marks{scratch.above, scratch.cand_end, scratch.blocks};
  Split of_part[kMaxTeam];
  int64_t begins[kMaxTeam], ends[kMaxTeam];
  const int parts = in_parts(scratch.team, v.n, [&](int part, int64_t begin, int64_t end) {
    const List here{list.key + begin, list.e + begin, list.id + begin};
    of_part[part] = split_part<kCount, kAll>(v, begin, end, key, window, here, &marks);
    begins[part] = begin;
    ends[part] = end;
  });
  Split s = of_part[0];
  for (int i = 1; i < parts; ++i) {  // side by side
    const Split& p = of_part[i];
    if (p.n > 0) {
      const size_t bytes = static_cast<size_t>(p.n) * 4;
      std::memmove(list.key + s.n, list.key + begins[i], bytes);
      std::memmove(list.e + s.n, list.e + begins[i], bytes);
      std::memmove(list.id + s.n, list.id + begins[i], bytes);
    }
    for (int64_t b = begins[i] / kBlock; b * kBlock < ends[i]; ++b) marks.cand_end[b] += s.n;
    s = {{s.above.z + p.above.z, s.above.count + p.above.count}, s.n + p.n, s.all + p.all};
  }
  return s;
}

// The window between two neighbouring pivots, or beyond the last, that holds the target.
template <class Sum>
static Window window_of(const float* pivots, const Sum* sums, Sum target) {
  for (int p = 0; p < kPivots; ++p)
    if (sums[p] >= target) return {pivots[p], p ? pivots[p - 1] : kInf, false};
  return {kLowestKey, pivots[kPivots - 1], false};
}

// The cut among few elements, by sorting them.
template <bool kCount>
static RankCut cut_among_few(const View<float>& v, int64_t target) {
  float keys[kSorted], e[kSorted];
  int32_t ids[kSorted];
  for (int64_t i = 0; i < v.n; ++i) {  // stable, so ids stay ascending among equal keys
    int64_t at = i;
    for (; at > 0 && keys[at - 1] < v.x[i]; --at) {
      keys[at] = keys[at - 1];
      e[at] = e[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = v.x[i];
    e[at] = kCount ? 1.0f : v.e[i];
    ids[at] = v.id[i];
  }
  int64_t i = 0;
  for (; i + 1 < v.n; ++i) {
    target -= static_cast<int64_t>(e[i]);
    if (target <= 0) break;
  }
  return {keys[i], ids[i]};
}

// The cut among n candidates for a target in [1, their weight]; they stay as they are.
template <bool kCount, bool kEqualMass>
static RankCut cut_among(int64_t n, int64_t target, const Scratch& scratch) {
  const List fine{scratch.fine_key, scratch.fine_e, scratch.fine_id};
  View<float> v = candidates(n, scratch);
  bool careful = false, among_floats = false;
  while (v.n > kSorted) {
    const Range r = key_range(v.x, v.n);
    if (r.low == r.high) {
      if (kCount) return {r.low, v.id[target - 1]};
      if (!kEqualMass) return {r.low, kAllIds};
      return {r.low, v.id[(target - 1) / static_cast<int64_t>(v.e[0])]};
    }
    float pivots[kPivots];
    spread_pivots(r, among_floats, pivots);
    Window window;
    if (careful) {
      int64_t sums[kPivots];
      exact_sums_above<kCount>(v, pivots, sums);
      window = window_of(pivots, sums, target);
    } else {
      double sums[kPivots];
      sums_above<kCount>(v, pivots, sums);
      window = window_of(pivots, sums, static_cast<double>(target));
    }
    const Split s = split_part<kCount, false>(v, 0, v.n, RankKey{}, window, fine, nullptr);
    // approximate sums may miss the target by a hair
    if (!careful && (s.above.z >= target || s.above.z + weight_of<kCount>(fine, s.n) < target)) {
      careful = true;
      continue;
    }
    careful = true;  // from here on the list is split in place
    target -= s.above.z;
    among_floats = 2 * s.n > v.n;
    v = view_of(fine, s.n);
  }
  return cut_among_few<kCount>(v, target);
}

// A cut, and what of a view it keeps.
struct Selection {
  RankCut cut;
  Tally kept;
  bool known;      // kept is, and by block too: see kept_of_block
  int64_t listed;  // the number of candidates where they hold all that is kept, else -1
  int64_t n = 0;   // the number of candidates
};

// The cut among the candidates of a split that surrounds the target.
template <bool kCount, class Key>
static Selection decide(const Split& s, int64_t target, bool ties_stay, const Scratch& scratch) {
  RankCut cut = cut_among<kCount, Key::kHeaviestFirst>(s.n, target - s.above.z, scratch);
  if (ties_stay) cut.id = kAllIds;
  const int64_t listed = s.above.count == 0 ? s.n : -1;
  if (kCount) return {cut, {0, 0}, false, listed, s.n};
  const Tally t = tally(candidates(s.n, scratch), cut, nullptr, nullptr);
  return {cut, {s.above.z + t.z, s.above.count + t.count}, true, listed, s.n};
}

// The cut of a view that a window has split, for a target in [1, the view's weight].
template <bool kCount, class T, class Key>
static Selection select_in(Window window, Split s, const View<T>& v, Key key, int64_t target,
                           bool ties_stay, const Scratch& scratch) {
  const List inside{scratch.cand_key, scratch.cand_e, scratch.cand_id};
  if (s.above.z >= target) {
    s = split<kCount, false>(v, key, {window.high, kInf, window.sparse}, scratch);
  } else if (s.above.z + weight_of<kCount>(inside, s.n) < target) {
    if (window.low > kLowestKey)
      s = split<kCount, false>(v, key, {kLowestKey, window.low, false}, scratch);
    if (s.above.z + weight_of<kCount>(inside, s.n) < target)
      return {{kLowestKey, kAllIds}, {0, 0}, false, -1};  // everything stays
  }
  return decide<kCount, Key>(s, target, ties_stay, scratch);
}

// The cut of a view of some weight for a target in [1, all].
template <bool kCount, class T, class Key>
static Selection select(const View<T>& v, Key key, int64_t target, int64_t all, bool ties_stay,
                        const Scratch& scratch) {
  const List heavy{scratch.fine_key, scratch.fine_e, scratch.fine_id};
  Window window = kEverywhere;
  if (Sample<kCount>::pays(v.n)) {
    if (kCount || Key::kHeaviestFirst) {
      window = Sample<kCount>(v, key).window(all - target);
    } else {
      window = Sample<kCount>(v, key, all, heavy).window(all - target);
    }
  }
  const Split s = split<kCount, false>(v, key, window, scratch);
  return select_in<kCount>(window, s, v, key, target, ties_stay, scratch);
}

// Of two cuts in rank order, the one that keeps more.
static RankCut lower(RankCut a, RankCut b) {
  return a.key < b.key || (a.key == b.key && a.id > b.id) ? a : b;
}

// What is selected by the target of light tokens, less its last ones where they are heavy and past
// their own target. Nothing else can be: the targets are less apart than anything heavy weighs.
static Selection less_heavy(Selection s, const Nucleus& nucleus, const Tally& last,
                            const RankCut& without) {
  const int64_t before = s.kept.z - last.z;
  if (!s.known || before < nucleus.target(last.z)) return s;
  return {without, {before, s.kept.count - last.count}, true, s.listed, s.n};
}

// What a selection keeps of a block of its view.
static int64_t kept_of_block(int64_t b, const RankCut& cut, const Scratch& scratch) {
  const int64_t begin = b > 0 ? scratch.cand_end[b - 1] : 0;
  const List here{scratch.cand_key + begin, scratch.cand_e + begin, scratch.cand_id + begin};
  return scratch.above[b] +
         tally(view_of(here, scratch.cand_end[b] - begin), cut, nullptr, nullptr).z;
}
