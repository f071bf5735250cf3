// The integer rule (sampling semantics, section 9) as sorts and loops, for one row; a part of
// fuzz_kernels.cpp, which defines Problem and Arrays.
#pragma once

// A sort-based form of the rule on scaled logits s: which tokens survive, and their masses.
struct Law {
  std::vector<int64_t> w, u;
  std::vector<char> alive;

  Law(const std::vector<float>& s, float m, const double* k, int64_t step, Order order)
      : w(s.size()), u(s.size()), alive(s.size()) {
    for (size_t i = 0; i < s.size(); ++i) {
      const float d = s[i] - m;
      alive[i] = s[i] > -std::numeric_limits<float>::infinity();
      if (!(d >= -28)) continue;
      const float t = d * 1.4426950216f, r = (t + 12582912.f) - 12582912.f, f = t - r;
      float p = .00132646f;
      for (float c : {.00967149f, .05550734f, .24022242f, .69314698f, 1.f}) p = p * f + c;
      const float e = std::ldexp(p, 40 + static_cast<int>(r));
      w[i] = static_cast<int64_t>(e);
      u[i] = static_cast<int64_t>(e * -d);
    }
    const int hf[] = {kTopK, kTopP, kMinP, kTypicalP, kEpsilon, kEta};
    const int vllm[] = {kMinP, kTopK, kTopP, kTypicalP, kEpsilon, kEta};
    const size_t keep = k[kKeep * step] < 1e9 ? static_cast<size_t>(k[kKeep * step]) : size_t(1e9);
    for (int knob : order == Order::kHf ? hf : vllm) {
      const double a = k[knob * step];
      if (knob == kTopP || knob == kTypicalP ? a == 1 : a == 0) continue;
      std::vector<int64_t> by;  // survivors, best first
      for (size_t i = 0; i < s.size(); ++i)
        if (alive[i]) by.push_back(static_cast<int64_t>(i));
      int64_t z = 0, su = 0, top = 0;
      for (int64_t i : by) z += w[i], su += u[i], top = std::max(top, w[i]);
      const double zd = static_cast<double>(z);
      const float centre = static_cast<float>(static_cast<double>(su) / zd);
      auto key = [&](int64_t i) {
        return knob == kTypicalP ? -std::fabs((s[i] - m) + centre) : s[i];
      };
      std::stable_sort(by.begin(), by.end(), [&](auto i, auto j) { return key(i) > key(j); });
      const size_t guard = std::min(keep, by.size());
      std::fill(alive.begin(), alive.end(), char(0));
      int64_t before = 0;
      float last = key(by[0]);
      const double least = std::ceil(knob == kMinP ? static_cast<float>(a) * double(top) : a * zd);
      for (size_t j = 0; j < by.size(); before += w[by[j++]]) {
        const int64_t i = by[j];
        const bool in_guard = j < guard, tie = key(i) == key(by[guard - 1]);
        if (knob == kTopK)
          alive[i] = key(i) >= key(by[std::min<double>(std::max(a, double(guard)), by.size()) - 1]);
        if (knob == kTopP)
          alive[i] = in_guard || before < z - static_cast<int64_t>(std::floor((1 - a) * zd));
        if (knob == kMinP) alive[i] = in_guard || w[i] >= static_cast<int64_t>(least);
        if (knob == kTypicalP) {
          if (before < static_cast<int64_t>(least)) last = key(i);
          alive[i] = in_guard || key(i) >= last;
        }
        if (knob == kEpsilon) alive[i] = in_guard || tie || w[i] >= static_cast<int64_t>(least);
        if (knob == kEta) {
          const double h = std::log(zd * 0x1p-40) + static_cast<double>(su) / zd;
          const double eta = std::min(a, std::sqrt(a) * std::exp(-h));
          alive[i] = in_guard || tie || w[i] >= static_cast<int64_t>(std::ceil(eta * zd));
        }
      }
    }
  }
};

// Philox4x32-10 (Salmon et al. 2011), key = seed, counter = position: the first 64 bits.
static uint64_t philox(uint64_t seed, uint64_t position) {
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
  return c[0] | c[1] << 32;
}

static float value_at(const Problem& p, int64_t i) {
  const uint8_t* x = p.logits.get() + i * p.element;
  if (p.dtype == DType::kFloat32) return *reinterpret_cast<const float*>(x);
  if (p.dtype == DType::kBFloat16) return to_float(*reinterpret_cast<const bf16*>(x));
  return to_float(*reinterpret_cast<const f16*>(x));
}

// Compares filtered rows, tokens and counts of good rows with the rule.
static bool agrees_with_rule(const Problem& p, const Arrays& o) {
  if (p.dtype == DType::kFloat64) return true;
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < p.n; ++r) {
    double k[kNumKnobs];
    for (int i = 0; i < kNumKnobs; ++i)
      k[i] = p.knobs[0].data[i * p.knobs[0].knob_step + r * p.knobs[0].row_step];
    std::vector<float> s;
    const double t = k[kTemperature];
    bool nan = false;
    for (int64_t i = 0; i < p.v; ++i)
      s.push_back(value_at(p, r * p.stride + i) * (t == 0 ? 1.0f : 1.0f / static_cast<float>(t)));
    float m = -inf;
    for (float z : s) nan |= z != z, m = z > m ? z : m;
    int status = nan ? kNaN : m == inf ? kPosInf : m == -inf ? kNoFinite : kOk;
    if (!(t == 0 || (t >= 1e-6 && t <= 3.4028234663852886e38)) || !(k[kTopK] >= 0) ||
        !(k[kTopP] >= 0 && k[kTopP] <= 1) || !(k[kMinP] >= 0 && k[kMinP] <= 1) ||
        !(k[kTypicalP] > 0 && k[kTypicalP] <= 1) || !(k[kEpsilon] >= 0 && k[kEpsilon] < 1) ||
        !(k[kEta] >= 0 && k[kEta] < 1) || !(k[kKeep] >= 1))
      status = kBadKnob;
    if (o.all[4].data[r] != status) return false;
    if (status != kOk || t == 0) continue;
    const Law law(s, m, k, 1, p.knobs[0].order);
    int64_t kept = 0, mass = 0, running = 0, token = 0;
    for (int64_t i = 0; i < p.v; ++i) kept += law.alive[i], mass += law.alive[i] ? law.w[i] : 0;
    const uint64_t x = philox(static_cast<uint64_t>(p.seeds[r]),
                              p.placed ? static_cast<uint64_t>(p.positions[r]) : 0);
    const int64_t target =
        static_cast<int64_t>(static_cast<unsigned __int128>(x) * static_cast<uint64_t>(mass) >> 64);
    for (;; ++token)
      if (law.alive[token] && (running += law.w[token]) > target) break;
    if (token != reinterpret_cast<const int64_t*>(o.all[1].data.get())[r]) return false;
    if (kept != reinterpret_cast<const int32_t*>(o.all[3].data.get())[r]) return false;
    for (int64_t i = 0; i < p.v; ++i) {
      uint64_t want = 0, got = 0;
      put(law.alive[i] ? s[i] : -inf, p.dtype, reinterpret_cast<uint8_t*>(&want));
      std::memcpy(&got, o.all[0].data.get() + (r * p.v + i) * p.element, p.element);
      if (want != got) return false;
    }
  }
  return true;
}
