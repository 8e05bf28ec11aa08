// Elementary functions of a Vec, and the sampler's generator. Coefficients: own minimax fits, relative error in the comment.
#pragma once

#include "cpu/vec.h"
#include "math/row_state.h"

namespace bgk::BGK_TARGET {

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
// Below this, e^x is flushed to 0: the result would be subnormal.
constexpr float kExpMin = -87.3f;

// x = n·ln 2 + r with |r| ≤ ½·ln 2.
struct Reduced {
  Vec r, n;
  IVec exponent;  // (n + bias)·2^23
};

template <int kBias>
BGK_INLINE Reduced reduce(Vec x) {
  // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 0x1.8p23f + kBias;
  const Vec t = x * kLog2E + kRound;
  const Vec n = t - kRound;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  const Vec r = x - n * kLn2;
#else
  // Without a fused multiply-add, n·ln 2 must be exact: ln 2 in two parts, the first of 15 bits.
  const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
#endif
  return {r, n, as_int(t) << 23};
}

// e^r for |r| ≤ ½·ln 2: 1.05e-7.
BGK_INLINE Vec exp_polynomial(Vec r) {
  Vec p = r * 0.0083125010f + 0.041890330f;
  p = p * r + 0.16667116f;
  p = p * r + 0.49999231f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// e^x for x < 88: 0 at -inf, NaN at NaN.
BGK_INLINE Vec exp(Vec x) {
#if defined(__AVX512F__)
  const Reduced a = reduce<0>(max_keep(splat(-110.0f), x));
  return (Vec)_mm512_maskz_scalef_ps(kAll, (__m512)exp_polynomial(a.r), (__m512)a.n);
#else
  const Reduced a = reduce<127>(x);
  return x < kExpMin ? Vec{} : exp_polynomial(a.r) * as_float(a.exponent);
#endif
}

// e^max(x, kExpMin) for x < 88: cheaper, never 0, and a NaN may come out as any number.
BGK_INLINE Vec exp_floored(Vec x) {
#if defined(__AVX512F__)
  return exp(x);
#else
  const Reduced a = reduce<0>(max_keep(splat(kExpMin), x));
  return as_float(as_int(exp_polynomial(a.r)) + a.exponent);
#endif
}

// e^x - 1 for x < 88, exact to first order: 2e-8.
BGK_INLINE Vec expm1(Vec x) {
  const Reduced a = reduce<127>(max_keep(splat(kExpMin), x));
  const Vec power = as_float(a.exponent);
  Vec p = a.r * 0.0013886797f + 0.0083664154f;
  p = p * a.r + 0.041667107f;
  p = p * a.r + 0.16666545f;
  p = p * a.r + 0.5f;
  const Vec below = a.r + a.r * a.r * p;
  return power * below + (power - 1.0f);
}

// log(x), given y = x - 1 where that is exact near 1: 6e-9.
BGK_INLINE Vec log_near(Vec x, Vec y) {
  const IVec k = (as_int(x) - 0x3f3504f3) >> 23;  // x·2^-k in [sqrt ½, sqrt 2)
  const Vec scaled = x * as_float((127 - k) << 23);
  const Vec f = k == 0 ? y : scaled - 1.0f;
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

// The functions that math/ asks for.
struct VecMath {
  typedef Vec F;
  static BGK_INLINE Vec expm1(Vec x) { return BGK_TARGET::expm1(x); }
  static BGK_INLINE Vec log1p(Vec x) { return BGK_TARGET::log1p(x); }
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

// bgkernels/sampling.py: the first word of Philox2x32-10.
BGK_INLINE UVec philox(UVec c0, UVec c1, uint32_t key) {
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  for (int round = 0; round < 10; ++round) {
    const WVec even = even_products((WVec)c0, 0xD256D193u);
    const WVec odd = even_products((WVec)c0 >> 32, 0xD256D193u);
    const UVec high = (UVec)((even >> 32) | (odd & kHigh));
    const UVec low = (UVec)((even & ~kHigh) | (odd << 32));
    c0 = high ^ key ^ c1;
    c1 = low;
    key += 0x9E3779B9u;
  }
  return c0;
}

// No Gumbel number exceeds this: the largest uniform is 1 - 2^-24.
constexpr float kGumbelMax = 16.64f;

BGK_INLINE Vec gumbel(UVec column, uint32_t row, uint32_t key) {
  const UVec bits = philox(column, UVec{} + row, key);
  const Vec uniform = (__builtin_convertvector((IVec)(bits >> 9), Vec) + 0.5f) * 0x1p-23f;
  return -log(-log(uniform));
}

}  // namespace bgk::BGK_TARGET
