// Sixteen lanes: AVX-512 F, BW, DQ, VL. The vocabulary is described in vec_scalar.h.

using F = __m512;
using I = __m512i;
using M = __mmask16;
using L = __m512i;
constexpr int W = 16;

static inline F fset(float x) { return _mm512_set1_ps(x); }
static inline I iset(int32_t x) { return _mm512_set1_epi32(x); }
static inline L lzero() { return _mm512_setzero_si512(); }

static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline F load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline F load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline I iota(int32_t start) {
  const I lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(_mm512_set1_epi32(start), lanes);
}
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, F x) {
  const __m512i b = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
static inline void store(f16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F neg(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline F absolute(F a) { return _mm512_abs_ps(a); }
static inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }
static inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }

static inline M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline M ile(I a, I b) { return _mm512_cmple_epi32_mask(a, b); }
static inline M ieq(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline M unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
static inline M both(M a, M b) { return a & b; }
static inline M either(M a, M b) { return a | b; }
static inline M but_not(M a, M b) { return static_cast<M>(a & ~b); }
static inline bool any(M m) { return m != 0; }
static inline uint32_t bits(M m) { return m; }
static inline int count(M m) { return __builtin_popcount(m); }

static inline F keep_if(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
static inline F choose(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
static inline F add_if(M m, F sum, F a) { return _mm512_mask_add_ps(sum, m, sum, a); }
static inline M from_bits(uint32_t b) { return static_cast<M>(b); }

static inline F scale_by(F p, F biased, int offset) {
  const __m512i k = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
  const __m512i exponent = _mm512_add_epi32(k, _mm512_set1_epi32((offset + 127) << 23));
  return _mm512_mul_ps(p, _mm512_castsi512_ps(exponent));
}

static inline F significand(F x, F* k) {
  const __m512i b = _mm512_castps_si512(x);
  const __m512i exponent =
      _mm512_srai_epi32(_mm512_sub_epi32(b, _mm512_set1_epi32(kSqrtHalfBits)), 23);
  *k = _mm512_cvtepi32_ps(exponent);
  return _mm512_castsi512_ps(_mm512_sub_epi32(b, _mm512_slli_epi32(exponent, 23)));
}

struct Q {
  __m512i low, high;
};
static inline Q truncated(F e) {
  return {_mm512_cvttps_epi64(_mm512_castps512_ps256(e)),
          _mm512_cvttps_epi64(_mm512_extractf32x8_ps(e, 1))};
}
static inline L add(L sum, Q q) { return _mm512_add_epi64(sum, _mm512_add_epi64(q.low, q.high)); }
static inline L add_if(M m, L sum, Q q) {
  const L low = _mm512_mask_add_epi64(sum, static_cast<__mmask8>(m), sum, q.low);
  return _mm512_mask_add_epi64(low, static_cast<__mmask8>(m >> 8), low, q.high);
}
static inline L add_truncated(L sum, F e) { return add(sum, truncated(e)); }
static inline L add_squares(L sum, F whole) {
  const __m512i even = _mm512_cvtps_epi32(whole), odd = _mm512_srli_epi64(even, 32);
  return add(sum, {_mm512_mul_epu32(even, even), _mm512_mul_epu32(odd, odd)});
}
static inline int64_t total(L sum) { return _mm512_reduce_add_epi64(sum); }

static inline float max_lane(F a) { return _mm512_reduce_max_ps(a); }
static inline float min_lane(F a) { return _mm512_reduce_min_ps(a); }
static inline float sum_lanes(F a) { return _mm512_reduce_add_ps(a); }

// The register form: the memory form of vpcompress is microcoded on Zen 4.
static inline void compress(float* p, M m, F a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m, a));
}
static inline void compress(int32_t* p, M m, I a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, a));
}

static inline F quotient(F a, F b) { return _mm512_div_ps(a, b); }
// a b + c; rounded once here, twice where there is no such instruction.
static inline F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
