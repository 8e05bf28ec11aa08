// One vector of floats over the compiler's vector extensions, as wide as the target's registers,
// and its memory formats.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef BGK_TARGET
#error "define BGK_TARGET, the namespace of this build of the kernels"
#endif
#define BGK_INLINE inline __attribute__((always_inline))

namespace bgk::BGK_TARGET {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint64_t WVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));

template <class T>
BGK_INLINE T load_as(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof(T));
  return x;
}

BGK_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
BGK_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
BGK_INLINE Vec splat(float x) { return Vec{} + x; }
BGK_INLINE Vec as_float(IVec x) { return (Vec)x; }
BGK_INLINE IVec as_int(Vec x) { return (IVec)x; }

#if defined(__AVX512F__)
// All lanes. Without a mask, some of GCC's intrinsics start from a value that its own warnings call
// uninitialised.
constexpr __mmask16 kAll = 0xffff;
#endif

// A NaN in `x` survives max_keep and is ignored by max_skip; a finite `other` is taken for granted.
#if defined(__AVX512F__)
BGK_INLINE Vec max_keep(Vec other, Vec x) {
  return (Vec)_mm512_maskz_max_ps(kAll, (__m512)other, (__m512)x);
}
BGK_INLINE Vec max_skip(Vec other, Vec x) {
  return (Vec)_mm512_maskz_max_ps(kAll, (__m512)x, (__m512)other);
}
#elif defined(__AVX2__)
BGK_INLINE Vec max_keep(Vec other, Vec x) { return (Vec)_mm256_max_ps((__m256)other, (__m256)x); }
BGK_INLINE Vec max_skip(Vec other, Vec x) { return (Vec)_mm256_max_ps((__m256)x, (__m256)other); }
#else
BGK_INLINE Vec max_keep(Vec other, Vec x) { return other > x ? other : x; }
BGK_INLINE Vec max_skip(Vec other, Vec x) { return x > other ? x : other; }
#endif

BGK_INLINE bool any(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

BGK_INLINE float sum_of(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

BGK_INLINE float max_of(Vec x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

BGK_INLINE IVec lane_numbers() {
  IVec x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

struct F32 {
  typedef float Raw;
  static BGK_INLINE Vec load(const Raw* p) { return load_as<Vec>(p); }
  static BGK_INLINE void store(Raw* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
};

// GCC takes these conversions apart into halves.
BGK_INLINE UVec extend(HVec x) {
#if defined(__AVX512F__)
  return (UVec)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)x);
#elif defined(__AVX2__)
  return (UVec)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, UVec);
#endif
}

BGK_INLINE HVec truncate(UVec x) {
#if defined(__AVX512F__)
  return (HVec)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)x);
#elif defined(__AVX2__)
  const __m128i high = _mm256_extracti128_si256((__m256i)x, 1);
  return (HVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), high);
#else
  return __builtin_convertvector(x, HVec);
#endif
}

struct BF16 {
  typedef uint16_t Raw;
  static BGK_INLINE Vec load(const Raw* p) { return (Vec)(extend(load_as<HVec>(p)) << 16); }
  // Round to nearest even. A NaN, quiet after any arithmetic, is cut: rounding could carry it into
  // an infinity.
  static BGK_INLINE void store(Raw* p, Vec x) {
    const UVec bits = (UVec)x, nearest = ((bits >> 16) & 1) + 0x7fff;
    const HVec narrow = truncate((bits + (nearest & (UVec)(x == x))) >> 16);
    __builtin_memcpy(p, &narrow, sizeof(narrow));
  }
};

struct F16 {
  typedef uint16_t Raw;
#if defined(__AVX512F__)
  static BGK_INLINE Vec widen(HVec x) { return (Vec)_mm512_maskz_cvtph_ps(kAll, (__m256i)x); }
  static BGK_INLINE HVec narrow(Vec x) {
    return (HVec)_mm512_maskz_cvtps_ph(kAll, (__m512)x,
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__F16C__)
  static BGK_INLINE Vec widen(HVec x) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
  static BGK_INLINE HVec narrow(Vec x) {
    return (HVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  static BGK_INLINE Vec widen(HVec x) {
    const UVec half = extend(x);
    const UVec magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
    // Scaling by 2^112 moves the exponent and normalises subnormals; infinities and NaNs need
    // theirs set.
    const UVec finite = (UVec)((Vec)magnitude * 0x1p112f);
    return (Vec)((magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite) | sign);
  }
  static BGK_INLINE HVec narrow(Vec x) {
    const UVec bits = (UVec)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const UVec rounded = (magnitude - (112u << 23) + (((magnitude >> 13) & 1) + 0xfff)) >> 13;
    // Adding ½ aligns a subnormal's last bit with the float's, so the addition rounds it.
    const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
    UVec half = magnitude < (113u << 23) ? subnormal : rounded;
    half = magnitude >= 0x47800000u ? UVec{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? UVec{} + 0x7e00u : half;
    return truncate(half | sign);
  }
#endif
  static BGK_INLINE Vec load(const Raw* p) { return widen(load_as<HVec>(p)); }
  static BGK_INLINE void store(Raw* p, Vec x) {
    const HVec half = narrow(x);
    __builtin_memcpy(p, &half, sizeof(half));
  }
};

}  // namespace bgk::BGK_TARGET
