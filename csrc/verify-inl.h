// Drafts of several tokens a sequence, accepted or replaced so that what comes out is distributed
// as if it had been drawn token by token.

// The distribution that an adaptor makes of a row, as integers: token j has floor(w_j 2^40 / S) of
// 2^40, in float64, w_j being its mass and S that of the survivors.
struct Law {
  Status status;
  float inv_t, m;
  int64_t s, kept;
  bool everything;         // all survive that have mass
  const uint8_t* support;  // else one bit each

  uint64_t survivors(int64_t word) const {
    if (everything) return ~uint64_t{0};
    uint64_t b;
    std::memcpy(&b, support + 8 * word, 8);
    return b;
  }
  double per_mass() const { return kUnit / static_cast<double>(s); }
  bool has(int64_t id) const { return everything || in_support(support, id); }

  // The share of one token.
  template <class T>
  int64_t of(const T* x, int64_t id) const {
    if (!has(id)) return 0;
    const F e = mass(fset(to_float(x[id]) * inv_t - m));
    return static_cast<int64_t>(share(max_lane(e), per_mass()));
  }

  // That of a mass before truncation.
  static double share(float mass, double per_mass) { return whole(whole(mass) * per_mass); }

  // What is left of x in [0, 2^51) without its fraction. The compiler has vectors for this.
  static double whole(double x) {
    const double nearest = (x + 0x1p52) - 0x1p52;
    return nearest - (nearest > x ? 1.0 : 0.0);
  }
};

// The law of a row, its support written to whole words of 64 bits.
template <class T>
static Law law_of(const T* x, int64_t v, const RowStats& stats, const RowKnobs& k, uint8_t* support,
                  const Scratch& scratch) {
  Law law{kBadKnob, k.whole_inv_t(), 0, 0, 0, false, support};
  if (!in_range(k)) return law;
  Row<T> row;
  law.status = open_row(x, v, k.inv_t, stats, &row);
  if (law.status != kOk) return law;
  law.m = row.view.m;
  if (!k.greedy()) {
    Survivors<T> survivors(row, k, scratch);
    law.status = survivors.status();
    if (law.status != kOk) return law;
    law.everything = survivors.untouched();
    if (law.everything) {
      weigh_row(row, false, false, scratch);
      law.s = row.sums.z;
      law.kept = row.finite;
      return law;
    }
    survivors.visit([&](const auto& view, const auto& test) {
      const Tally t = survivors.settle(view, test);
      law.s = t.z;
      law.kept = t.count;
      law.m = view.m;
    });
    std::memset(support, 0, static_cast<size_t>((v + 63) / 64 * 8));
    set_survivors(survivors, v, support);
    return law;
  }
  const int64_t best = greedy_token(row, stats, k, scratch);
  std::memset(support, 0, static_cast<size_t>((v + 63) / 64 * 8));
  support[best >> 3] = static_cast<uint8_t>(1 << (best & 7));
  law.s = static_cast<int64_t>(kUnit);
  law.kept = 1;
  return law;
}

// What a row has beyond its draft, max(P - Q, 0) of its survivors, or P where `q` is null.
template <class X, class D>
struct Rest {
  const X* x;
  const Law& p;
  const D* draft;
  const Law* q;
  const int32_t* id;  // the survivors, or null: all
  int64_t n;          // how many
  int64_t bytes;      // of a support

  int64_t id_at(int64_t i) const { return id ? id[i] : i; }

  // That of survivors [begin, end), at most a block of them, in float64: sums are below 2^53.
  void fill(int64_t begin, int64_t end, double* rest) const {
    float e[2][kBlock + 64];
    masses_of(x, p, begin, end, e[0]);
    if (q) {
      masses_of(draft, *q, begin, end, e[1]);
    } else {
      std::memset(e[1], 0, sizeof(e[1]));
    }
    const double per_p = p.per_mass(), per_q = q ? q->per_mass() : 0;
    for (int64_t j = 0; j < end - begin; ++j) {
      const double more = Law::share(e[0][j], per_p) - Law::share(e[1][j], per_q);
      rest[j] = more > 0 ? more : 0;
    }
  }

 private:
  // Masses under a law, 0 of those that do not survive it.
  template <class T>
  void masses_of(const T* row, const Law& law, int64_t begin, int64_t end, float* e) const {
    const F m = fset(law.m);
    if (!id) {
      for_row(row + begin, 0, end - begin, law.inv_t, [&](int64_t j, F s) {
        const F weighed = mass(sub(s, m));
        const M here = from_bits(law.everything ? ~0u : load_bits(law.support, bytes, begin + j));
        store(e + j, keep_if(here, weighed));
      });
      return;
    }
    float s[kBlock];
    for (int64_t i = begin; i < end; ++i)
      s[i - begin] = law.has(id[i]) ? to_float(row[id[i]]) * law.inv_t : -kInf;
    for_row(static_cast<const float*>(s), 0, end - begin, 1.0f,
            [&](int64_t j, F z) { store(e + j, mass(sub(z, m))); });
  }
};

template <class X, class D>
static Rest<X, D> rest_of(const X* x, const Law& p, const D* draft, const Law& q, const int32_t* id,
                          int64_t n, int64_t v) {
  return {x, p, draft, &q, id, n, (v + 7) / 8};
}

// Writes the ids of a law's survivors; returns how many there are.
static int64_t list_survivors(const Law& law, int64_t v, int32_t* id) {
  int64_t n = 0;
  for (int64_t word = 0; word < (v + 63) / 64; ++word)
    for (uint64_t b = law.survivors(word); b; b &= b - 1)
      id[n++] = static_cast<int32_t>(64 * word + __builtin_ctzll(b));
  return n;
}

// Writes the ids that a row keeps, where they are asked for.
template <class T>
static void list_row(const VerifyArgs& a, int64_t r, const T* x, const Law& law) {
  const int64_t v = a.rows.v;
  int32_t* ids = room_for(a.supports, r, law.kept);
  if (!ids) return;
  if (!law.everything) return static_cast<void>(list_survivors(law, v, ids));
  write_ids(View<T>{x, v, law.inv_t, law.m, nullptr, nullptr}, 0, v, Everything{}, ids);
}

// The token in place of a rejected one, drawn from what its row has beyond its draft.
template <class X, class D>
static int64_t draw_rest(Rest<X, D> row, uint64_t random, const Scratch& scratch) {
  double rest[kBlock];
  const auto block = [&](int64_t b) {
    const int64_t end = (b + 1) * kBlock < row.n ? (b + 1) * kBlock : row.n;
    row.fill(b * kBlock, end, rest);
    return end - b * kBlock;
  };
  int64_t all = 0;
  for (int64_t b = 0; b * kBlock < row.n; ++b) {
    double sum = 0;
    for (int64_t j = 0, count = block(b); j < count; ++j) sum += rest[j];
    all += scratch.blocks[b] = static_cast<int64_t>(sum);
  }
  if (all == 0 && row.q) {  // shares are rounded down, or the draft is none of Q's: nowhere is more
    row.q = nullptr;
    return draw_rest(row, random, scratch);
  }
  int64_t target = draw_target(random, all), b = 0, j = 0;
  for (; target >= scratch.blocks[b]; ++b) target -= scratch.blocks[b];
  block(b);
  while ((target -= static_cast<int64_t>(rest[j])) >= 0) ++j;
  return row.id_at(b * kBlock + j);
}

// The random bits of row i of a sequence.
static Random random_of(const VerifyArgs& a, int64_t sequence, int64_t i, uint32_t stream) {
  const uint64_t first = a.positions ? static_cast<uint64_t>(a.positions[sequence]) : 0;
  return philox(a.seeds[sequence], static_cast<int64_t>(first + static_cast<uint64_t>(i)), stream);
}

// Judges draft i of a sequence, drawn from a row of logits; where it does not stand, another token
// takes its place.
template <class T>
static bool judge_draft(const VerifyArgs& a, int64_t sequence, int64_t i, const RowKnobs& k,
                        const Scratch& scratch) {
  const int64_t v = a.rows.v, r = sequence * (a.k + 1) + i, token = a.draft[sequence * a.k + i];
  uint8_t* supports = reinterpret_cast<uint8_t*>(scratch.ordered);
  const T* draft =
      static_cast<const T*>(a.draft_rows.data) + (sequence * a.k + i) * a.draft_rows.stride;
  RowKnobs of_draft = knobs_of(a.draft_knobs, sequence);
  of_draft.toss(random_of(a, sequence, i, 0));
  const Law q = law_of(draft, v, scan(draft, v, scratch.team), of_draft,
                       supports + (v + 63) / 64 * 8, scratch);
  bool stands = false;
  RowKnobs of_row = k;
  of_row.toss(random_of(a, sequence, i, 0));
  with_row<T>(a.rows, a.edits, r, scratch, [&](const auto* x, const RowStats& stats) {
    const Law p = law_of(x, v, stats, of_row, supports, scratch);
    if (p.status != kOk) return bad_sample(a, r, p.status);
    if (q.status != kOk) return bad_sample(a, r, kBadDraft);
    list_row(a, r, x, p);
    const Random random = random_of(a, sequence, i, 1);
    // U Q < 2^64 P, of integers: the largest one below U Q / 2^64 is below P
    stands = draw_target(random.first, q.of(draft, token)) < p.of(x, token);
    int64_t y = token;
    if (!stands) {
      const int64_t n = p.everything ? v : list_survivors(p, v, scratch.list_id);
      const int32_t* id = p.everything ? nullptr : scratch.list_id;
      y = draw_rest(rest_of(x, p, draft, q, id, n, v), random.second, scratch);
    }
    const double s = to_float(x[y]) * p.inv_t;
    a.tokens[r] = y;
    a.logprobs[r] = k.greedy() ? 0.0f : static_cast<float>(s - p.m - log_mass(p.s));
    a.kept[r] = static_cast<int32_t>(p.kept);
    a.status[r] = kOk;
  });
  return stands;
}

template <class T>
static void verify_sequence(const VerifyArgs& a, int64_t sequence, const Scratch& scratch) {
  const RowKnobs k = knobs_of(a.knobs, sequence);
  const int64_t length = a.lengths ? a.lengths[sequence] : a.k;
  const int64_t first = sequence * (a.k + 1);
  int64_t i = 0;
  for (bool stands = true; stands; ++i) {
    const int64_t r = first + i;
    if (i < length && a.draft_rows.data) {
      stands = judge_draft<T>(a, sequence, i, k, scratch);
    } else {
      with_row<T>(a.rows, a.edits, r, scratch, [&](const auto* x, const RowStats& stats) {
        draw(a, r, x, stats, k, random_of(a, sequence, i, 0), scratch);
      });
      stands = i < length && a.tokens[r] == a.draft[sequence * a.k + i];
    }
  }
  a.accepted[sequence] = i - 1;
  for (; i <= a.k; ++i) {
    a.tokens[first + i] = -1;
    a.logprobs[first + i] = 0;
    a.kept[first + i] = 0;
    a.status[first + i] = kOk;
  }
}
