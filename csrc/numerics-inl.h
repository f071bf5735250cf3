// The specified arithmetic (docs/sampling-rule.md): masses, logarithm, exponential, Philox.
// Every operation is rounded separately; the build passes -ffp-contract=off.

constexpr float kLog2E = 1.4426950216f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
constexpr float kLowest = -28.0f;      // below, a token has no mass: 2^40 e^-28 < 1
constexpr double kUnit = 0x1p40;
// Factors of a threshold, so that a mass that reaches it but for rounding does. The polynomial errs
// by up to 1.8e-6 of one token's mass; of many tokens, whose errors cancel, only p and Z are
// rounded.
constexpr double kNearly = 1 - 0x1p-19;
constexpr double kAlmost = 1 - 0x1p-52;
constexpr double kLn2High = 0.693147180369123816490;
constexpr double kLn2Low = 1.90821492927058770002e-10;

// 2^40 e^d before truncation to the integer mass. d is clamped at -29, where it is below 1.
static inline F mass(F d) {
  const F t = mul(maximum(d, fset(-29.0f)), fset(kLog2E));
  const F biased = add(t, fset(kRound));
  const F f = sub(t, sub(biased, fset(kRound)));
  F p = fset(.00132646f);
  p = add(mul(p, f), fset(.00967149f));
  p = add(mul(p, f), fset(.05550734f));
  p = add(mul(p, f), fset(.24022242f));
  p = add(mul(p, f), fset(.69314698f));
  p = add(mul(p, f), fset(1.0f));
  return scale_by(p, biased, 40);
}

// The integer mass of one distance.
static inline int64_t truncated_mass(float d) {
  return static_cast<int64_t>(max_lane(mass(fset(d))));
}

// 2^40 e^d (-d) before truncation, 0 below the lowest d.
static inline F surprisal_mass(F e, F d) {
  const F product = mul(e, neg(maximum(d, fset(-29.0f))));
  return keep_if(ge(d, fset(kLowest)), product);
}

// ln of a positive normal number: atanh series of (f - 1) / (f + 1), f in [sqrt(1/2), sqrt(2)].
static inline double log64(double x) {
  uint64_t b;
  std::memcpy(&b, &x, 8);
  int64_t exponent = static_cast<int64_t>(b >> 52 & 0x7ff) - 1023;
  b = (b & 0xfffffffffffffULL) | 1023ULL << 52;
  double f;
  std::memcpy(&f, &b, 8);
  if (f > 1.4142135623730951) {
    f *= 0.5;
    ++exponent;
  }
  const double k = static_cast<double>(exponent);
  const double q = (f - 1) / (f + 1);
  const double g = q * q;
  double series = 1.0 / 21;
  for (int odd = 19; odd > 0; odd -= 2) series = series * g + 1.0 / odd;
  return k * kLn2High + (2 * q * series + k * kLn2Low);
}

// e^x for x in [-700, 700]: Taylor series of degree 13 after a shift by k ln 2.
static inline double exp64(double x) {
  constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  const double k = (x * 1.4426950408889634 + round) - round;
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double factorial[14] = {1};
  for (int i = 1; i < 14; ++i) factorial[i] = factorial[i - 1] * i;
  double series = 1 / factorial[13];
  for (int i = 12; i >= 0; --i) series = series * r + 1 / factorial[i];
  const uint64_t b = static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &b, 8);
  return series * scale;
}

// ln(mass / 2^40)
static inline double log_mass(int64_t mass) { return log64(static_cast<double>(mass) / kUnit); }

// Entropy in nats of a distribution with masses of sum z and surprisal masses of sum u.
static inline double entropy_of(int64_t z, int64_t u) {
  return log_mass(z) + static_cast<double>(u) / static_cast<double>(z);
}

// What top-p keeps of survivors of mass z, in rank order: tokens before which there is less than a
// target, that of heavy tokens or that of light ones. Typical does in its order, where equally
// typical tokens are as one.
struct Nucleus {
  int64_t least, most;  // the targets of heavy and of light tokens; one token always stays
  int64_t heavy;        // the least mass of a heavy token

  Nucleus(double p, int64_t z) : heavy((z + 1023) >> 10) {
    const double wanted = p * static_cast<double>(z);
    least = static_cast<int64_t>(__builtin_ceil(wanted * kNearly));
    most = static_cast<int64_t>(__builtin_ceil(wanted * kAlmost));
    least = least > 1 ? least : 1;
    most = most > 1 ? most : 1;
  }
  int64_t target(int64_t mass) const { return mass >= heavy ? least : most; }
};

// 128 bits of Philox4x32-10 (Salmon et al. 2011) with key = seed, counter = (position, stream): a
// row's own draw takes the first half of stream 0, a verified draft both of stream 1.
struct Random {
  uint64_t first, second;
};
static inline Random philox(int64_t seed, int64_t position, uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = stream, c3 = 0;
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = next0;
    c1 = static_cast<uint32_t>(p1);
    c2 = next2;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0 | static_cast<uint64_t>(c1) << 32, c2 | static_cast<uint64_t>(c3) << 32};
}

// floor(random * total / 2^64)
static inline int64_t draw_target(uint64_t random, int64_t total) {
  const uint64_t s0 = static_cast<uint32_t>(total), s1 = static_cast<uint64_t>(total) >> 32;
  const uint64_t x0 = static_cast<uint32_t>(random), x1 = random >> 32;
  const uint64_t middle = x1 * s0 + (x0 * s0 >> 32);
  const uint64_t cross = (middle & 0xffffffffu) + x0 * s1;
  return static_cast<int64_t>(x1 * s1 + (middle >> 32) + (cross >> 32));
}

// The smallest float that is >= an integer in [0, 2^62].
static inline float float_at_least(int64_t c) {
  const float f = static_cast<float>(c);
  return static_cast<int64_t>(f) >= c ? f : bits_float(float_bits(f) + 1);
}

// Order-preserving map of floats to integers; -0 and +0 become one.
static inline int32_t ordered(float x) {
  const int32_t b = static_cast<int32_t>(float_bits(x));
  return b >= 0 ? b : static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(b));
}
static inline float from_ordered(int64_t o) {
  const int32_t i = static_cast<int32_t>(o);
  return bits_float(i >= 0 ? static_cast<uint32_t>(i) : 0x80000000u - static_cast<uint32_t>(i));
}
