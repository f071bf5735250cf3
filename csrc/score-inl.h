// Given tokens under many adaptors: each row is scanned once, and adaptors of equal temperature
// share one pass of masses.

// Whether a token is among the survivors.
template <class T, class Test>
static bool survives(const View<T>& view, const Test& test, int64_t token) {
  int64_t at = token;
  if (view.id) {  // ids ascend
    int64_t low = 0, high = view.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (view.id[middle] < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == view.n || view.id[low] != token) return false;
    at = low;
  }
  const F e = fset(view.e ? view.e[at] : 0.0f);
  return bits(test(fset(view.s_at(at)), e, iset(static_cast<int32_t>(token)))) & 1;
}

static void fill_score(const ScoreArgs& a, int64_t r, int64_t adaptor, float value) {
  const int64_t at = r * a.num_adaptors + adaptor;
  a.logprobs[at] = a.log_norm[at] = value;
  a.kept[at] = 0;
}

template <class T>
static void score_row(const ScoreArgs& a, int64_t r, const Scratch& scratch) {
  const int64_t v = a.rows.v, y = a.tokens[r];
  const T* x = static_cast<const T*>(a.rows.data) + r * a.rows.stride;
  const float nan = __builtin_nanf("");
  if (y == a.ignore_index) {
    a.base_logprobs[r] = a.entropy[r] = 0;
    for (int64_t i = 0; i < a.num_adaptors; ++i) fill_score(a, r, i, 0);
    return;
  }
  const RowStats stats = scan(x, v);
  Row<T> row;
  if (open_row(x, v, 1.0f, stats, &row) != kOk) {
    a.base_logprobs[r] = a.entropy[r] = nan;
    for (int64_t i = 0; i < a.num_adaptors; ++i) fill_score(a, r, i, nan);
    return;
  }
  weigh_row(row, true, true, scratch);
  const double base_max = row.view.m, log_z = log_mass(row.sums.z);
  a.base_logprobs[r] = static_cast<float>(static_cast<double>(row.view.s_at(y)) - base_max - log_z);
  a.entropy[r] = static_cast<float>(entropy_of(row.sums.z, row.sums.u));

  bool done[kMaxAdaptors] = {};
  for (int64_t first = 0; first < a.num_adaptors; ++first) {
    if (done[first]) continue;
    const RowKnobs leader = knobs_of(a.knobs[first], r);
    if (!in_range(leader)) {  // its inv_t may be NaN, which equals nothing
      fill_score(a, r, first, nan);
      continue;
    }
    const bool shared = leader.inv_t == row.view.inv_t;
    const Status status = shared ? kOk : open_row(x, v, leader.inv_t, stats, &row);
    for (int64_t i = first; i < a.num_adaptors; ++i) {
      if (done[i]) continue;
      const RowKnobs k = knobs_of(a.knobs[i], r);
      if (k.inv_t != leader.inv_t) continue;
      done[i] = true;
      if (status != kOk || !in_range(k) || k.greedy()) {
        fill_score(a, r, i, nan);
        continue;
      }
      Survivors<T> survivors(row, k, scratch);
      survivors.visit_weighed([&](const auto& view, const auto& test) {
        const Tally t = tally(view, test, scratch.blocks);
        const double log_s = log_mass(t.z);
        const double shift = row.view.m - base_max * leader.inv_t;
        const double s = row.view.s_at(y);
        const int64_t at = r * a.num_adaptors + i;
        a.logprobs[at] =
            survives(view, test, y) ? static_cast<float>(s - row.view.m - log_s) : -kInf;
        a.log_norm[at] = static_cast<float>(shift + log_s - log_z * leader.inv_t);
        a.kept[at] = static_cast<int32_t>(t.count);
      });
    }
    // the masses of this temperature are overwritten by the next
    if (!shared) row.view.inv_t = __builtin_nanf("");
  }
}
