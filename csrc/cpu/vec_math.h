// Elementary functions of a Vec, and the sampler's generator. Coefficients: own minimax fits,
// relative error in the comment.
#pragma once

#include "cpu/vec.h"
#include "math/numbers.h"

namespace bgk::BGK_TARGET {

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
// Below this, e^x is flushed to 0: the result would be subnormal.
constexpr float kExpMin = -87.3f;

// x = n·ln 2 + r with |r| ≤ ½·ln 2.
struct Reduced {
  Vec r, power;  // 2^n, for |n| ≤ 126
};

BGK_INLINE Reduced reduce(Vec x) {
  // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits; 127 more is the bias of an
  // exponent.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  const Vec t = x * kLog2E + kRound;
  const Vec n = t - kRound;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  const Vec r = x - n * kLn2;
#else
  // Without a fused multiply-add, n·ln 2 must be exact: ln 2 in two parts, the first of 15 bits.
  const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
#endif
  return {r, as_float(as_int(t) << 23)};
}

// e^r for |r| ≤ ½·ln 2: 3e-9.
BGK_INLINE Vec exp_polynomial(Vec r) {
  Vec p = r * 0.0013814541f + 0.0083687454f;
  p = p * r + 0.041668389f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// e^x for x < 88: 0 at -inf, NaN at NaN.
BGK_INLINE Vec exp(Vec x) {
  const Reduced a = reduce(x);
  return x < kExpMin ? Vec{} : exp_polynomial(a.r) * a.power;
}

// e^max(x, kExpMin) for x < 88: cheaper, and never 0.
BGK_INLINE Vec exp_floored(Vec x) {
  const Reduced a = reduce(max_keep(splat(kExpMin), x));
  return exp_polynomial(a.r) * a.power;
}

// e^x - 1 for x < 88, exact to first order: 2e-8.
BGK_INLINE Vec expm1(Vec x) {
  const Reduced a = reduce(max_keep(splat(kExpMin), x));
  Vec p = a.r * 0.0013886797f + 0.0083664154f;
  p = p * a.r + 0.041667107f;
  p = p * a.r + 0.16666545f;
  p = p * a.r + 0.5f;
  const Vec below = a.r + a.r * a.r * p;
  return a.power * below + (a.power - 1.0f);
}

// log(x), where y = x - 1 more exactly than x can tell: 6e-9.
BGK_INLINE Vec log_near(Vec x, Vec y) {
  const IVec k = (as_int(x) - 0x3f3504f3) >> 23;  // x·2^-k in [sqrt ½, sqrt 2)
  const Vec power = as_float((127 - k) << 23);
  const Vec f = (x * power - 1.0f) + (y - (x - 1.0f)) * power;
  Vec p = f * -0.076343939f + 0.12765428f;
  p = p * f - 0.13162002f;
  p = p * f + 0.14201368f;
  p = p * f - 0.16623145f;
  p = p * f + 0.20001236f;
  p = p * f - 0.25000826f;
  p = p * f + 0.33333331f;
  const Vec tail = f * f * (f * p - 0.5f);
  return __builtin_convertvector(k, Vec) * kLn2 + (f + tail);
}

BGK_INLINE Vec log(Vec x) { return log_near(x, x - 1.0f); }
BGK_INLINE Vec log1p(Vec y) { return log_near(1.0f + y, y); }

BGK_INLINE Vec tanh(Vec x) {
  const IVec sign = as_int(x) & INT32_MIN;
  const Vec size = as_float(as_int(x) ^ sign);
  const Vec below = expm1(-2.0f * size);
  return as_float(as_int(-below / (below + 2.0f)) | sign);
}

// What math/ asks for.
struct VecMath {
  typedef Vec F;
  typedef float S;
  static constexpr int kLanes = BGK_TARGET::kLanes;
  static BGK_INLINE Vec exp(Vec x) { return BGK_TARGET::exp(x); }
  static BGK_INLINE Vec expm1(Vec x) { return BGK_TARGET::expm1(x); }
  static BGK_INLINE Vec log1p(Vec x) { return BGK_TARGET::log1p(x); }
  static BGK_INLINE Vec larger(Vec most, Vec x) { return max_skip(most, x); }
  static BGK_INLINE float largest(Vec x) { return max_of(x); }
  static BGK_INLINE float total(Vec x) { return sum_of(x); }
  static BGK_INLINE Vec first(float x) {
    Vec sum{};
    sum[0] = x;
    return sum;
  }
};

// Products of the even 32-bit lanes with a constant.
BGK_INLINE WVec even_products(WVec x, uint32_t multiplier) {
#if defined(__AVX512F__)
  return (WVec)_mm512_maskz_mul_epu32((__mmask8)kAll, (__m512i)x, _mm512_set1_epi64(multiplier));
#elif defined(__AVX2__)
  return (WVec)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(multiplier));
#else
  return (x & 0xffffffffu) * multiplier;
#endif
}

// Vectors of draws at a time: a draw is a long chain of dependent multiplications.
constexpr int kStreams = 4;

// bgkernels/sampling.py: the first word of Philox2x32-10 of consecutive columns, upper 23 bits.
BGK_INLINE void philox(uint32_t column, uint32_t row, uint32_t key, IVec draws[kStreams]) {
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  UVec c0[kStreams], c1[kStreams];
  for (int k = 0; k < kStreams; ++k)
    c0[k] = (UVec)lane_numbers() + (column + k * kLanes), c1[k] = UVec{} + row;
  for (int round = 0; round < 10; ++round, key += 0x9E3779B9u) {
    for (int k = 0; k < kStreams; ++k) {
      const WVec even = even_products((WVec)c0[k], 0xD256D193u);
      const WVec odd = even_products((WVec)c0[k] >> 32, 0xD256D193u);
      c0[k] = (UVec)((even >> 32) | (odd & kHigh)) ^ key ^ c1[k];
      c1[k] = (UVec)((even & ~kHigh) | (odd << 32));
    }
  }
  for (int k = 0; k < kStreams; ++k) draws[k] = (IVec)(c0[k] >> 9);
}

BGK_INLINE Vec gumbel(IVec draw) {
  return -log(-log((__builtin_convertvector(draw, Vec) + 0.5f) * 0x1p-23f));
}

// The smallest draw whose Gumbel number may lift a logit v to the score `best`, with room for
// rounding.
inline int32_t least_draw(float v, float best) {
  const double gap = (double)best - v - 0.01 - 1e-6 * fabs((double)best);
  const double draw = 0x1p23 * ::exp(-::exp(-gap)) - 1.0;
  return draw > 0.0 ? (int32_t)draw : 0;
}

}  // namespace bgk::BGK_TARGET
