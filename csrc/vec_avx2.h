// Eight lanes: AVX2 and F16C. The vocabulary is described in vec_scalar.h.

using F = __m256;
using I = __m256i;
using M = __m256;  // all bits of a chosen lane are set
struct L {
  __m256i low, high;
};
constexpr int W = 8;

static inline F fset(float x) { return _mm256_set1_ps(x); }
static inline I iset(int32_t x) { return _mm256_set1_epi32(x); }
static inline L lzero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline F load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline F load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline I iload(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline I iota(int32_t start) {
  return _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline void store(bf16* p, F x) {
  const __m256i b = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
static inline void store(f16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F neg(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
static inline F absolute(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
static inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }

static inline M ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline M eq(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline M ile(I a, I b) {
  const __m256i ones = _mm256_set1_epi32(-1);
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpgt_epi32(a, b), ones));
}
static inline M ieq(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
static inline M unordered(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
static inline M both(M a, M b) { return _mm256_and_ps(a, b); }
static inline M either(M a, M b) { return _mm256_or_ps(a, b); }
static inline M but_not(M a, M b) { return _mm256_andnot_ps(b, a); }
static inline bool any(M m) { return _mm256_movemask_ps(m) != 0; }
static inline uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
static inline int count(M m) { return __builtin_popcount(bits(m)); }

static inline F keep_if(M m, F a) { return _mm256_and_ps(m, a); }
static inline F choose(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
static inline F add_if(M m, F sum, F a) { return _mm256_add_ps(sum, _mm256_and_ps(m, a)); }
static inline M from_bits(uint32_t b) {
  const __m256i lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(b)), lane);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane));
}

static inline F scale_by(F p, F biased, int offset) {
  const __m256i k = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  const __m256i exponent = _mm256_add_epi32(k, _mm256_set1_epi32((offset + 127) << 23));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

static inline F significand(F x, F* k) {
  const __m256i b = _mm256_castps_si256(x);
  const __m256i exponent =
      _mm256_srai_epi32(_mm256_sub_epi32(b, _mm256_set1_epi32(kSqrtHalfBits)), 23);
  *k = _mm256_cvtepi32_ps(exponent);
  return _mm256_castsi256_ps(_mm256_sub_epi32(b, _mm256_slli_epi32(exponent, 23)));
}

// AVX2 has no conversion to int64: added to 2^52, an integer below that is the mantissa of the sum.
static inline __m256i truncated(__m128 e) {
  const __m256d whole = _mm256_round_pd(_mm256_cvtps_pd(e), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m256i sum = _mm256_castpd_si256(_mm256_add_pd(whole, _mm256_set1_pd(0x1p52)));
  return _mm256_and_si256(sum, _mm256_set1_epi64x(0xfffffffffffff));
}
using Q = L;
static inline Q truncated(F e) {
  return {truncated(_mm256_castps256_ps128(e)), truncated(_mm256_extractf128_ps(e, 1))};
}
static inline L add(L sum, Q q) {
  return {_mm256_add_epi64(sum.low, q.low), _mm256_add_epi64(sum.high, q.high)};
}
static inline L add_if(M m, L sum, Q q) {
  const __m256i b = _mm256_castps_si256(m);
  const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(b));
  const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(b, 1));
  return add(sum, {_mm256_and_si256(low, q.low), _mm256_and_si256(high, q.high)});
}
static inline L add_truncated(L sum, F e) { return add(sum, truncated(e)); }
static inline L add_squares(L sum, F whole) {
  const __m256i even = _mm256_cvtps_epi32(whole), odd = _mm256_srli_epi64(even, 32);
  return add(sum, {_mm256_mul_epu32(even, even), _mm256_mul_epu32(odd, odd)});
}
static inline int64_t total(L sum) {
  alignas(32) int64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(sum.low, sum.high));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

static inline float max_lane(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float min_lane(F a) { return -max_lane(neg(a)); }
static inline float sum_lanes(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// Row b holds the positions of the set bits of b, in order.
struct CompressTable {
  alignas(32) int32_t lane[256][8];
};
static constexpr CompressTable make_compress_table() {
  CompressTable t{};
  for (int b = 0; b < 256; ++b) {
    int n = 0;
    for (int i = 0; i < 8; ++i)
      if (b >> i & 1) t.lane[b][n++] = i;
  }
  return t;
}
static constexpr CompressTable kCompress = make_compress_table();

static inline __m256i compress_order(M m) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lane[bits(m)]));
}
static inline void compress(float* p, M m, F a) {
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a, compress_order(m)));
}
static inline void compress(int32_t* p, M m, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permutevar8x32_epi32(a, compress_order(m)));
}

static inline F quotient(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fused(F a, F b, F c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
