// Kept tiles: both models' logits of a (row, column) in one word. A row's compared columns lie in
// blocks: two centres, then for each column max(du, dv) and du - dv in fp16, where du and dv are
// logits times their scale, less the centre; the student's other columns follow in fp32.
// The likelier model's logit is as exact as its distance from the centre, the other one as their
// distance, which makes it unlikely, and their difference is as exact as itself.
#pragma once

#include "cpu/blocks.h"
#include "cpu/vec.h"
#include "row_args.h"

namespace bgk::BGK_TARGET {

constexpr int kAhead = 4 * (int)kCodeBlock + 8;  // bytes to the same place in the next block
constexpr float kMostHalf = 65504.0f;
// A soft-cap flattens raw logits beyond a few caps. Distances from a centre far out there would
// drown the differences between the columns below.
constexpr float kMostCaps = 4.0f;

// Maximum of n numbers times a scale, NaNs ignored.
inline float scaled_max(const float* x, int n, float scale) {
  Vec most[4] = {splat(kNegInf), splat(kNegInf), splat(kNegInf), splat(kNegInf)};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) most[k] = max_skip(most[k], load(x + i + k * kLanes) * scale);
  }
  for (; i + kLanes <= n; i += kLanes) most[0] = max_skip(most[0], load(x + i) * scale);
  float m = max_of(max_skip(max_skip(most[0], most[1]), max_skip(most[2], most[3])));
  for (; i < n; ++i) m = x[i] * scale > m ? x[i] * scale : m;
  return m;
}

// One model's part of a block.
struct Coded {
  const float* x;
  float scale, centre;

  // False where logits cannot be told from the centre.
  bool choose_centre(const Logits& from, int64_t row, int64_t first, int n) {
    x = (const float*)address(from, row, first), scale = from.scale;
    centre = scaled_max(x, n, scale);
    if (centre == kNegInf) centre = 0.0f;
    return centre <= (from.cap != 0.0f ? kMostCaps * from.cap : 3e38f);
  }
};

// What a block's numbers have come to.
struct Told {
  Vec most{};  // absolute
  Vec zero{};  // or NaN
  IVec wrong{};

  BGK_INLINE bool all() const { return !any(wrong | ~(most <= kMostHalf) | (zero != 0.0f)); }
};

BGK_INLINE Vec absolute(Vec x) { return as_float(as_int(x) & INT32_MAX); }

// kPlain: all numbers are finite; where one is not, that shows in `told`, and the careful code has
// to decide.
template <bool kPlain>
BGK_INLINE void encode_vector(Vec du, Vec dv, uint16_t* level, uint16_t* gap, Told& told) {
  const Vec top = max_skip(du, dv);
  Vec between = du - dv;
  if (kPlain) {
    told.most = max_skip(max_skip(told.most, -top), absolute(between));
    told.zero += between - between;
  } else {
    const IVec absent = (du == kNegInf) & (dv == kNegInf);
    between = absent ? Vec{} : between;
    told.wrong |= ~((top >= -kMostHalf) | (top == kNegInf));
    told.wrong |= ~((absolute(between) <= kMostHalf) | (absolute(between) == -kNegInf));
  }
  F16::store(level, top);
  F16::store(gap, between);
}

template <bool kPlain>
inline bool encode_block(const Coded& s, const Coded& t, int n, float* to) {
  uint16_t *level = (uint16_t*)(to + 2), *gap = level + n;
  Told told;
  const int whole = n & -kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    encode_vector<kPlain>(load(s.x + i) * s.scale - s.centre, load(t.x + i) * t.scale - t.centre,
                          level + i, gap + i, told);
  }
  if (whole < n) {
    Vec du{}, dv{};
    uint16_t halves[2][kLanes];
    for (int i = whole; i < n; ++i) {
      du[i - whole] = s.x[i] * s.scale - s.centre;
      dv[i - whole] = t.x[i] * t.scale - t.centre;
    }
    encode_vector<kPlain>(du, dv, halves[0], halves[1], told);
    for (int i = whole; i < n; ++i) level[i] = halves[0][i - whole], gap[i] = halves[1][i - whole];
  }
  return told.all();
}

inline void encode_row(const EncodeArgs& args, int64_t row) {
  if (args.labels[row] == kSkip || __atomic_load_n(args.failed, __ATOMIC_RELAXED)) return;
  const int64_t compared = compared_columns(args.tile), width = args.tile.student.columns;
  float* to = args.words.data + row * args.words.stride;
  for (int64_t first = 0; first < compared; first += kCodeBlock) {
    const int n = (int)(compared - first < kCodeBlock ? compared - first : kCodeBlock);
    Coded s{}, t{};
    const bool told = s.choose_centre(args.tile.student, row, first, n) &&
                      t.choose_centre(args.tile.teacher, row, first, n) &&
                      (encode_block<true>(s, t, n, to) || encode_block<false>(s, t, n, to));
    to[0] = s.centre, to[1] = t.centre;
    if (!told) return __atomic_store_n(args.failed, 1, __ATOMIC_RELAXED);
    to += n + 2;
  }
  __builtin_memcpy(to, address(args.tile.student, row, compared),
                   sizeof(float) * (size_t)(width - compared));
}

template <bool kTeacher>
BGK_INLINE Vec decode_vector(const uint16_t* level, const uint16_t* gap) {
  const Vec most = F16::load(level), between = F16::load(gap);
  return most - max_keep(Vec{}, kTeacher ? between : -between);
}

template <bool kTeacher>
inline void decode_block(const float* from, int n, float by, float* to) {
  const float centre = from[kTeacher];
  const uint16_t *level = (const uint16_t*)(from + 2), *gap = level + n;
  const int whole = n & -kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    __builtin_prefetch((const char*)(level + i) + kAhead);
    __builtin_prefetch((const char*)(gap + i) + kAhead);
    store(to + i, (decode_vector<kTeacher>(level + i, gap + i) + centre) * by);
  }
  if (whole == n) return;
  uint16_t halves[2][kLanes] = {};
  for (int i = whole; i < n; ++i) halves[0][i - whole] = level[i], halves[1][i - whole] = gap[i];
  const Vec tail = (decode_vector<kTeacher>(halves[0], halves[1]) + centre) * by;
  for (int i = whole; i < n; ++i) to[i] = tail[i - whole];
}

inline void decode_row(const DecodeArgs& args, int64_t row) {
  if (args.labels[row] == kSkip) return;
  const float* from = args.words.data + row * args.words.stride;
  float* to = (float*)address(args.out, row, 0);
  const float by = 1.0f / args.out.scale;
  for (int64_t first = 0; first < args.compared; first += kCodeBlock) {
    const int n = (int)(args.compared - first < kCodeBlock ? args.compared - first : kCodeBlock);
    args.teacher ? decode_block<true>(from, n, by, to + first)
                 : decode_block<false>(from, n, by, to + first);
    from += n + 2;
  }
  if (!args.teacher)
    __builtin_memcpy(to + args.compared, from,
                     sizeof(float) * (size_t)(args.out.columns - args.compared));
}

}  // namespace bgk::BGK_TARGET
