// The integer rule (docs/sampling-rule.md) as sorts and loops, and every output of the
// kernels by it. A part of fuzz_kernels.cpp.
#pragma once

#include "problems-inl.h"
#include "shapes-inl.h"

namespace {

constexpr float kInfF = std::numeric_limits<float>::infinity();

// A row times 1/T, its maximum and status.
struct Scaled {
  std::vector<float> s;
  float m = -kInfF, inv_t;
  Status status;

  Scaled(const std::vector<float>& x, float inverse) : inv_t(inverse) {
    bool nan = false;
    for (float z : x) {
      s.push_back(z * inv_t);
      nan |= std::isnan(s.back());
      m = s.back() > m ? s.back() : m;
    }
    status = nan ? kNaN : m == kInfF ? kPosInf : m == -kInfF ? kNoFinite : kOk;
  }

  double at(int64_t i) const { return s[static_cast<size_t>(i)]; }

  // a survivor as a type holds it: less m where that may be beyond its range, and no less than its
  // lowest value
  double fitted(int64_t i, DType dtype) const {
    if (dtype == DType::kFloat32) return at(i);
    const float most = dtype == DType::kFloat16 ? 65504.0f : 0x1.fep127f;
    const bool beyond = inv_t > 1 && (m > most || m < -most / 2);
    return std::max(s[static_cast<size_t>(i)] - (beyond ? m : 0), -most);
  }
};

// 2^40 exp(d) by the specified polynomial, 0 below -28.
float mass_of(float d) {
  if (!(d >= -28)) return 0;
  const float t = d * 1.4426950216f, r = (t + 12582912.f) - 12582912.f, f = t - r;
  float p = .00132646f;
  for (float c : {.00967149f, .05550734f, .24022242f, .69314698f, 1.f}) p = p * f + c;
  return std::ldexp(p, 40 + static_cast<int>(r));
}

double log_of(int64_t z) { return std::log(static_cast<double>(z) * 0x1p-40); }

// Knobs of one row.
struct KnobsOfRow {
  double k[kNumKnobs];
  Filters filters;
  bool last;  // the temperature
  bool tossed, excludes;

  KnobsOfRow(const Knobs& from, int64_t r) : filters(from.filters), last(from.temperature_last) {
    for (int i = 0; i < kNumKnobs; ++i) k[i] = from.data[i * from.knob_step + r * from.row_step];
    excludes = k[kXtcProbability] == 1;
    tossed = excludes || k[kXtcProbability] == 0;
  }

  void toss(uint64_t coin) {
    tossed = true;
    excludes = static_cast<double>(coin) < k[kXtcProbability] * 0x1p32;
  }

  bool good() const {
    const double t = k[kTemperature];
    return (t == 0 || (t >= 1e-6 && t <= 3.4028234663852886e38)) && k[kTopK] >= 0 &&
           k[kTopP] >= 0 && k[kTopP] <= 1 && k[kMinP] >= 0 && k[kMinP] <= 1 && k[kTypicalP] > 0 &&
           k[kTypicalP] <= 1 && k[kEpsilon] >= 0 && k[kEpsilon] < 1 && k[kEta] >= 0 &&
           k[kEta] < 1 && k[kKeep] >= 1 && k[kTopNSigma] >= 0 && k[kTopNSigma] <= 1e6 &&
           k[kMinK] >= 0 && k[kMinK] <= 1e6 && k[kTopA] >= 0 && k[kTopA] <= 1 && k[kTopH] >= 0 &&
           k[kTopH] <= 1 && k[kXtcProbability] >= 0 && k[kXtcProbability] <= 1 &&
           k[kXtcThreshold] >= 0 && k[kXtcThreshold] <= 1 && tossed;
  }
  bool greedy() const { return k[kTemperature] == 0; }
  float inv_t() const { return greedy() ? 1.0f : 1.0f / static_cast<float>(k[kTemperature]); }
};

// Which tokens of a good row survive, their masses w, and the masses times -d, u.
struct Distribution {
  std::vector<int64_t> w, u;
  std::vector<char> alive;
  int64_t kept = 0, mass = 0, surprisal = 0;

  // all that is finite
  explicit Distribution(const Scaled& row)
      : w(row.s.size()), u(row.s.size()), alive(row.s.size(), 1) {
    weigh(row.s, row.m);
  }

  void weigh(const std::vector<float>& s, float m) {
    for (size_t i = 0; i < w.size(); ++i) {
      alive[i] = alive[i] && s[i] > -kInfF;
      const float d = s[i] - m, e = alive[i] ? mass_of(d) : 0;  // one that is gone may be above m
      w[i] = static_cast<int64_t>(e);
      u[i] = e > 0 ? static_cast<int64_t>(e * -d) : 0;
    }
    count();
  }

  // what a row's knobs leave of it
  Distribution(const Scaled& row, const KnobsOfRow& knobs) : Distribution(row) {
    std::vector<int64_t> best_first;
    for (size_t i = 0; i < w.size(); ++i)
      if (alive[i]) best_first.push_back(static_cast<int64_t>(i));
    std::stable_sort(best_first.begin(), best_first.end(),
                     [&](auto i, auto j) { return row.s[i] > row.s[j]; });
    for (Filters left = knobs.filters; left; left >>= kBitsOfFilter) {
      const int knob = static_cast<int>(left & 15);
      const double a = knobs.k[knob];
      if (knob == kTopP || knob == kTypicalP ? a == 1 : a == 0) continue;
      if (knob < kTopNSigma || knob == kTopA) {
        filter(row, knob, a, knobs.k[kKeep], best_first);
      } else if (knob != kXtcProbability || knobs.excludes) {
        filter_by_shape(row, knob, knobs, best_first);
      }
      best_first.erase(std::remove_if(best_first.begin(), best_first.end(),
                                      [&](int64_t i) { return !alive[i]; }),
                       best_first.end());
      count();
    }
  }

 private:
  void filter_by_shape(const Scaled& row, int knob, const KnobsOfRow& knobs,
                       const std::vector<int64_t>& by) {
    Ranked ranked{{}, {}, {}, row.m};
    for (int64_t i : by) {
      ranked.s.push_back(row.s[i]);
      ranked.w.push_back(w[i]);
      ranked.u.push_back(u[i]);
    }
    const double keep = knobs.k[kKeep];
    int64_t first = 0, end = ranked.size();
    if (knob == kTopNSigma) end = ranked.within(knobs.k[knob]);
    if (knob == kMinK) end = ranked.above_cliff(knobs.k[knob]);
    if (knob == kTopH) end = ranked.by_entropy(knobs.k[knob]);
    if (knob == kXtcProbability) first = ranked.excluded(knobs.k[kXtcThreshold], keep);
    end = static_cast<int64_t>(
        std::min(std::max(static_cast<double>(end), keep), static_cast<double>(ranked.size())));
    std::fill(alive.begin(), alive.end(), char(0));
    for (int64_t j = first; j < end; ++j) alive[by[j]] = 1;
  }

  void count() {
    kept = mass = surprisal = 0;
    for (size_t i = 0; i < w.size(); ++i)
      if (alive[i]) ++kept, mass += w[i], surprisal += u[i];
  }

  // One filter; by holds the survivors, best first.
  void filter(const Scaled& row, int knob, double a, double keep, std::vector<int64_t> by) {
    const double zd = static_cast<double>(mass);
    const float centre = static_cast<float>(static_cast<double>(surprisal) / zd);
    const auto key = [&](int64_t i) {
      return knob == kTypicalP ? -std::fabs((row.s[i] - row.m) + centre) : row.s[i];
    };
    if (knob == kTypicalP) {
      std::sort(by.begin(), by.end());
      std::stable_sort(by.begin(), by.end(), [&](auto i, auto j) { return key(i) > key(j); });
    }
    int64_t top = 0, before = 0;
    for (int64_t i : by) top = std::max(top, w[i]);
    const size_t guard =
        keep < static_cast<double>(by.size()) ? static_cast<size_t>(keep) : by.size();
    const double nearly = 1 - 0x1p-19, almost = 1 - 0x1p-52;
    const double min_p = std::ceil(static_cast<float>(a) * static_cast<double>(top) * nearly);
    const double share = static_cast<double>(top) / zd;
    const double top_a = std::ceil(a * share * static_cast<double>(top) * nearly);
    const double h = std::log(zd * 0x1p-40) + static_cast<double>(surprisal) / zd;
    const double eta = std::ceil(std::min(a, std::sqrt(a) * std::exp(-h)) * zd * nearly);
    std::fill(alive.begin(), alive.end(), char(0));
    const int64_t heavy = (mass + 1023) >> 10;
    const int64_t least = static_cast<int64_t>(std::ceil(a * zd * nearly));
    const int64_t most = static_cast<int64_t>(std::ceil(a * zd * almost));
    float last = key(by[0]);  // of typical: tokens that are equally typical are as one
    for (size_t j = 0, end; knob == kTypicalP && j < by.size(); j = end) {
      int64_t group = 0;
      for (end = j; end < by.size() && key(by[end]) == key(by[j]); ++end) group += w[by[end]];
      if (before < (group >= heavy ? least : most)) last = key(by[j]);
      before += group;
    }
    before = 0;
    for (size_t j = 0; j < by.size(); before += w[by[j++]]) {
      const int64_t i = by[j];
      const bool in_guard = j < guard, tie = key(i) == key(by[guard - 1]);
      if (knob == kTopK) {
        const double rank = std::max(a, static_cast<double>(guard));
        alive[i] = key(i) >= key(by[std::min<double>(rank, by.size()) - 1]);
      }
      if (knob == kTopP) alive[i] = in_guard || before < (w[i] >= heavy ? least : most);
      if (knob == kMinP) alive[i] = in_guard || w[i] >= static_cast<int64_t>(min_p);
      if (knob == kTopA) alive[i] = in_guard || w[i] >= static_cast<int64_t>(top_a);
      if (knob == kTypicalP) alive[i] = in_guard || key(i) >= last;
      if (knob == kEpsilon) alive[i] = in_guard || tie || w[i] >= least;
      if (knob == kEta) alive[i] = in_guard || tie || w[i] >= static_cast<int64_t>(eta);
    }
  }
};

// A row at a temperature, what its knobs leave of it, and the largest that the masses are of.
struct Law {
  Scaled row;
  Status status;
  float m;
  Distribution left;

  Law(const std::vector<float>& x, const KnobsOfRow& knobs)
      : row(x, knobs.inv_t()), status(kBadKnob), m(row.m), left(row) {
    const Scaled first(x, knobs.last ? 1 : knobs.inv_t());
    if (knobs.good()) status = first.status;
    if (status != kOk || (knobs.greedy() && !knobs.last)) return;
    left = Distribution(first, knobs);
    if (first.inv_t == row.inv_t) return;
    m = -kInfF;
    for (size_t i = 0; i < x.size(); ++i)
      if (left.alive[i]) m = std::max(m, row.s[i]);
    status = row.m == kInfF ? kPosInf : m == -kInfF ? kNoFinite : kOk;
    left.weigh(row.s, m);
  }
};

// Philox4x32-10 (Salmon et al. 2011), key = seed, counter = position: the first 64 bits, and 32
// more.
std::pair<uint64_t, uint64_t> philox(uint64_t seed, uint64_t position) {
  uint64_t c[4] = {position & 0xffffffff, position >> 32, 0, 0};
  uint64_t k[2] = {seed & 0xffffffff, seed >> 32};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53 * c[0], b = 0xCD9E8D57 * c[2];
    const uint64_t next[4] = {(b >> 32) ^ c[1] ^ k[0], b & 0xffffffff, (a >> 32) ^ c[3] ^ k[1],
                              a & 0xffffffff};
    std::copy(next, next + 4, c);
    k[0] = (k[0] + 0x9E3779B9) & 0xffffffff;
    k[1] = (k[1] + 0xBB67AE85) & 0xffffffff;
  }
  return {c[0] | c[1] << 32, c[2]};
}

// Float outputs come from the same integers by the same formula in double, so they may differ by
// little more than their own rounding.
bool close(double got, double want, double tolerance = 3e-7) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::fabs(want) > 3.4e38 && std::fabs(got) > 3.4e38) return (got < 0) == (want < 0);
  return got == want || std::fabs(got - want) <= tolerance * (1 + std::fabs(want));
}

// A problem, its outputs and one of its rows.
struct Case {
  const Problem& p;
  const Arrays& o;
  int64_t r;
  std::vector<float> x;          // float32 values, of a float64 row too; edited
  std::vector<int64_t> edit_of;  // the place of its edit in the lists, or -1
  std::vector<float> slope;      // of x by the logit

  Case(const Problem& problem, const Arrays& outputs, int64_t row)
      : p(problem), o(outputs), r(row) {
    for (int64_t i = 0; i < p.v; ++i) {
      const uint8_t* at = p.logits.get() + (r * p.stride + i) * p.element;
      if (p.dtype == DType::kFloat64) x.push_back(static_cast<float>(wide(i)));
      if (p.dtype == DType::kFloat32) x.push_back(*reinterpret_cast<const float*>(at));
      if (p.dtype == DType::kBFloat16) x.push_back(to_float(*reinterpret_cast<const bf16*>(at)));
      if (p.dtype == DType::kFloat16) x.push_back(to_float(*reinterpret_cast<const f16*>(at)));
    }
    edit_of.assign(x.size(), -1);
    slope.assign(x.size(), 1);
    for (int64_t e = p.lists ? p.offsets[r] : 0; p.lists && e < p.offsets[r + 1]; ++e)
      edit(p.ids[e], static_cast<size_t>(e), p.ids.size());
    for (size_t i = 0; p.masks && i < x.size(); ++i)
      if (!(p.words[r * p.words_a_row + i / 32] >> i % 32 & 1)) x[i] = -kInfF;
  }

  void edit(int32_t id, size_t e, size_t count) {
    float& z = x[id];
    edit_of[id] = static_cast<int64_t>(e);
    if (p.given) {
      z = p.columns[e], slope[id] = 0;
    } else if (z != -kInfF) {
      const float penalty = p.columns[count + e];
      z += p.columns[e];
      slope[id] = z > 0 ? 1 / penalty : penalty;
      z = z > 0 ? z / penalty : z * penalty;
      z += p.columns[2 * count + e];
      z += p.columns[3 * count + e];
    }
  }

  bool edited() const { return p.lists || p.masks; }

  double wide(int64_t i) const {
    return reinterpret_cast<const double*>(p.logits.get())[r * p.stride + i];
  }

  // output[r] of an array, want where it was not asked for
  template <class T>
  T got(const char* name, T want) const {
    const T* all = o.get<T>(name);
    return all ? all[r] : want;
  }

  const char* filtered(const Scaled* row, const std::vector<char>* alive) const {
    const uint8_t* out = o.get<uint8_t>("filtered") + r * p.v * p.element;
    for (int64_t i = 0; i < p.v; ++i) {
      uint8_t want[8];
      const double s =
          row ? row->fitted(i, p.dtype) : static_cast<double>(x[static_cast<size_t>(i)]);
      put(!alive || (*alive)[static_cast<size_t>(i)] ? s : -kInf, p.dtype, want);
      if (!alive && std::isnan(x[i]) && edited()) continue;  // its bits mean nothing
      if (!alive && !edited())
        std::memcpy(want, p.logits.get() + (r * p.stride + i) * p.element, p.element);
      if (std::memcmp(want, out + i * p.element, p.element)) return "filtered";
    }
    return nullptr;
  }

  // the most probable tokens of the base distribution and the rank of the drawn one
  const char* top(const Scaled& base, double log_z, int64_t token) const {
    std::vector<int64_t> by(x.size());
    for (size_t i = 0; i < by.size(); ++i) by[i] = static_cast<int64_t>(i);
    std::stable_sort(by.begin(), by.end(), [&](auto i, auto j) { return base.s[i] > base.s[j]; });
    for (int64_t i = 0; i < p.top_n; ++i) {
      if (o.get<int64_t>("top_ids")[r * p.top_n + i] != by[i]) return "top_ids";
      if (!close(o.get<float>("top_logprobs")[r * p.top_n + i], base.at(by[i]) - base.m - log_z))
        return "top_logprobs";
    }
    const int64_t rank = std::find(by.begin(), by.end(), token) - by.begin() + 1;
    return p.top_n && o.get<int32_t>("rank")[r] != rank ? "rank" : nullptr;
  }

  const char* sample_and_filter() const {
    KnobsOfRow knobs(p.knobs[0], r);
    const auto [random, coin] =
        philox(static_cast<uint64_t>(p.seeds[r]),
               p.placed ? static_cast<uint64_t>(p.positions[r]) : uint64_t{0});
    const bool alike = knobs.tossed;  // else nothing is filtered, and the coin is the draw's
    knobs.toss(coin);
    const Law law(x, knobs);
    const Scaled& row = law.row;
    if (got<uint8_t>("status", 0) != law.status) return "status";
    if (law.status != kOk) {
      if (got<int64_t>("tokens", 0) != -1 || got<int32_t>("kept", 1) != 0) return "bad row";
      return filtered(nullptr, nullptr);
    }
    const Distribution whole(row);
    int64_t token = -1, kept = 1;
    for (int64_t i = 0; i < p.v; ++i)
      if (law.left.alive[i] && (token < 0 || row.s[i] > row.s[token])) token = i;
    double logprob = 0, log_mass = 0;
    std::vector<char> alive(x.size());
    alive[static_cast<size_t>(token)] = 1;
    if (!knobs.greedy()) {
      const Distribution& distribution = law.left;
      const int64_t target = static_cast<int64_t>(
          static_cast<unsigned __int128>(random) * static_cast<uint64_t>(distribution.mass) >> 64);
      int64_t running = 0;
      for (token = 0;; ++token)
        if (distribution.alive[token] && (running += distribution.w[token]) > target) break;
      kept = distribution.kept;
      logprob = row.at(token) - law.m - log_of(distribution.mass);
      log_mass = log_of(distribution.mass) - (log_of(whole.mass) + (row.m - law.m));
      alive = distribution.alive;
    }
    if (got("tokens", token) != token) return "tokens";
    if (got("kept", static_cast<int32_t>(kept)) != kept) return "kept";
    const uint8_t* survived = o.get<uint8_t>("sample.support") + r * p.v;
    for (int64_t i = 0; i < p.v; ++i)
      if (survived[i] != alive[static_cast<size_t>(i)]) return "sample.support";
    if (!close(got("logprobs", 0.f), logprob)) return "logprobs";
    if (!close(got("log_mass", static_cast<float>(log_mass)), log_mass)) return "log_mass";
    const Scaled base(x, 1);
    const double log_z = log_of(Distribution(base).mass),
                 base_logprob = base.at(token) - base.m - log_z;
    if (!close(got("base_logprobs", static_cast<float>(base_logprob)), base_logprob))
      return "base_logprobs";
    if (const char* what = top(base, log_z, token)) return what;
    return alike ? filtered(&row, &alive) : filtered(nullptr, nullptr);
  }

  const char* score() const {
    const int64_t y = p.tokens[r], n = static_cast<int64_t>(p.knobs.size());
    const Scaled base(x, 1);
    const bool ignored = y == kIgnored;
    double base_logprob = ignored ? 0 : std::nan(""), entropy = base_logprob, log_z = 0;
    if (!ignored && base.status == kOk) {
      const Distribution distribution(base);
      log_z = log_of(distribution.mass);
      base_logprob = base.at(y) - base.m - log_z;
      entropy = log_z + static_cast<double>(distribution.surprisal) /
                            static_cast<double>(distribution.mass);
    }
    if (!close(got("score.base_logprobs", 0.f), base_logprob)) return "score.base_logprobs";
    if (!close(got("score.entropy", 0.f), entropy)) return "score.entropy";
    for (int64_t i = 0; i < n; ++i) {
      const KnobsOfRow knobs(p.knobs[static_cast<size_t>(i)], r);
      double logprob = ignored ? 0 : std::nan(""), log_norm = logprob;
      int64_t kept = 0;
      const Law law(x, knobs);
      const bool good = base.status == kOk && law.status == kOk;
      if (!ignored && good && !knobs.greedy()) {
        kept = law.left.kept;
        logprob = law.left.alive[y] ? law.row.at(y) - law.m - log_of(law.left.mass) : -kInf;
        const double inv_t = static_cast<double>(knobs.inv_t());
        log_norm = law.m - base.m * inv_t + log_of(law.left.mass) - log_z * inv_t;
      }
      if (o.get<int32_t>("score.kept")[r * n + i] != kept) return "score.kept";
      const uint8_t* survived =
          p.mass ? o.get<uint8_t>("score.support") + (i * p.n + r) * p.v : nullptr;
      for (int64_t j = 0; survived && j < p.v; ++j)
        if (survived[j] != (kept > 0 && law.left.alive[j])) return "score.support";
      if (!close(o.get<float>("score.logprobs")[r * n + i], logprob)) return "score.logprobs";
      if (!close(o.get<float>("score.log_norm")[r * n + i], log_norm)) return "score.log_norm";
    }
    return nullptr;
  }

  const char* log_odds() const {
    const bool wide_row = p.dtype == DType::kFloat64;
    const KnobsOfRow knobs(p.knobs[0], r);
    const Law law(x, knobs);
    const Scaled& row = law.row;
    const int64_t y = p.tokens[r];
    const bool good = y != kIgnored && !knobs.greedy() && law.status == kOk;
    const std::vector<char> alive = good ? law.left.alive : std::vector<char>(x.size());
    const uint8_t* support = o.get<uint8_t>("support") + r * ((p.v + 7) / 8);
    for (int64_t i = 0; i < (p.v + 7) / 8 * 8; ++i)
      if ((support[i / 8] >> i % 8 & 1) != (i < p.v && alive[i])) return "support";

    const double t = knobs.k[kTemperature];
    const auto s_of = [&](int64_t i) { return wide_row ? wide(i) / t : row.at(i); };
    double m = -kInf, z = 0, log_odds = y == kIgnored ? 0 : std::nan("");
    const auto mass = [&](int64_t i) {
      const double d = s_of(i) - m;
      return wide_row ? std::exp(d) : static_cast<double>(mass_of(static_cast<float>(d))) * 0x1p-40;
    };
    if (good && alive[y]) {
      for (int64_t i = 0; i < p.v; ++i)
        if (i != y && alive[i]) m = std::max(m, s_of(i));
      for (int64_t i = 0; i < p.v; ++i)
        if (i != y && alive[i]) z += mass(i);
      log_odds = z > 0 ? s_of(y) - m - std::log(z) : kInf;
    } else if (good) {
      log_odds = -kInf;
    }
    const double got_log_odds =
        wide_row ? got("log_odds", 0.) : static_cast<double>(got("log_odds", 0.f));
    if (!close(got_log_odds, log_odds, wide_row ? 1e-11 : 3e-7)) return "log_odds";

    // the gradient g/T (onehot(y) - q), in the dtype of the logits
    const double g = wide_row ? p.dlog_odds64[r] : static_cast<double>(p.dlog_odds[r]);
    const double gain = wide_row ? g / t : g * static_cast<double>(knobs.inv_t());
    const double rounding = p.dtype == DType::kBFloat16  ? 0x1p-8
                            : p.dtype == DType::kFloat16 ? 0x1p-11
                            : wide_row                   ? 1e-12
                                                         : 1e-6;
    if (!std::isfinite(g) || std::fabs(gain) > 6e4)
      return nullptr;  // rounds to infinity in float16
    for (int64_t i = 0; i < p.v; ++i) {
      const uint8_t* at = o.get<uint8_t>("dlogits") + (r * p.v + i) * p.element;
      double dx = 0, want = 0;
      if (wide_row) std::memcpy(&dx, at, 8);
      if (p.dtype == DType::kFloat32) dx = *reinterpret_cast<const float*>(at);
      if (p.dtype == DType::kBFloat16) dx = to_float(*reinterpret_cast<const bf16*>(at));
      if (p.dtype == DType::kFloat16) dx = to_float(*reinterpret_cast<const f16*>(at));
      if (z > 0 && alive[i]) want = i == y ? gain : -gain * mass(i) / z;
      if (p.lists && p.given && edit_of[i] >= 0) {
        const double dy = static_cast<double>(o.get<float>("dgiven")[edit_of[i]]);
        if (!(std::fabs(dy - want) <= 1e-6 * std::fabs(want) + 1e-37)) return "dgiven";
      }
      want *= static_cast<double>(slope[i]);
      const double least = p.dtype == DType::kFloat16 ? 0x1p-24 : wide_row ? 0 : 1e-37;
      if (!(std::fabs(dx - want) <= (rounding + 1e-12) * std::fabs(want) + least)) return "dlogits";
    }
    return nullptr;
  }
};

// The name of an output that is not what the rule says, or null.
const char* differs_from_rule(const Problem& p, const Arrays& o) {
  for (int64_t r = 0; r < p.n; ++r) {
    const Case c(p, o, r);
    const char* what = c.log_odds();
    if (!what && p.dtype != DType::kFloat64) what = c.sample_and_filter();
    if (!what && p.dtype != DType::kFloat64) what = c.score();
    if (what) return what;
  }
  return nullptr;
}

}  // namespace
