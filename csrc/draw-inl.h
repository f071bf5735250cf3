// Sampling: filter_logits and sample for rows [begin, end).

// The lowest id of the largest logit.
template <class T>
static int64_t argmax(const T* x, int64_t n, float max) {
  for (int64_t i = 0; i + W <= n; i += W) {
    const uint32_t hit = bits(eq(load(x + i), fset(max)));
    if (hit) return i + __builtin_ctz(hit);
  }
  for (int64_t i = n / W * W; i < n; ++i)
    if (to_float(x[i]) == max) return i;
  return 0;
}

template <class T>
static void fill_minus_inf(T* out, int64_t n) {
  T none;
  set_minus_inf(&none);
  for (int64_t i = 0; i < n; ++i) out[i] = none;
}

// Scaled logits as a type holds them: never infinite. Where the largest of a row is beyond its
// range, or so low that others may be, all of the row are less by it, which is the same
// distribution; what is still too low is the lowest that the type has.
template <class T>
struct Fitted {
  float shift = 0, lowest = -largest_of(T{});
  Fitted(float m, float inv_t) {
    const bool beyond = m > -lowest || m < lowest / 2;
    if (sizeof(T) < sizeof(float) && inv_t > 1 && beyond) shift = m;
  }
  F operator()(F s) const { return maximum(sub(s, fset(shift)), fset(lowest)); }
  float one(float s) const { return s - shift > lowest ? s - shift : lowest; }
};

// The survivor of the largest logit, of equals that of the lowest id.
template <class T>
static int64_t best_survivor(const Survivors<T>& survivors) {
  int64_t best = 0;
  survivors.visit([&](const auto& view, const auto& test) {
    F most = fset(-kInf);
    for_survivors(view, test, [&](int64_t, F s, M chosen) {
      most = maximum(most, choose(chosen, s, fset(-kInf)));
    });
    const F largest = fset(max_lane(most));
    int64_t first = view.n;
    for_survivors(view, test, [&](int64_t i, F s, M chosen) {
      const uint32_t b = bits(both(chosen, eq(s, largest)));
      if (b && i < first) first = i + __builtin_ctz(b);
    });
    best = view.id_at(first);
  });
  return best;
}

// The token that temperature 0 leaves: the best of all, or where it comes last of the survivors.
template <class T>
static int64_t greedy_token(Row<T>& row, const RowStats& stats, const RowKnobs& k,
                            const Scratch& scratch) {
  if (!k.temperature_last) return argmax(row.view.x, row.view.n, stats.max);
  return best_survivor(Survivors<T>(row, k, scratch));
}

// Copies a row, rounded where it is edited and of half precision.
template <class X, class T>
static void copy_row(const X* x, int64_t n, T* out) {
  if constexpr (sizeof(X) == sizeof(T)) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(x[i] == x[i] ? x[i] : __builtin_nanf(""), out + i);
  }
}

// Filters row r, whose logits are x.
template <class X, class T>
static void filter_logits(const FilterArgs& a, int64_t r, const X* x, const RowStats& stats, T* out,
                          const Scratch& scratch) {
  const int64_t v = a.rows.v;
  const RowKnobs k = knobs_of(a.knobs, r);
  Row<X> row;
  if (!in_range(k) || open_row(x, v, k.inv_t, stats, &row) != kOk) return copy_row(x, v, out);
  if (k.greedy()) {
    const int64_t best = greedy_token(row, stats, k, scratch);
    fill_minus_inf(out, v);
    return copy_row(x + best, 1, out + best);
  }
  const Survivors<X> survivors(row, k, scratch);
  if (survivors.status() != kOk) return copy_row(x, v, out);
  if (survivors.listed()) fill_minus_inf(out, v);
  const float inv_t = k.whole_inv_t();
  const Fitted<T> fitted(stats.max * inv_t, inv_t);
  survivors.visit([&](const auto& view, const auto& test) {
    for_survivors(view, test, [&](int64_t i, F s, M chosen) {
      if (view.id) {
        for (uint32_t b = bits(chosen); b; b &= b - 1) {
          const int64_t at = i + __builtin_ctz(b);
          from_float(fitted.one(view.s_at(at)), out + view.id[at]);
        }
        return;
      }
      const F kept = choose(chosen, fitted(s), fset(-kInf));
      if (i + W <= v) return store(out + i, kept);
      T tail[W];
      store(tail, kept);
      std::memcpy(out + i, tail, static_cast<size_t>(v - i) * sizeof(T));
    });
  });
}

template <class T>
static void filter_row(const FilterArgs& a, int64_t r, const Scratch& scratch) {
  T* out = static_cast<T*>(a.out) + r * a.rows.v;
  with_row<T>(a.rows, a.edits, r, scratch, [&](const auto* x, const RowStats& stats) {
    filter_logits(a, r, x, stats, out, scratch);
  });
}

// The first survivor, by id, whose running mass exceeds the target; blocks(b) is the mass of those
// in block b.
template <class T, class Test, class Blocks>
static int64_t locate(const View<T>& view, const Test& test, int64_t target, const Blocks& blocks,
                      const Scratch& scratch) {
  int64_t running = 0, b = 0;
  const int64_t last = (view.n - 1) / kBlock;
  for (; b < last; ++b) {
    const int64_t here = blocks(b);
    if (running + here > target) break;
    running += here;
  }
  const int64_t begin = b * kBlock;
  View<T> part = view;
  part.x += begin;
  part.n = view.n - begin < kBlock ? view.n - begin : kBlock;
  part.e = view.e ? view.e + begin : nullptr;
  with_masses(part, [&](const auto& mass_at) {
    for_view(part, [&](int64_t i, F s) {
      // ids come from the view: a part without ids of its own would count from 0
      const F e = mass_at(i, s);
      store(scratch.cand_key + i, keep_if(test(s, e, ids_of(view, begin + i)), e));
    });
  });
  for (int64_t i = 0; i < part.n; ++i) {
    running += static_cast<int64_t>(scratch.cand_key[i]);
    if (running > target) return view.id_at(begin + i);
  }
  return view.id_at(view.n - 1);  // not reached: the target is below the total
}

// The n most probable ids under the base distribution and their log-probabilities.
template <class T>
static void top_tokens(const Row<T>& base, double log_z, int64_t n, int64_t* ids, float* logprobs,
                       const Scratch& scratch) {
  const View<T>& v = base.view;
  const int64_t finite = n < base.finite ? n : base.finite;
  View<T> counted = v;
  counted.e = nullptr;
  const RankCut cut = select<true>(counted, RankKey{}, finite, v.n, false, scratch).cut;
  gather(counted, cut, List{scratch.cand_key, scratch.cand_e, scratch.cand_id});
  for (int64_t i = 0; i < finite; ++i) {
    const float s = scratch.cand_key[i];
    int64_t at = i;  // ids ascend in the list, so equal logits keep that order
    for (; at > 0 && v.s_at(ids[at - 1]) < s; --at) ids[at] = ids[at - 1];
    ids[at] = scratch.cand_id[i];
  }
  for (int64_t i = 0; i < finite; ++i)
    logprobs[i] = static_cast<float>(static_cast<double>(v.s_at(ids[i])) - v.m - log_z);
  for (int64_t i = 0, at = finite; at < n; ++i) {
    if (v.s_at(i) != -kInf) continue;
    ids[at] = i;
    logprobs[at++] = -kInf;
  }
}

// Room for the ids that a row keeps, or null: nobody asks for them, or they are a vocabulary.
static int32_t* room_for(const Supports& supports, int64_t list, int64_t kept) {
  return supports.room && kept < supports.whole ? supports.room(supports.lists, list, kept)
                                                : nullptr;
}

static void bad_sample(const SampleArgs& a, int64_t r, Status status) {
  const float nan = __builtin_nanf("");
  a.tokens[r] = -1;
  a.logprobs[r] = nan;
  a.kept[r] = 0;
  a.status[r] = status;
  if (a.base_logprobs) a.base_logprobs[r] = nan;
  if (a.log_mass) a.log_mass[r] = nan;
  if (a.rank) a.rank[r] = 0;
  for (int64_t i = 0; i < a.top_n; ++i) {
    a.top_ids[r * a.top_n + i] = -1;
    a.top_logprobs[r * a.top_n + i] = nan;
  }
}

// Draws from row r, whose logits are x, by 64 random bits and 32 more for the coin of XTC.
template <class T>
static void draw(const SampleArgs& a, int64_t r, const T* x, const RowStats& stats, RowKnobs k,
                 Random random, const Scratch& scratch) {
  const int64_t v = a.rows.v;
  k.toss(random);
  Row<T> row;
  const Status status = in_range(k) ? open_row(x, v, k.inv_t, stats, &row) : kBadKnob;
  if (status != kOk) return bad_sample(a, r, status);

  int64_t token = 0, kept = 1;
  double logprob = 0, log_s = 0, m = row.view.m;
  if (k.greedy()) {
    token = greedy_token(row, stats, k, scratch);
    if (int32_t* ids = room_for(a.supports, r, 1)) *ids = static_cast<int32_t>(token);
  } else {
    Survivors<T> survivors(row, k, scratch);
    if (survivors.status() != kOk) return bad_sample(a, r, survivors.status());
    int64_t s = 0;
    if (survivors.untouched()) {
      weigh_row(row, false, false, scratch);
      kept = row.finite;
      s = row.sums.z;
      if (int32_t* ids = room_for(a.supports, r, kept)) survivors.list_ids(ids);
      token = locate(
          row.view, Everything{}, draw_target(random.first, s),
          [&](int64_t b) { return scratch.blocks[b]; }, scratch);
    } else {
      survivors.visit([&](const auto& view, const auto& test) {
        const Tally t = survivors.settle(view, test);
        kept = t.count;
        s = t.z;
        m = view.m;
        if (int32_t* ids = room_for(a.supports, r, kept)) survivors.list_ids(ids);
        token = locate(
            view, test, draw_target(random.first, s),
            [&](int64_t b) { return survivors.mass_of_block(b); }, scratch);
      });
    }
    log_s = log_mass(s);
    logprob = static_cast<double>(to_float(x[token]) * k.whole_inv_t()) - m - log_s;
  }
  a.tokens[r] = token;
  a.logprobs[r] = static_cast<float>(logprob);
  a.kept[r] = static_cast<int32_t>(kept);
  a.status[r] = kOk;

  if (a.log_mass) {
    Row<T> divided;
    if (k.last_inv_t != 1.0f) open_row(x, v, k.last_inv_t, stats, &divided);
    Row<T>& whole = k.last_inv_t != 1.0f ? divided : row;
    weigh_row(whole, false, false, scratch);
    const double log_z = log_mass(whole.sums.z) + (whole.view.m - m);
    a.log_mass[r] = k.greedy() ? 0.0f : static_cast<float>(log_s - log_z);
  }
  if (!a.base_logprobs && !a.top_n) return;
  Row<T> base = row;
  if (k.inv_t != 1.0f) open_row(x, v, 1.0f, stats, &base);
  weigh_row(base, false, false, scratch);
  const double log_z = log_mass(base.sums.z);
  if (a.base_logprobs)
    a.base_logprobs[r] =
        static_cast<float>(static_cast<double>(base.view.s_at(token)) - base.view.m - log_z);
  if (!a.top_n) return;
  top_tokens(base, log_z, a.top_n, a.top_ids + r * a.top_n, a.top_logprobs + r * a.top_n, scratch);
  const RankCut before{base.view.s_at(token), static_cast<int32_t>(token)};
  base.view.e = nullptr;
  a.rank[r] = static_cast<int32_t>(count_chosen(base.view, before));
}

template <class T>
static void sample_row(const SampleArgs& a, int64_t r, const Scratch& scratch) {
  const Random random = philox(a.seeds[r], a.positions ? a.positions[r] : 0, 0);
  with_row<T>(a.rows, a.edits, r, scratch, [&](const auto* x, const RowStats& stats) {
    draw(a, r, x, stats, knobs_of(a.knobs, r), random, scratch);
  });
}
