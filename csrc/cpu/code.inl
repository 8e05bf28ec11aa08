// A tile's code: both models' real logits of a (row, column) in a word of four bytes. What it
// holds, and how exact that is: bgkernels.backends.code.
#pragma once

#include <float.h>

#include "cpu/blocks.h"
#include "cpu/vec.h"
#include "math/row_state.h"

namespace bgk::BGK_TARGET {

static_assert(kBlock % kCodeBlock == 0 && kSpan % kBlock == 0,
              "a centre is of a block of pass 1, in which no other call begins");

BGK_INLINE bool is_coded(const Tile& tile) { return tile.code.words.data; }

BGK_INLINE uint32_t* code_at(const Tile& tile, int64_t row, int64_t column) {
  return tile.code.words.data + row * tile.code.words.stride + column;
}

BGK_INLINE float* centres_at(const Tile& tile, int64_t row, int64_t column) {
  return tile.code.centres.data + row * tile.code.centres.stride + column / kCodeBlock * 2;
}

// The least number stands in for -inf, so that of two such logits no NaN comes.
BGK_INLINE UVec encode_vector(Vec du, Vec dv) {
  const Vec gap = du - max_skip(splat(-FLT_MAX), dv);
  return extend(F16::narrow(max_skip(dv, du))) | extend(F16::narrow(gap)) << 16;
}

// A block of pass 1 into its code; sources are padded.
inline void encode_block(const Tile& tile, int64_t row, int64_t first, int n, const Source& z,
                         const Source& v, float z_max, float v_max) {
  const float c_s = shift(z_max), c_t = shift(v_max);
  float* centres = centres_at(tile, row, first);
  for (int i = 0; i < n; i += kCodeBlock, centres += 2) centres[0] = c_s, centres[1] = c_t;
  uint32_t* to = code_at(tile, row, first);
  const int whole = n & -kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    const UVec word = encode_vector(z.at(i) - c_s, v.at(i) - c_t);
    __builtin_memcpy(to + i, &word, sizeof(word));
  }
  if (whole == n) return;
  const UVec word = encode_vector(z.at(whole) - c_s, v.at(whole) - c_t);
  __builtin_memcpy(to + whole, &word, sizeof(uint32_t) * (size_t)(n - whole));
}

// Columns without a teacher: the student's logits as they are.
inline void encode_alone(const Tile& tile, int64_t row, int64_t first, int n, const Source& z) {
  __builtin_memcpy(code_at(tile, row, first), z.x, sizeof(float) * (size_t)n);
}

struct Pair {
  Source z, v;
};

BGK_INLINE void decode_vector(UVec word, float c_s, float c_t, float* z, float* v) {
  const Vec level = F16::widen(truncate(word & 0xffff)), gap = F16::widen(truncate(word >> 16));
  store(z, (level - max_keep(Vec{}, -gap)) + c_s);
  store(v, (level - max_keep(Vec{}, gap)) + c_t);
}

inline Pair decode_block(const Tile& tile, int64_t row, int64_t first, int n, float* z, float* v) {
  const float *centres = centres_at(tile, row, first), c_s = centres[0], c_t = centres[1];
  const uint32_t* from = code_at(tile, row, first);
  const int whole = n & -kLanes;
  for (int i = 0; i < whole; i += kLanes)
    decode_vector(load_as<UVec>(from + i), c_s, c_t, z + i, v + i);
  if (whole < n) {
    UVec word{};
    __builtin_memcpy(&word, from + whole, sizeof(uint32_t) * (size_t)(n - whole));
    decode_vector(word, c_s, c_t, z + whole, v + whole);
    for (int i = n; i < padded(n); ++i) z[i] = v[i] = kNegInf;
  }
  const char* next = (const char*)(from + n);
  return {{z, next, sizeof(uint32_t)}, {v, next, sizeof(uint32_t)}};
}

// Columns [first, first + n) of both models, or of the student alone, wherever they lie.
inline Pair read_pair(const Tile& tile, int64_t row, int64_t first, int n, bool teacher, float* z,
                      float* v) {
  const bool compared = first < compared_columns(tile);
  if (is_coded(tile) && compared) return decode_block(tile, row, first, n, z, v);
  Logits student = tile.student;
  if (is_coded(tile))
    student = {tile.code.words.data, tile.code.words.stride, student.columns, kF32, 1.0f, 0.0f};
  Pair out = {read_block(student, row, first, n, z), {}};
  if (compared && teacher) out.v = read_block(tile.teacher, row, first, n, v);
  return out;
}

}  // namespace bgk::BGK_TARGET
