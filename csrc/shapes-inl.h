// What filters need that look at the shape of the logits: their deviation, or the best in order.

// The best survivors of a view, in rank order: keys, masses and ids.
struct Best {
  static constexpr int64_t kMost = 128;
  float key[kMost + 64], e[kMost + 64];
  int32_t id[kMost + 64];
  int64_t n;

  // Those of the alive, at most kMost.
  template <class V>
  Best(const V& view, int64_t wanted, int64_t alive, const Scratch& scratch) {
    const List list{key, e, id};
    if (wanted < alive) {
      const Selection s = select_best(view, wanted, scratch);
      n = s.listed >= 0 ? gather(candidates(s.listed, scratch), s.cut, list)
                        : gather(view, s.cut, list);
    } else {
      n = gather(view, Everything{}, list);
    }
    for (int64_t i = 1; i < n; ++i) {  // stable, so ids stay ascending among equal keys
      const float key_i = key[i], e_i = e[i];
      const int32_t id_i = id[i];
      int64_t at = i;
      for (; at > 0 && key[at - 1] < key_i; --at) {
        key[at] = key[at - 1];
        e[at] = e[at - 1];
        id[at] = id[at - 1];
      }
      key[at] = key_i;
      e[at] = e_i;
      id[at] = id_i;
    }
  }

  template <class V>
  static Selection select_best(const V& view, int64_t wanted, const Scratch& scratch) {
    return select<true>(view, RankKey{}, wanted, view.n, false, scratch);
  }
  template <class V>
  static RankCut best_of(const V& view, int64_t wanted, const Scratch& scratch) {
    return select_best(view, wanted, scratch).cut;
  }

  // Writes the first of them in the order of their ids.
  void write(int64_t count, const List& out) const {
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = i;
      for (; at > 0 && out.id[at - 1] > id[i]; --at) {
        out.key[at] = out.key[at - 1];
        out.e[at] = out.e[at - 1];
        out.id[at] = out.id[at - 1];
      }
      out.key[at] = key[i];
      out.e[at] = e[i];
      out.id[at] = id[i];
    }
  }
};

// The standard deviation of the logits that are alive, by integer multiples of d, at most 2^20
// each: of the largest power of two for which the lowest logit has none above.
template <class T>
static double deviation(const View<T>& v, int64_t alive, float lowest, const Team* team) {
  const float range = v.m - lowest < -kLowestKey ? v.m - lowest : -kLowestKey;
  const int exponent = static_cast<int>(float_bits(range) >> 23) - 127;
  const float per_unit =
      bits_float(static_cast<uint32_t>(127 + (exponent > -108 ? 19 - exponent : 127)) << 23);
  struct Moments {
    int64_t sum, squares;
  } of_part[kMaxTeam];
  const int parts = in_parts(team, v.n, [&](int part, int64_t begin, int64_t end) {
    const F m = fset(v.m), least = fset(kLowestKey), round = fset(kRound), by = fset(-per_unit);
    L sum = lzero(), squares = lzero();
    for_row<4>(v.x, begin, end, v.inv_t, [&](int64_t, F s) {
      const F scaled = mul(maximum(sub(s, m), least), by);
      const F q = keep_if(gt(s, fset(-kInf)), sub(add(scaled, round), round));
      sum = add_truncated(sum, q);
      squares = add_squares(squares, q);
    });
    of_part[part] = {total(sum), total(squares)};
  });
  int64_t sum = 0, squares = 0;
  for (int i = 0; i < parts; ++i) {
    sum += of_part[i].sum;
    squares += of_part[i].squares;
  }
  const double n = static_cast<double>(alive), mean = static_cast<double>(sum) / n;
  const double variance = static_cast<double>(squares) / n - mean * mean;
  return variance > 0 ? __builtin_sqrt(variance) / static_cast<double>(per_unit) : 0;
}

// How many of the best top-h keeps: as many as have, with those before, h of their entropy.
static int64_t count_by_entropy(const Best& best, float m, double h) {
  int64_t z = 0, u = 0, cumulated[Best::kMost][2];
  for (int64_t i = 0; i < best.n; ++i) {
    const F e = fset(best.e[i]), d = fset(best.key[i] - m);
    cumulated[i][0] = z += static_cast<int64_t>(best.e[i]);
    cumulated[i][1] = u += static_cast<int64_t>(max_lane(surprisal_mass(e, d)));
  }
  // Z times the entropy of a share: sum of u + w ln(Z / 2^40)
  const double log_z = log_mass(z);
  const auto of = [&](const int64_t* sums) {
    return static_cast<double>(sums[1]) + static_cast<double>(sums[0]) * log_z;
  };
  const double most = h * of(cumulated[best.n - 1]) * (1 + 0x1p-19);
  int64_t count = 1;
  while (count < best.n && best.e[count] >= 1 && of(cumulated[count]) <= most) ++count;
  return count;
}

// Sorts floats, the largest first.
static void sort_floats(float* x, int64_t n) {
  const auto sink = [x](int64_t root, int64_t end) {
    const float value = x[root];
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && x[child + 1] < x[child]) ++child;
      if (!(x[child] < value)) break;
      x[root] = x[child];
      x[child] = value;
    }
  };
  for (int64_t root = n / 2; root-- > 0;) sink(root, n);
  for (int64_t end = n; --end > 0;) {
    const float least = x[0];
    x[0] = x[end];
    x[end] = least;
    sink(0, end);
  }
}

// Where sorted logits fall most, each drop divided by how many are above it: the k of min-k.
class Cliff {
 public:
  const Best best;
  int64_t k = 0;

  // Looks at as many of the best as can matter, given the lowest logit that is alive.
  template <class V>
  Cliff(const V& view, int64_t alive, float lowest, const Scratch& scratch)
      : best(view, alive < Best::kMost ? alive : Best::kMost, alive, scratch) {
    float* sorted = scratch.fine_key;
    for (int64_t n = best.n; !look(n == best.n ? best.key : sorted, n, lowest) && n < alive;) {
      n = 8 * n < alive ? 8 * n : alive;
      RankCut cut{kLowestKey, kAllIds};
      if (n < alive) cut = Best::best_of(view, n, scratch);
      gather(view, cut, List{sorted, scratch.fine_e, scratch.fine_id});
      sort_floats(sorted, n);
    }
  }

 private:
  // Whether no drop behind the n best can be steeper.
  bool look(const float* sorted, int64_t n, float lowest) {
    for (; seen_ + 1 < n; ++seen_) {
      const double drop = static_cast<double>(sorted[seen_]) - sorted[seen_ + 1];
      const double share = drop / static_cast<double>(seen_ + 1);
      if (share > steepest_) {
        steepest_ = share;
        k = seen_ + 1;
      }
    }
    const double rest = static_cast<double>(sorted[n - 1]) - lowest;
    return steepest_ >= rest / static_cast<double>(n);
  }

  int64_t seen_ = 0;
  double steepest_ = 0;
};

// The smallest logit of a view that is alive.
template <class T>
static float lowest_of(const View<T>& v) {
  F low = fset(kInf);
  for_view(v, [&](int64_t, F s) { low = minimum(low, choose(gt(s, fset(-kInf)), s, fset(kInf))); });
  return min_lane(low);
}

// How many of the best-ranked min-k keeps.
static int64_t count_above(const Cliff& cliff, double tau, float lowest, int64_t alive) {
  const double range = static_cast<double>(cliff.best.key[0]) - lowest;
  if (range == 0 || tau / range >= static_cast<double>(alive)) return alive;
  const int64_t least = static_cast<int64_t>(tau / range);
  return least > cliff.k ? least : cliff.k;
}

// A logit that is clearly below all that have at least some mass.
static float clearly_below(float m, double mass) {
  const float key = static_cast<float>(m + log64(mass / kUnit) - 1e-4);
  return key - __builtin_fabsf(key) * 1e-6f;
}

// The least probable of several tokens that have at least some mass, and those that are better.
struct LeastOfMany {
  RankCut last{kInf, 0};
  Tally better{0, 0};

  template <class V>
  LeastOfMany(const V& view, double share, int64_t z, const Scratch& scratch) {
    const List list{scratch.fine_key, scratch.fine_e, scratch.fine_id};
    const int64_t wanted =
        static_cast<int64_t>(__builtin_ceil(share * static_cast<double>(z) * kNearly));
    const int64_t mass = wanted > 1 ? wanted : 1;
    const float key = clearly_below(view.m, static_cast<double>(mass));
    n_ = gather(view, RankCut{key, kAllIds}, list);
    const float least = float_at_least(mass);
    int64_t many = 0;
    for (int64_t i = 0; i < n_; ++i) {  // of equals, the last has the highest id
      if (list.e[i] < least) continue;
      ++many;
      if (list.key[i] <= last.key) last = {list.key[i], list.id[i]};
    }
    if (many < 2) return;
    for_better(scratch, [&](int64_t i) {
      better = {better.z + static_cast<int64_t>(list.e[i]), better.count + 1};
    });
  }

  // Takes the masses of those that are better from those of their blocks, in a whole row.
  void take_from_blocks(const Scratch& scratch) const {
    for_better(scratch, [&](int64_t i) {
      scratch.blocks[scratch.fine_id[i] / kBlock] -= static_cast<int64_t>(scratch.fine_e[i]);
    });
  }

 private:
  template <class Fn>
  void for_better(const Scratch& scratch, Fn&& f) const {
    for (int64_t i = 0; i < n_; ++i) {
      const float key = scratch.fine_key[i];
      if (key > last.key || (key == last.key && scratch.fine_id[i] < last.id)) f(i);
    }
  }

  int64_t n_;
};

// Ranked no higher than (key, id).
struct Below {
  RankCut first;
  M operator()(F s, F, I ids) const {
    const M later = both(eq(s, fset(first.key)), ile(iset(first.id), ids));
    return both(gt(s, fset(-kInf)), either(gt(fset(first.key), s), later));
  }
};

static Verdict judge(const Below& test, float, F low, F high) {
  return {gt(fset(test.first.key), high), ge(fset(test.first.key), low)};
}
