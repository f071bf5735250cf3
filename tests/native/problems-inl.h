// Random problems for the kernels: rows, knobs, tokens and outputs of exact size that begin as
// garbage. A part of fuzz_kernels.cpp and race_kernels.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "vec_types.h"

namespace {

using namespace fastadapt;
using Bytes = std::unique_ptr<uint8_t[]>;

// The rows of a problem: a few of any length up to 40,000, a batch of short ones, or long ones.
enum class Lengths { kAll, kShort, kLong };

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kIgnored = -100;
thread_local std::mt19937_64 rng;

int64_t below(int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }
bool one_in(int64_t n) { return below(n) == 0; }
double normal() { return std::normal_distribution<double>()(rng); }
template <class T>
T pick(std::initializer_list<T> from) {
  return from.begin()[below(static_cast<int64_t>(from.size()))];
}

Bytes garbage(int64_t bytes) {
  Bytes b(new uint8_t[static_cast<size_t>(bytes)]);
  const int value = pick({0x7f, 0xff, 0x01, -1});  // huge, NaN, small, noise
  if (value >= 0) std::memset(b.get(), value, static_cast<size_t>(bytes));
  for (int64_t i = 0; value < 0 && i < bytes; i += 8) {
    const uint64_t noise = rng();
    std::memcpy(b.get() + i, &noise, static_cast<size_t>(std::min<int64_t>(8, bytes - i)));
  }
  return b;
}

struct Array {
  const char* name;
  Bytes data;
  int64_t bytes;
};

// Arrays of garbage that live as long as this.
struct Arrays {
  std::vector<Array> all;

  template <class T>
  T* add(const char* name, int64_t n, int64_t element = sizeof(T)) {
    all.push_back({name, garbage(n * element), n * element});
    return reinterpret_cast<T*>(all.back().data.get());
  }

  // The array of a name, or null.
  template <class T>
  const T* get(const char* name) const {
    for (const Array& a : all)
      if (!std::strcmp(a.name, name)) return reinterpret_cast<const T*>(a.data.get());
    return nullptr;
  }

  // The name of the first array that has other bits in the other one, or null.
  const char* differs_from(const Arrays& other) const {
    for (size_t j = 0; j < all.size(); ++j)
      if (std::memcmp(all[j].data.get(), other.all[j].data.get(),
                      static_cast<size_t>(all[j].bytes)))
        return all[j].name;
    return nullptr;
  }
};

// The value of random bits of a type: NaN and infinities in one row of two at most, few of them.
double random_bits(DType dtype, int64_t v, bool bad) {
  const uint64_t b = rng();
  double z = static_cast<double>(bits_float(static_cast<uint32_t>(b)));
  if (dtype == DType::kBFloat16) z = to_float(bf16{static_cast<uint16_t>(b)});
  if (dtype == DType::kFloat16) z = to_float(f16{static_cast<uint16_t>(b)});
  if (dtype == DType::kFloat64) std::memcpy(&z, &b, 8);
  return std::isfinite(z) || (bad && one_in(v)) ? z : 0;
}

void fill_row(std::vector<double>& x, DType dtype) {
  const double scale = pick({1e-3, 1., 3., 8., 50., 1e20}), shift = pick({0., 0., 1e4, -1e4, 3e5});
  const double level = pick({.1, 1., 5., 20., 28., 200.}), share = pick({.5, .03, .99});
  const int64_t v = static_cast<int64_t>(x.size()), kind = below(20), one = below(v);
  const bool bad = one_in(2);
  for (int64_t i = 0; i < v; ++i) {
    const double g = normal(), u = static_cast<double>(rng() >> 11) * 0x1p-53;
    double& z = x[static_cast<size_t>(i)];
    if (kind == 0) z = g * scale + shift;
    if (kind == 1) z = scale;                                                // flat
    if (kind == 2) z = std::nearbyint(g * scale) + shift;                    // ties
    if (kind == 3) z = u < share ? level : 0;                                // two levels
    if (kind == 4) z = i == one ? 7 : scale == 50 ? -kInf : -level;          // one hot
    if (kind == 5) z = u < share ? -kInf : g * scale;                        // holes
    if (kind == 6) z = (u < .5 ? 3e38 : -3e38) * (one_in(3) ? g : 1);        // huge
    if (kind == 7) z = one_in(200) ? pick({kInf, -kInf, std::nan("")}) : g;  // bad
    if (kind == 8) z = -kInf;                                                // nothing finite
    if (kind == 9) z = (u - .5) * pick({1e-43, 1e-38, 1e-39, 1e-6});         // denormal
    if (kind == 10) z = u < share ? -0. : 0.;                                // both zeros
    if (kind == 11) z = -std::exp2(static_cast<double>(below(250)) - 125);   // every magnitude
    if (kind == 12) z = -level * static_cast<double>(i) / static_cast<double>(v);
    if (kind == 13) z = bits_float(0x41200000u - static_cast<uint32_t>(below(40)));  // neighbours
    if (kind == 14) z = i == one ? -1e30 : 1 + 1e-6 * g;                             // outlier
    if (kind == 15) z = -level - std::log1p(static_cast<double>(i));                 // power law
    if (kind == 16) z = u < share ? std::nearbyint(g * 8) / 8 : pick({-0., 0., 0., -kInf});
    if (kind == 17) z = random_bits(dtype, v, bad);
    if (kind == 18) z = one_in(v) && bad ? pick({1e300, -1e300, 1e39, -1e39, 5e-324}) : g * 3;
    if (kind == 19) z = i % 2 ? level + g * .01 : -g * .01;  // two clouds, about a typical centre
  }
}

void fill_knobs(double* k, int64_t step, int64_t v) {
  const double some = static_cast<double>(1 + below(v));
  const double share = some / static_cast<double>(v);  // lands on the borders of flat rows
  const double tail = pick({1e-12, 1e-5, 3e-4, .01, .5, .99, 1e-300, .9 / some});
  const double neutral[kNumKnobs] = {1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, .1};
  const double other[kNumKnobs] = {pick({.7, 1.3, .1, 2.5, 0., 1e-6, 100., 3.4e38}),
                                   pick({1., 2., 5., 50., 200., 1e6, some}),
                                   pick({0., .1, .5, .9, .999, .999999, 1e-9, share, 1 - 1e-15}),
                                   pick({1e-12, 1e-7, .01, .1, .5, 1., share}),
                                   pick({1e-9, .1, .5, .9, .999, .999999999, share}),
                                   tail,
                                   tail,
                                   pick({2., 3., 10., 70., 5000., some, some + 5}),
                                   pick({.3, 1., 2., 5., 1e6}),
                                   pick({1e-9, 3., 100., 1e6}),
                                   pick({1e-9, .1, .5, 1., share}),
                                   pick({.1, .5, .9, 1., 1e-9}),
                                   pick({.5, 1., 1.}),
                                   pick({0., 1e-9, .01, .1, .5, .7, share})};
  const bool shapes = one_in(2);
  for (int i = 0; i < kNumKnobs; ++i)
    k[i * step] = (i > kKeep ? shapes && one_in(4) : one_in(3)) ? other[i] : neutral[i];
  if (one_in(60)) k[below(kNumKnobs) * step] = pick({-1., 2.5e300, std::nan("")});
}

// Those of a name, or any.
Filters some_order() {
  std::vector<Filters> filters{8, 9, 11, 1, 2, 3, 10, 4, 5, 6, 12};
  if (one_in(3)) std::swap(filters[3], filters[5]);
  if (one_in(3)) std::shuffle(filters.begin(), filters.end(), rng);
  Filters packed = 0;
  for (size_t i = 0; i < filters.size(); ++i) packed |= filters[i] << kBitsOfFilter * i;
  return packed;
}

void put(double z, DType dtype, uint8_t* to) {
  const float x = static_cast<float>(z);
  bf16 b;
  f16 h;
  from_float(x, &b);
  from_float(x, &h);
  if (dtype == DType::kFloat32) std::memcpy(to, &x, 4);
  if (dtype == DType::kBFloat16) std::memcpy(to, &b, 2);
  if (dtype == DType::kFloat16) std::memcpy(to, &h, 2);
  if (dtype == DType::kFloat64) std::memcpy(to, &z, 8);
}

// The length of a row. Thresholds are sought in a sample from 1024 elements on, and a few thousand
// no longer fit the cache nearest the core.
int64_t row_length(Lengths lengths) {
  if (lengths == Lengths::kLong) return 8192 + below(262144 + 4097 - 8192);
  if (lengths == Lengths::kShort) return 1 + below(64);
  if (one_in(40)) return 5000 + below(35000);
  return pick({1 + below(70), 1 + below(1500), 1 + below(5000),
               pick({8, 16, 32, 1024, 2048, 4096, 8192}) + below(3) - 1});
}

int64_t row_count(Lengths lengths, int64_t v) {
  if (lengths == Lengths::kShort) return 16 + below(33);
  if (lengths == Lengths::kLong) return 1 + below(2);
  return v < 100 && one_in(8) ? 4 + below(60) : 1 + below(3);
}

// Everything that the functions read.
struct Problem {
  DType dtype =
      pick({DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64});
  int64_t element = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  int64_t v, n;
  int64_t stride = pick({v, v, v, v + below(9), 2 * v + below(70), int64_t{0}});
  int64_t top_n = one_in(2) ? 0 : std::min(v, 1 + below(one_in(9) ? 1024 : 6));
  bool base = one_in(2), mass = one_in(2), placed = !one_in(4);
  Bytes logits = garbage(((n - 1) * stride + v) * element);
  std::vector<std::vector<double>> packed;  // (kNumKnobs, R) for each adaptor
  std::vector<Knobs> knobs;
  std::vector<int64_t> seeds, positions, tokens, draft;
  std::vector<float> dlog_odds;
  std::vector<double> dlog_odds64;
  std::vector<int32_t> ids;  // of edits, in compressed rows
  std::vector<int64_t> offsets{0};
  std::vector<float> columns;
  std::vector<uint32_t> words;  // of what is allowed
  bool given = one_in(3), lists = dtype != DType::kFloat64 && one_in(2);
  bool masks = dtype != DType::kFloat64 && one_in(3);
  int64_t words_a_row = (v + 31) / 32 + below(2);

  explicit Problem(Lengths lengths) : v(row_length(lengths)), n(row_count(lengths, v)) {
    std::vector<double> row(static_cast<size_t>(v));
    for (int64_t r = 0; r < n; ++r) {
      fill_row(row, dtype);
      uint8_t* to = logits.get() + r * stride * element;
      for (double z : row) put(z, dtype, to), to += element;
      seeds.push_back(static_cast<int64_t>(rng()));
      positions.push_back(static_cast<int64_t>(rng() >> below(64)));
      tokens.push_back(one_in(9) ? kIgnored : below(v));
      draft.push_back(below(v));
      dlog_odds64.push_back(one_in(30) ? pick({kInf, std::nan(""), 1e-30}) : normal());
      dlog_odds.push_back(static_cast<float>(dlog_odds64.back()));
    }
    const int64_t most = lengths == Lengths::kLong ? 2 : one_in(50) && v < 200 ? kMaxAdaptors : 4;
    for (int64_t a = 1 + below(most); a > 0; --a) {
      const int64_t columns = one_in(2) ? 1 : n;
      packed.emplace_back(static_cast<size_t>(kNumKnobs * columns));
      for (int64_t r = 0; r < columns; ++r) fill_knobs(packed.back().data() + r, columns, v);
      knobs.push_back(
          {packed.back().data(), columns, columns == 1 ? 0 : 1, some_order(), one_in(4)});
    }
    fill_edits();
  }

  // A few ids of each row or most of them, with numbers that often change nothing; words of random
  // bits, of none and of all.
  void fill_edits() {
    for (int64_t r = 0; lists && r < n; ++r) {
      const int64_t among = pick({int64_t{1}, int64_t{2}, 1 + v / 9, 2 * v});
      for (int64_t i = 0; i < v; ++i)
        if (one_in(among)) ids.push_back(static_cast<int32_t>(i));
      offsets.push_back(static_cast<int64_t>(ids.size()));
    }
    for (int column = 0; column < (given ? 1 : 4); ++column) {
      for (size_t e = 0; e < ids.size(); ++e) {
        const double number = column == 1 ? std::exp(normal() * .3) : normal() * 3;
        const double neutral = column == 1 ? 1 : 0, ban = column == 1 ? 1e-3 : -kInf;
        columns.push_back(static_cast<float>(one_in(3) ? neutral : one_in(9) ? ban : number));
      }
    }
    for (int64_t i = 0; masks && i < n * words_a_row; ++i)
      words.push_back(one_in(4) ? 0 : one_in(4) ? ~0u : static_cast<uint32_t>(rng()));
  }

  Edits edits() const {
    Edits e{};
    if (lists)
      e = {ids.data(),
           offsets.data(),
           columns.data(),
           static_cast<int64_t>(ids.size()),
           given,
           nullptr,
           0};
    if (masks) e.allowed = words.data(), e.allowed_stride = words_a_row;
    return e;
  }
};

// The ids that rows list.
class Listed {
 public:
  Listed(int64_t n, int64_t whole) : whole_(whole), lists_(static_cast<size_t>(n)) {}

  Supports supports() {
    return {[](void* self, int64_t list, int64_t count) {
              auto& ids = static_cast<Listed*>(self)->lists_[static_cast<size_t>(list)];
              ids.assign(static_cast<size_t>(count) + 64, -1);
              return ids.data();
            },
            this, whole_};
  }

  // A byte for each of V tokens: 1 if a row of so many kept has it; 9 where ids do not ascend.
  void write(int64_t list, int64_t kept, int64_t v, uint8_t* bytes) const {
    const auto& ids = lists_[static_cast<size_t>(list)];
    std::memset(bytes, kept == whole_, static_cast<size_t>(v));
    for (size_t i = 0; i + 64 < ids.size(); ++i) {
      const bool good = ids[i] >= 0 && ids[i] < v && (i == 0 || ids[i - 1] < ids[i]);
      bytes[good ? ids[i] : 0] = good ? 1 : 9;
    }
  }

 private:
  int64_t whole_;
  std::vector<std::vector<int32_t>> lists_;
};

// Sequences of one draft and two rows each, the drafts' own rows behind them. Where the rows of a
// problem are one and the same, so are both laws, and every draft of some mass stands.
template <class Call>
void verified(const KernelTable& table, const Problem& p, const Rows& rows, Arrays* o,
              Call&& call) {
  const int64_t n = p.n / 3;
  if (n == 0) return;
  VerifyArgs a{};
  a.rows = {rows.data, rows.dtype, n, rows.v, rows.stride};
  a.knobs = p.knobs[0];
  a.edits = p.edits();
  a.seeds = p.seeds.data();
  a.positions = p.placed ? p.positions.data() : nullptr;
  a.tokens = o->add<int64_t>("verified tokens", 2 * n);
  a.logprobs = o->add<float>("verified logprobs", 2 * n);
  a.kept = o->add<int32_t>("verified kept", 2 * n);
  a.status = o->add<uint8_t>("verified status", 2 * n);
  a.accepted = o->add<int64_t>("accepted", n);
  Listed listed(2 * n, rows.v + p.placed);
  a.supports = listed.supports();
  a.k = 1;
  a.draft = p.draft.data();
  if (p.base) {
    a.draft_rows = {p.logits.get() + 2 * n * p.stride * p.element, rows.dtype, n, rows.v,
                    rows.stride};
    a.draft_knobs = p.knobs.back();
  }
  uint8_t* survived = o->add<uint8_t>("verified support", 2 * n * rows.v);
  call(table.verify, a);
  for (int64_t i = 0; i < 2 * n; ++i) listed.write(i, a.kept[i], rows.v, survived + i * rows.v);
}

// All outputs of all functions, always in the same order; call(function, args) runs one of them.
template <class Call>
Arrays outputs(const KernelTable& table, const Problem& p, Call&& call) {
  Arrays o;
  const Rows rows{p.logits.get(), p.dtype, p.n, p.v, p.stride};
  const int64_t n = p.n, v = p.v, a = static_cast<int64_t>(p.knobs.size()), t = p.top_n;
  const int64_t* y = p.tokens.data();
  const bool wide = p.dtype == DType::kFloat64;
  if (!wide) {
    const FilterArgs f{rows, p.knobs[0], p.edits(), o.add<uint8_t>("filtered", n * v, p.element)};
    call(table.filter, f);
    Listed drawn(n, v + p.placed), marked(n * a, v + p.placed);
    const SampleArgs s{rows,
                       p.knobs[0],
                       p.edits(),
                       p.seeds.data(),
                       p.placed ? p.positions.data() : nullptr,
                       o.add<int64_t>("tokens", n),
                       o.add<float>("logprobs", n),
                       o.add<int32_t>("kept", n),
                       o.add<uint8_t>("status", n),
                       p.base ? o.add<float>("base_logprobs", n) : nullptr,
                       p.mass ? o.add<float>("log_mass", n) : nullptr,
                       t,
                       t ? o.add<int64_t>("top_ids", n * t) : nullptr,
                       t ? o.add<float>("top_logprobs", n * t) : nullptr,
                       t ? o.add<int32_t>("rank", n) : nullptr,
                       drawn.supports()};
    uint8_t* survived = o.add<uint8_t>("sample.support", n * v);
    call(table.sample, s);
    for (int64_t r = 0; r < n; ++r) drawn.write(r, s.kept[r], v, survived + r * v);
    const ScoreArgs c{rows,
                      y,
                      kIgnored,
                      a,
                      p.knobs.data(),
                      p.edits(),
                      o.add<float>("score.logprobs", n * a),
                      o.add<float>("score.log_norm", n * a),
                      o.add<int32_t>("score.kept", n * a),
                      o.add<float>("score.base_logprobs", n),
                      o.add<float>("score.entropy", n),
                      p.mass ? marked.supports() : Supports{}};
    if (p.mass) survived = o.add<uint8_t>("score.support", n * a * v);
    call(table.score, c);
    for (int64_t i = 0; p.mass && i < n * a; ++i)
      marked.write(i, c.kept[i % n * a + i / n], v, survived + i * v);
    verified(table, p, rows, &o, call);
  }
  const LogOddsArgs m{rows,
                      p.knobs[0],
                      p.edits(),
                      y,
                      kIgnored,
                      o.add<uint8_t>("log_odds", n, wide ? 8 : 4),
                      o.add<uint8_t>("support", n * ((v + 7) / 8)),
                      o.add<double>("stats", n * 2)};
  call(table.log_odds, m);
  const void* g = p.dlog_odds.data();
  if (wide) g = p.dlog_odds64.data();
  uint8_t* dlogits = o.add<uint8_t>("dlogits", n * v, p.element);
  float* dgiven =
      p.lists && p.given ? o.add<float>("dgiven", static_cast<int64_t>(p.ids.size())) : nullptr;
  const LogOddsBackwardArgs b{rows,      p.knobs[0], y,         kIgnored, g,
                              m.support, m.stats,    p.edits(), dlogits,  dgiven};
  call(table.log_odds_backward, b);
  return o;
}

}  // namespace
