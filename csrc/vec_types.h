// Element types that C++17 has no name for, and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastadapt {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline uint32_t float_bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

static inline float bits_float(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(double x) { return static_cast<float>(x); }
static inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

static inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_float(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

// Conversions from float round once, to nearest even. NaN (a gradient may be) stays NaN.
static inline void from_float(float x, float* out) { *out = x; }

static inline void from_float(float x, bf16* out) {
  const uint32_t b = float_bits(x);
  out->bits = static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

static inline void from_float(float x, f16* out) {
  const uint32_t b = float_bits(x);
  const uint32_t sign = (b >> 16) & 0x8000;
  const uint32_t magnitude = b & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x1ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // normal
    const uint32_t rebased = magnitude - (112u << 23);
    half = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
  } else {
    // adding 0.5 leaves the subnormal, rounded to even, in the low bits
    half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

constexpr int32_t kSqrtHalfBits = 0x3f3504f3;  // of the float sqrt(1/2)

// The largest finite value of a type.
static inline float largest_of(float) { return 0x1.fffffep127f; }
static inline float largest_of(bf16) { return 0x1.fep127f; }
static inline float largest_of(f16) { return 65504.0f; }

// Values of the padding lanes of a row's tail: no mass, never a survivor.
static inline void set_minus_inf(float* x) { *x = bits_float(0xff800000u); }
static inline void set_minus_inf(bf16* x) { x->bits = 0xff80; }
static inline void set_minus_inf(f16* x) { x->bits = 0xfc00; }

}  // namespace fastadapt
