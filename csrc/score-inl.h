// Given tokens under many adaptors: each row is scanned once, and adaptors of equal temperature
// share one pass of masses; many adaptors look at the row in pieces.

// A token of a row, and the base distribution of that row.
template <class T>
struct Token {
  const T* x;  // the row
  int64_t y;
  double base_max, log_z;

  float s(float inv_t) const { return to_float(x[y]) * inv_t; }

  // How many tokens of lower id are equal.
  int64_t rank_among_equals(float inv_t) const {
    const F s_y = fset(s(inv_t));
    int64_t n = 0;
    for_row(x, 0, y, inv_t, [&](int64_t, F s) { n += count(eq(s, s_y)); });
    return n;
  }
};

// Whether a token is among the survivors of a row that is not in pieces.
template <class Other, class Test>
static bool survives(const View<Other>& view, const Test& test, int64_t y) {
  const I id = iset(static_cast<int32_t>(y));
  if (!view.id) {
    const F s = fset(view.s_at(y));
    const F e = view.e ? fset(view.e[y]) : mass(sub(s, fset(view.m)));
    return any(test(s, e, id));
  }
  bool found = false;
  for_survivors(view, test, [&](int64_t i, F, M chosen) {
    found |= any(both(chosen, ieq(ids_of(view, i), id)));
  });
  return found;
}

// The same of one in pieces. Filters look at s, and of equal tokens they keep those of lowest id:
// as many as survive, whichever ids the view gives to them.
template <class Other, class Test, class T>
static bool survives_in_pieces(const View<Other>& view, const Test& test, bool listed_by_id,
                               const Token<T>& token, float inv_t) {
  const F s = fset(token.s(inv_t)), e = mass(sub(s, fset(view.m)));
  if (!any(test(s, e, iset(0)))) return false;
  const bool whole = !listed_by_id && any(test(s, e, iset(kAllIds)));
  if (whole && !view.id) return true;
  int64_t equals = 0;
  for_survivors(view, test,
                [&](int64_t, F other, M chosen) { equals += count(both(chosen, eq(other, s))); });
  return equals > 0 && (whole || token.rank_among_equals(inv_t) < equals);
}

static void fill_score(const ScoreArgs& a, int64_t r, int64_t adaptor, float value) {
  const int64_t at = r * a.num_adaptors + adaptor;
  a.logprobs[at] = a.log_norm[at] = value;
  a.kept[at] = 0;
}

// Scores an adaptor on a row at its temperature.
template <class Other, class T>
static void score_adaptor(const ScoreArgs& a, int64_t r, int64_t adaptor, const RowKnobs& knobs,
                          Row<Other>& row, const Token<T>& token, const Scratch& scratch) {
  const float inv_t = knobs.whole_inv_t();
  const bool in_pieces = row.pieces;
  const Survivors<Other> survivors(row, knobs, scratch);
  if (survivors.status() != kOk) return fill_score(a, r, adaptor, __builtin_nanf(""));
  survivors.visit([&](const auto& view, const auto& test) {
    const Tally t = survivors.settle(view, test);
    const double log_s = log_mass(t.z);
    const double shift = view.m - token.base_max * inv_t;
    const double s = token.s(inv_t);
    const int64_t at = r * a.num_adaptors + adaptor;
    const bool survived =
        in_pieces ? survives_in_pieces(view, test, survivors.listed_by_id(), token, inv_t)
                  : survives(view, test, token.y);
    a.logprobs[at] = survived ? static_cast<float>(s - view.m - log_s) : -kInf;
    a.log_norm[at] = static_cast<float>(shift + log_s - token.log_z * inv_t);
    a.kept[at] = static_cast<int32_t>(t.count);
    const int64_t list = adaptor * a.rows.n + r;
    if (int32_t* ids = room_for(a.supports, list, t.count)) survivors.list_ids(ids);
  });
}

// Weighs a row whole, and its pieces where it has some.
template <class Other>
static void weigh_all(Row<Other>& row, Pieces* pieces, const Scratch& scratch) {
  weigh_row(row, true, true, scratch);
  if (pieces) weigh_pieces(pieces, scratch);
  row.pieces = pieces;
}

// Fills in the base distribution of a token from a row at temperature 1.
template <class Other, class T>
static void score_base(const ScoreArgs& a, int64_t r, const Row<Other>& row, Token<T>* token) {
  token->base_max = row.view.m;
  token->log_z = log_mass(row.sums.z);
  const double s = token->s(1.0f);
  a.base_logprobs[r] = static_cast<float>(s - token->base_max - token->log_z);
  a.entropy[r] = static_cast<float>(entropy_of(row.sums.z, row.sums.u));
}

// Scores adaptors on a row at temperature 1, or in pieces on what is above -inf of it. todo holds
// the 1 / T of each adaptor, 0 where it is not to be scored.
template <class Other, class T>
static void score_all(const ScoreArgs& a, int64_t r, Row<Other>& row, const RowStats& stats,
                      Pieces* pieces, const Token<T>& token, float* todo, const Scratch& scratch) {
  const Other* x = row.view.x;
  const int64_t n = row.view.n;
  // the base distribution is that of temperature 1: its adaptors first, while its masses are there
  float inv_t = 1.0f;
  Status status = kOk;
  for (int64_t next = 0;;) {
    int64_t members = 0;
    for (int64_t i = 0; i < a.num_adaptors; ++i) members += todo[i] == inv_t;
    // what several adaptors share is made once and whole; one alone asks for what it needs
    if (status == kOk && members > 0 && (pieces || members > 2)) weigh_all(row, pieces, scratch);
    for (int64_t i = 0; members > 0 && i < a.num_adaptors; ++i) {
      if (todo[i] != inv_t) continue;
      todo[i] = 0;
      if (status == kOk) {
        score_adaptor(a, r, i, knobs_of(a.knobs[i], r), row, token, scratch);
      } else {
        fill_score(a, r, i, __builtin_nanf(""));
      }
    }
    while (next < a.num_adaptors && todo[next] == 0) ++next;
    if (next == a.num_adaptors) return;
    inv_t = todo[next];
    status = open_row(x, n, inv_t, stats, &row);
  }
}

// Scores the token of row r, whose logits are x.
template <class T>
static void score_token(const ScoreArgs& a, int64_t r, const T* x, const RowStats& stats,
                        const Scratch& scratch) {
  // from here on ordering the row costs less than it saves
  constexpr int64_t kLong = 1024, kMany = 4;
  const int64_t v = a.rows.v, y = a.tokens[r];
  const float nan = __builtin_nanf("");
  Row<T> row;
  if (open_row(x, v, 1.0f, stats, &row) != kOk) {
    a.base_logprobs[r] = a.entropy[r] = nan;
    for (int64_t i = 0; i < a.num_adaptors; ++i) fill_score(a, r, i, nan);
    return;
  }
  // in pieces, a minimum of tokens is out of place, which parts the equally typical by id, and so
  // are lists of ids
  float in_pieces[kMaxAdaptors], whole[kMaxAdaptors];
  int64_t many = 0, others = 0;
  for (int64_t i = 0; i < a.num_adaptors; ++i) {
    const RowKnobs k = knobs_of(a.knobs[i], r);
    in_pieces[i] = whole[i] = 0;
    if (!in_range(k) || k.greedy()) {
      fill_score(a, r, i, nan);
    } else if (k.keep == 1 && k.last_inv_t == 1.0f && !by_shape(k) && !a.supports.room) {
      in_pieces[i] = k.inv_t;
      ++many;
    } else {
      whole[i] = k.inv_t;
      ++others;
    }
  }
  Token<T> token{x, y, 0, 0};
  if (v < kLong || many < kMany) {
    weigh_row(row, true, true, scratch);
    score_base(a, r, row, &token);
    score_all(a, r, row, stats, nullptr, token, in_pieces, scratch);
  } else {
    Pieces pieces;
    const int64_t n = order_row(x, v, stats.max, scratch, &pieces);
    RowStats finite{stats.max, pieces.low[pieces.count - 1], false};
    Row<float> ordered;
    open_row(scratch.ordered, n, 1.0f, finite, &ordered);
    weigh_all(ordered, &pieces, scratch);
    score_base(a, r, ordered, &token);
    score_all(a, r, ordered, finite, &pieces, token, in_pieces, scratch);
  }
  if (others == 0) return;
  open_row(x, v, 1.0f, stats, &row);
  score_all(a, r, row, stats, nullptr, token, whole, scratch);
}

template <class T>
static void score_row(const ScoreArgs& a, int64_t r, const Scratch& scratch) {
  if (a.tokens[r] == a.ignore_index) {
    a.base_logprobs[r] = a.entropy[r] = 0;
    for (int64_t i = 0; i < a.num_adaptors; ++i) fill_score(a, r, i, 0);
    return;
  }
  with_row<T>(a.rows, a.edits, r, scratch,
              [&](const auto* x, const RowStats& stats) { score_token(a, r, x, stats, scratch); });
}
