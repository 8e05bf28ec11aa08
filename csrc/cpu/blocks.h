// A row is walked in blocks that fit the L1 cache: raw head outputs in, real logits in fp32 for the
// loops, gradients out.
#pragma once

#include "cpu/vec.h"
#include "cpu/vec_math.h"
#include "row_args.h"

namespace bgk::BGK_TARGET {

constexpr int kBlock = 64 * kLanes;  // a lane's sums round 64 times; three arrays fit in L1

BGK_INLINE int padded(int n) { return (n + kLanes - 1) & -kLanes; }

template <class T>
inline void widen(const typename T::Raw* from, int n, float scale, float* to) {
  typename T::Raw tail[kLanes] = {};
  const int whole = n & -kLanes;
  if (scale == 1.0f) {
#pragma GCC unroll 4
    for (int i = 0; i < whole; i += kLanes) store(to + i, T::load(from + i));
  } else {
    for (int i = 0; i < whole; i += kLanes) store(to + i, T::load(from + i) * scale);
  }
  if (whole == n) return;
  for (int i = whole; i < n; ++i) tail[i - whole] = from[i];
  store(to + whole, T::load(tail) * scale);
}

template <class T>
inline void narrow(const float* from, int n, typename T::Raw* to) {
  typename T::Raw tail[kLanes];
  const int whole = n & -kLanes;
#pragma GCC unroll 2
  for (int i = 0; i < whole; i += kLanes) T::store(to + i, load(from + i));
  if (whole == n) return;
  T::store(tail, load(from + whole));
  for (int i = whole; i < n; ++i) to[i] = tail[i - whole];
}

BGK_INLINE int64_t compared_columns(const Tile& tile) { return tile.teacher.columns; }

// Size of the block at column `first`: none holds both compared columns and others.
BGK_INLINE int block_size(int64_t first, int64_t compared, int64_t width) {
  const int64_t left = (first < compared ? compared : width) - first;
  return (int)(left < kBlock ? left : kBlock);
}

// Address of element (row, column).
BGK_INLINE char* address(const Logits& x, int64_t row, int64_t column) {
  const int64_t offset = row * x.row_stride + column;
  return (char*)x.data + offset * (x.dtype == kF32 ? 4 : 2);
}

// One model's part of a block: real logits in fp32, -inf from n up to the next whole vector.
struct Source {
  const float* x;
  const char* next;  // raw outputs after the block, `size` bytes each: fetched ahead, while this
                     // block is computed
  int size;

  BGK_INLINE Vec at(int i) const { return load(x + i); }
  BGK_INLINE void fetch_ahead(int i) const { __builtin_prefetch(next + i * size); }
};

// Columns [first, first + n), in `scratch`, or in place where they already are what is asked for.
inline Source read_block(const Logits& x, int64_t row, int64_t first, int n, float* scratch) {
  const char* raw = address(x, row, first);
  const int size = x.dtype == kF32 ? 4 : 2;
  const Source out = {scratch, raw + n * size, size};
  if (x.dtype == kF32 && x.scale == 1.0f && x.cap == 0.0f && n == padded(n))
    return {(const float*)raw, out.next, size};
  const float scale = x.cap == 0.0f ? x.scale : x.scale / x.cap;
  if (x.dtype == kF32) widen<F32>((const float*)raw, n, scale, scratch);
  if (x.dtype == kBF16) widen<BF16>((const uint16_t*)raw, n, scale, scratch);
  if (x.dtype == kF16) widen<F16>((const uint16_t*)raw, n, scale, scratch);
  if (x.cap != 0.0f) {
    for (int i = 0; i < n; i += kLanes) store(scratch + i, x.cap * tanh(load(scratch + i)));
  }
  for (int i = n; i < padded(n); ++i) scratch[i] = kNegInf;
  return out;
}

// The same logits where they may be overwritten.
inline float* writable(Source& from, int n, float* scratch) {
  if (from.x != scratch) {
    for (int i = 0; i < n; i += kLanes) store(scratch + i, from.at(i));
  }
  from.x = scratch;
  return scratch;
}

inline void store_gradient(const Logits& out, int64_t row, int64_t first, int n,
                           const float* from) {
  void* to = address(out, row, first);
  if (out.dtype == kF32 && from != to) narrow<F32>(from, n, (float*)to);
  if (out.dtype == kBF16) narrow<BF16>(from, n, (uint16_t*)to);
  if (out.dtype == kF16) narrow<F16>(from, n, (uint16_t*)to);
}

// Maximum of a padded block, NaNs ignored.
inline float block_max(const float* x, int n) {
  Vec m[4] = {splat(kNegInf), splat(kNegInf), splat(kNegInf), splat(kNegInf)};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) m[k] = max_skip(m[k], load(x + i + k * kLanes));
  }
  for (; i < n; i += kLanes) m[0] = max_skip(m[0], load(x + i));
  return max_of(max_skip(max_skip(m[0], m[1]), max_skip(m[2], m[3])));
}

// First position of `value` in a padded block, 0 if it is nowhere.
inline int first_index(const float* x, int n, float value) {
  for (int i = 0; i < n; i += kLanes) {
    const IVec hit = load(x + i) == value;
    if (!any(hit)) continue;
    int k = 0;
    while (!hit[k]) ++k;
    return i + k;
  }
  return 0;
}

}  // namespace bgk::BGK_TARGET
