// Operands of a product in the order in which the micro-kernel reads them.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "cpu/factors.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bgk {
namespace {

// Of a panel of packed columns, and the depth that is added up at once.
constexpr int64_t kColumns = 64, kDepth = 1024;
constexpr int64_t kRowStride =
    kDepth + 32;  // of packed rows: they fall into different sets of the L1 cache

// Transposes from (8, 8) to (8, 8), rows at the given strides.
inline void transpose8(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
#if defined(__SSE2__)
  __m128i x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = _mm_unpacklo_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm_unpackhi_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm_unpacklo_epi32(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm_unpackhi_epi32(y[4 * i + 1], y[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m128i* even = (__m128i*)(to + 2 * i * to_stride);
    __m128i* odd = (__m128i*)(to + (2 * i + 1) * to_stride);
    _mm_storeu_si128(even, _mm_unpacklo_epi64(x[i], x[i + 4]));
    _mm_storeu_si128(odd, _mm_unpackhi_epi64(x[i], x[i + 4]));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

// Transposes (4, 4) pairs.
inline void transpose4(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
#if defined(__SSE2__)
  __m128i x[4], y[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = _mm_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    __m128i* even = (__m128i*)(to + 2 * i * to_stride);
    __m128i* odd = (__m128i*)(to + (2 * i + 1) * to_stride);
    _mm_storeu_si128(even, _mm_unpacklo_epi64(y[i], y[i + 2]));
    _mm_storeu_si128(odd, _mm_unpackhi_epi64(y[i], y[i + 2]));
  }
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j)
      memcpy(to + j * to_stride + 2 * i, from + i * from_stride + 2 * j, 4);
  }
#endif
}

// Rows [row, row + n) of `a` at depths [first, first + depth), zeros from there up to `padded`.
void pack_rows(const Operand& a, int64_t row, int64_t n, int64_t first, int64_t depth,
               int64_t padded, uint16_t* to) {
  const uint16_t* from = a.data + row * a.row_stride + first * a.column_stride;
  int64_t whole = 0;  // of the depth
  if (a.column_stride == 1) {
    for (int64_t i = 0; i < n; ++i)
      memcpy(to + i * kRowStride, from + i * a.row_stride, sizeof(uint16_t) * (size_t)depth);
    whole = depth;
  } else if (a.row_stride == 1 && n % 8 == 0) {
    whole = depth & -8;
    for (int64_t k = 0; k < whole; k += 8) {
      for (int64_t ahead = k + 32; ahead < std::min(k + 40, whole); ++ahead) {
        for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(from + ahead * a.column_stride + i);
      }
      for (int64_t i = 0; i < n; i += 8)
        transpose8(from + k * a.column_stride + i, a.column_stride, to + i * kRowStride + k,
                   kRowStride);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = whole; k < depth; ++k)
      to[i * kRowStride + k] = from[i * a.row_stride + k * a.column_stride];
    std::fill(to + i * kRowStride + depth, to + i * kRowStride + padded, (uint16_t)0);
  }
}

// Columns [column, column + n) of `b` at depths [first, first + depth), as pairs of rows of
// kColumns, with zeros beyond `depth` up to `padded`, which is even.
void pack_pairs(const Operand& b, int64_t column, int64_t n, int64_t first, int64_t depth,
                int64_t padded, uint16_t* to) {
  const uint16_t* from = b.data + first * b.row_stride + column * b.column_stride;
  auto at = [&](int64_t k, int64_t j) {
    return k < depth ? from[k * b.row_stride + j * b.column_stride] : (uint16_t)0;
  };
  int64_t whole = 0;  // of the depth
  if (b.row_stride == 1) {
    whole = depth & -8;
    const int64_t wide = n & -4;
    for (int64_t k = 0; k < whole; k += 8) {
      uint16_t* pairs = to + k * kColumns;
      for (int64_t j = 0; j < wide; j += 4)
        transpose4(from + j * b.column_stride + k, b.column_stride, pairs + 2 * j, 2 * kColumns);
      for (int64_t j = wide; j < n; ++j) {
        for (int64_t i = 0; i < 8; ++i) pairs[(i / 2 * kColumns + j) * 2 + i % 2] = at(k + i, j);
      }
    }
  } else if (b.column_stride == 1) {
    whole = depth & -2;
    for (int64_t k = 0; k < whole; k += 2) {
      const uint16_t *even = from + k * b.row_stride, *odd = even + b.row_stride;
      uint16_t* pairs = to + k * kColumns;
      int64_t j = 0;
#if defined(__SSE2__)
      for (; j + 8 <= n; j += 8) {
        const __m128i x = _mm_loadu_si128((const __m128i*)(even + j));
        const __m128i y = _mm_loadu_si128((const __m128i*)(odd + j));
        _mm_storeu_si128((__m128i*)(pairs + 2 * j), _mm_unpacklo_epi16(x, y));
        _mm_storeu_si128((__m128i*)(pairs + 2 * j + 8), _mm_unpackhi_epi16(x, y));
      }
#endif
      for (; j < n; ++j) pairs[2 * j] = even[j], pairs[2 * j + 1] = odd[j];
    }
  }
  for (int64_t k = whole; k < padded; k += 2) {
    uint16_t* pairs = to + k * kColumns;
    for (int64_t j = 0; j < n; ++j) pairs[2 * j] = at(k, j), pairs[2 * j + 1] = at(k + 1, j);
  }
}

}  // namespace
}  // namespace bgk
