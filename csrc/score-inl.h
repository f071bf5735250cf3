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
  const float s = view.s_at(at);
  return bits(test(fset(s), mass(fset(s - view.m)), iset(static_cast<int32_t>(token)))) & 1;
}

static void fill_score(const ScoreArgs& a, int64_t r, int64_t adaptor, float value) {
  const int64_t at = r * a.num_adaptors + adaptor;
  a.logprobs[at] = a.log_norm[at] = value;
  a.kept[at] = 0;
}

// Scores the adaptors of one temperature that are not done yet.
template <class T>
static void score_group(const ScoreArgs& a, int64_t r, float inv_t, Row<T>& row, Status status,
                        double base_max, double log_z, bool* done, const Scratch& scratch) {
  const int64_t y = a.tokens[r];
  int64_t members = 0;
  for (int64_t i = 0; i < a.num_adaptors; ++i)
    members += !done[i] && knobs_of(a.knobs[i], r).inv_t == inv_t;
  // what several adaptors share is made once and whole; one alone asks for what it needs
  if (status == kOk && members > 2) {
    weigh_row(row, true, true, scratch);
    make_head(row, scratch);
  }
  for (int64_t i = 0; i < a.num_adaptors; ++i) {
    if (done[i]) continue;
    const RowKnobs k = knobs_of(a.knobs[i], r);
    if (!in_range(k) || k.greedy() || k.inv_t != inv_t) continue;
    done[i] = true;
    if (status != kOk) {
      fill_score(a, r, i, __builtin_nanf(""));
      continue;
    }
    Survivors<T> survivors(row, k, scratch);
    survivors.visit([&](const auto& view, const auto& test) {
      const Tally t = survivors.settle(view, test);
      const double log_s = log_mass(t.z);
      const double shift = row.view.m - base_max * inv_t;
      const double s = row.view.s_at(y);
      const int64_t at = r * a.num_adaptors + i;
      a.logprobs[at] = survives(view, test, y) ? static_cast<float>(s - row.view.m - log_s) : -kInf;
      a.log_norm[at] = static_cast<float>(shift + log_s - log_z * inv_t);
      a.kept[at] = static_cast<int32_t>(t.count);
    });
  }
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
  const RowStats stats = scan(x, v, scratch.team);
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

  // the base law is that of temperature 1: its adaptors first, while its masses are there
  bool done[kMaxAdaptors] = {};
  score_group(a, r, 1.0f, row, kOk, base_max, log_z, done, scratch);
  for (int64_t i = 0; i < a.num_adaptors; ++i) {
    if (done[i]) continue;
    const RowKnobs k = knobs_of(a.knobs[i], r);
    if (!in_range(k) || k.greedy()) {
      fill_score(a, r, i, nan);
      continue;
    }
    const Status status = open_row(x, v, k.inv_t, stats, &row);
    score_group(a, r, k.inv_t, row, status, base_max, log_z, done, scratch);
  }
}
