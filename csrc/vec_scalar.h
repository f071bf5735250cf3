// One lane: the portable form of the vector vocabulary, and its documentation.
// F: floats, I: int32, M: a mask of lanes, Q: floats truncated to int64, L: int64 sums of those.

using F = float;
using I = int32_t;
using M = bool;
using Q = int64_t;
using L = int64_t;
constexpr int W = 1;

static inline F fset(float x) { return x; }
static inline I iset(int32_t x) { return x; }
static inline L lzero() { return 0; }

template <class T>
static inline F load(const T* p) {
  return to_float(*p);
}
static inline I iload(const int32_t* p) { return *p; }
static inline I iota(int32_t start) { return start; }
template <class T>
static inline void store(T* p, F x) {
  from_float(x, p);
}

static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F mul(F a, F b) { return a * b; }
static inline F neg(F a) { return -a; }
static inline F absolute(F a) { return bits_float(float_bits(a) & 0x7fffffff); }
static inline F maximum(F a, F b) { return a > b ? a : b; }
static inline F minimum(F a, F b) { return a < b ? a : b; }

static inline M ge(F a, F b) { return a >= b; }
static inline M gt(F a, F b) { return a > b; }
static inline M eq(F a, F b) { return a == b; }
static inline M ile(I a, I b) { return a <= b; }
static inline M ieq(I a, I b) { return a == b; }
static inline M unordered(F a, F b) { return a != a || b != b; }
static inline M both(M a, M b) { return a && b; }
static inline M either(M a, M b) { return a || b; }
static inline M but_not(M a, M b) { return a && !b; }
static inline bool any(M m) { return m; }
static inline uint32_t bits(M m) { return m; }
static inline int count(M m) { return m; }

static inline F keep_if(M m, F a) { return m ? a : 0.0f; }  // 0 elsewhere
static inline F choose(M m, F a, F b) { return m ? a : b; }
static inline F add_if(M m, F sum, F a) { return m ? sum + a : sum; }
static inline M from_bits(uint32_t b) { return b & 1; }

// p * 2^(k + offset) where `biased` is k + 1.5 * 2^23, p in [0.5, 2)
static inline F scale_by(F p, F biased, int offset) {
  return p * bits_float((float_bits(biased) << 23) + (static_cast<uint32_t>(offset + 127) << 23));
}

// x = f 2^k of a positive normal x, f in [sqrt(1/2), sqrt(2))
static inline F significand(F x, F* k) {
  const int32_t b = static_cast<int32_t>(float_bits(x));
  const int32_t exponent = (b - kSqrtHalfBits) >> 23;
  *k = static_cast<float>(exponent);
  return bits_float(static_cast<uint32_t>(b) - (static_cast<uint32_t>(exponent) << 23));
}

static inline Q truncated(F e) { return static_cast<int64_t>(e); }
static inline L add(L sum, Q q) { return sum + q; }
static inline L add_if(M m, L sum, Q q) { return m ? sum + q : sum; }
static inline L add_truncated(L sum, F e) { return add(sum, truncated(e)); }
// Adds the squares of whole numbers in [0, 2^31).
static inline L add_squares(L sum, F whole) {
  const int64_t x = static_cast<int64_t>(whole);
  return sum + x * x;
}
static inline int64_t total(L sum) { return sum; }

static inline float max_lane(F a) { return a; }
static inline float min_lane(F a) { return a; }
static inline float sum_lanes(F a) { return a; }

// Writes the chosen lanes side by side; may write W lanes.
static inline void compress(float* p, M m, F a) {
  if (m) *p = a;
}
static inline void compress(int32_t* p, M m, I a) {
  if (m) *p = a;
}

static inline F quotient(F a, F b) { return a / b; }
static inline F fused(F a, F b, F c) { return a * b + c; }  // rounded once where it costs nothing
