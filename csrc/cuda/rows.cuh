// How a block walks a row: warps take steps in turn, of kColumns columns a lane. In most steps a
// lane loads 16 bytes at once; at the ends of a row, and in rows of student and teacher that are
// not aligned alike, single elements.
#pragma once

#include "cuda/launch.h"
#include "cuda/threads.cuh"
#include "math/extras.h"

namespace bgk::cuda {

constexpr int kColumns = 8, kStep = kWarpSize * kColumns;

// Blocks a multiprocessor that registers are to suffice for. In fp32 each thread has twice the
// bytes in flight, so that fewer will do; Blackwell's paired instructions want more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 2;
#else
constexpr int kMostBlocks = 3;
#endif

// act(k) of a lane's columns.
template <class Act>
BGK_DEVICE void unrolled(Act act) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) act(k);
}

BGK_HD int log_bytes_of(DType dtype) { return dtype == kF32 ? 2 : 1; }
BGK_HD int bytes_of(DType dtype) { return 1 << log_bytes_of(dtype); }

// Formats: what a lane holds of one model's kColumns logits until it uses them. kVector: columns of
// one 16-byte load.
struct Half {  // both models in bf16 or fp16
  static constexpr int kVector = 8, kWords = 4;
  static BGK_DEVICE uint32_t bits(const uint32_t* words, int k) {
    return k % 2 ? words[k / 2] >> 16 : words[k / 2] & 0xffff;
  }
  static BGK_DEVICE void put(uint32_t* words, int k, uint32_t bits) {
    words[k / 2] = k % 2 ? words[k / 2] | bits << 16 : bits;
  }
  static BGK_DEVICE uint32_t load(const char* row, int64_t column, DType) {
    return ((const uint16_t*)row)[column];
  }
};

struct Single {  // both models in fp32
  static constexpr int kVector = 4, kWords = 8;
  static BGK_DEVICE uint32_t bits(const uint32_t* words, int k) { return words[k]; }
  static BGK_DEVICE void put(uint32_t* words, int k, uint32_t bits) { words[k] = bits; }
  static BGK_DEVICE uint32_t load(const char* row, int64_t column, DType) {
    return ((const uint32_t*)row)[column];
  }
};

struct Mixed : Single {  // anything, by single elements
  static constexpr int kVector = 1;
  static BGK_DEVICE uint32_t load(const char* row, int64_t column, DType dtype) {
    return dtype == kF32 ? Single::load(row, column, dtype) : Half::load(row, column, dtype);
  }
};

// kStep columns that a warp takes at once.
struct Step {
  int first, stop;
  bool vectors;

  template <class Format>
  BGK_DEVICE int column(int k) const {
    constexpr int kVector = Format::kVector;
    if (!vectors) return first + k * kWarpSize + lane();
    return first + (k / kVector * kWarpSize + lane()) * kVector + k % kVector;
  }
  BGK_DEVICE bool has(int column) const {
    return column >= first && column < stop && column < first + kStep;
  }
  BGK_DEVICE bool whole() const { return first + kStep <= stop; }
};

template <class Format>
struct Batch {
  uint32_t words[Format::kWords];
};

// One model's row of the tile.
template <class Format>
struct Source {
  const char* row;
  DType dtype;
  float scale, cap;

  BGK_DEVICE Source(const Logits& x, int64_t r)
      : row((const char*)x.data + (r * x.row_stride << log_bytes(x.dtype))),
        dtype(x.dtype),
        scale(x.scale),
        cap(x.cap) {}

  BGK_DEVICE static int log_bytes(DType dtype) {
    return Format::kVector == 8 ? 1 : Format::kVector == 4 ? 2 : log_bytes_of(dtype);
  }

  // Columns from `start` to the next 16-byte boundary.
  BGK_DEVICE int misaligned(int64_t start) const {
    return -((int)((intptr_t)row >> log_bytes(dtype)) + start) & (Format::kVector - 1);
  }

  BGK_DEVICE void fetch(const Step& step, Batch<Format>& to) const {
    if (Format::kVector > 1 && step.vectors) {
      constexpr int kVector = Format::kVector;
#pragma unroll
      for (int k = 0; k < kColumns; k += kVector) {
        const int column = step.column<Format>(k);
        if (column < step.stop)
          load_words<4>(row + (int64_t)column * (16 / kVector), to.words + k * 4 / kVector);
      }
    } else {
      unrolled([&](int k) {
        const int column = step.column<Format>(k);
        Format::put(to.words, k, column < step.stop ? Format::load(row, column, dtype) : 0);
      });
    }
  }

  // Raw outputs in fp32.
  BGK_DEVICE float widened(uint32_t bits) const {
    return dtype == kF32 ? as_float(bits) : dtype == kBF16 ? as_float(bits << 16) : from_f16(bits);
  }
  BGK_DEVICE float capped(float x) const {
    x *= scale;
    return cap == 0.0f ? x : cap * tanhf(x / cap);
  }

  // Real logits.
  BGK_DEVICE float at(int column) const { return capped(widened(Mixed::load(row, column, dtype))); }
  BGK_DEVICE void real(const Batch<Format>& from, float* to) const {
    if (Format::kWords == 4 && dtype == kBF16) {  // the dtype is looked at once, not 8 times
      unrolled([&](int k) { to[k] = as_float(Format::bits(from.words, k) << 16); });
    } else if (Format::kWords == 4) {
      unrolled([&](int k) { to[k] = from_f16(Format::bits(from.words, k)); });
    } else {
      unrolled([&](int k) {
        const uint32_t bits = Format::bits(from.words, k);
        to[k] = Format::kVector > 1 ? as_float(bits) : widened(bits);
      });
    }
    if (scale == 1.0f && cap == 0.0f) return;
    unrolled([&](int k) { to[k] = capped(to[k]); });
  }
};

// Columns [start, stop) of a row: single elements up to `body`, vectors, single elements.
struct Range {
  int start, body, body_stop, stop, vector_steps;

  // Vectors come in multiples of `grain` columns, a power of two; 1: there are none.
  BGK_DEVICE Range(int start, int stop, int head, int grain) : start(start), stop(stop) {
    const bool some = grain > 1 && start + head + grain <= stop;
    body = some ? start + head : start;
    body_stop = some ? body + ((stop - body) & -grain) : start;
    vector_steps = (body_stop - body + kStep - 1) / kStep;
  }
  BGK_DEVICE int steps() const {
    return (body > start) + vector_steps + (stop - body_stop + kStep - 1) / kStep;
  }
  // In the order of columns, so that of equal logits a warp meets the first first.
  BGK_DEVICE Step step(int i) const {
    if (body > start && i-- == 0) return {start, body, false};
    if (i < vector_steps) return {body + i * kStep, body_stop, true};
    return {body_stop + (i - vector_steps) * kStep, stop, false};
  }
};

// What a kernel of a tile is told besides: the columns of a block.
template <class Args>
struct Shared : Args {
  int each;
};

template <class Args>
Shared<Args> shared(const Args& args, int64_t columns, const Where& where) {
  const int64_t each = (columns + where.splits - 1) / where.splits;
  return {args, (int)((each + kStep - 1) / kStep * kStep)};
}

// The share of a block in a tile's columns, where the models are compared or not.
struct Share {
  int start, pair_stop, stop;

  BGK_DEVICE Share(const Tile& tile, int which, int each) {
    const int width = (int)tile.student.columns;
    const int compared = tile.teacher.data ? (int)tile.teacher.columns : 0;
    const int64_t from = (int64_t)which * each;
    start = from < width ? (int)from : width;
    stop = from + each < width ? (int)(from + each) : width;
    pair_stop = stop < compared ? stop : compared > start ? compared : start;
  }
};

// Rows of both models and where vectors may be used.
template <class Format>
struct RowPair {
  Source<Format> s, t;

  BGK_DEVICE RowPair(const Tile& tile, int64_t row) : s(tile.student, row), t(tile.teacher, row) {}

  BGK_DEVICE void fetch(const Step& step, bool teacher, Batch<Format>& to_s,
                        Batch<Format>& to_t) const {
    s.fetch(step, to_s);
    if (teacher) t.fetch(step, to_t);
  }
  BGK_DEVICE void real(const Step&, bool teacher, const Batch<Format>& from_s,
                       const Batch<Format>& from_t, float* z, float* v) const {
    s.real(from_s, z);
    if (teacher) t.real(from_t, v);
  }
  BGK_DEVICE float student_at(int column) const { return s.at(column); }
  BGK_DEVICE float teacher_at(int column) const { return t.at(column); }

  // `also`: whether something else allows vectors from a column on. `grain`: of Range.
  template <class Also>
  BGK_DEVICE Range range(int start, int stop, bool paired, Also also,
                         int grain = Format::kVector) const {
    const int head = s.misaligned(start);
    const bool alike = (!paired || t.misaligned(start) == head) && also(start + head);
    return Range(start, stop, head, alike ? grain : 1);
  }
  BGK_DEVICE Range range(int start, int stop, bool paired) const {
    return range(start, stop, paired, [](int) { return true; });
  }
};

// A warp's next step, on its way. `teacher`: whether both models' logits are asked for.
template <class Format>
struct Ahead {
  Batch<Format> s, t = {};
  Step step;

  BGK_DEVICE void fetch(const RowPair<Format>& rows, const Range& range, int i, bool teacher) {
    if (i >= range.steps()) return;
    step = range.step(i);
    rows.fetch(step, teacher, s, t);
  }
};

template <class T, class Act>
BGK_DEVICE T reduced(T x, Act act) {
#pragma unroll
  for (int apart = kWarpSize / 2; apart; apart /= 2) x = act(x, exchanged(x, apart));
  return x;
}
BGK_DEVICE float warp_max(float x) {
  return reduced(x, [](float a, float b) { return fmaxf(a, b); });
}
template <class T>
BGK_DEVICE T warp_min(T x) {
  return reduced(x, [](T a, T b) { return b < a ? b : a; });
}
BGK_DEVICE float warp_sum(float x) {
  return reduced(x, [](float a, float b) { return a + b; });
}

// What math/ asks for.
struct ScalarMath {
  typedef float F;
  typedef float S;
  static constexpr int kLanes = 1;
  static BGK_DEVICE float exp(float x) { return fast_exp(x); }
  static BGK_DEVICE float expm1(float x) { return expm1f(x); }
  static BGK_DEVICE float log1p(float x) { return log1pf(x); }
  static BGK_DEVICE float larger(float most, float x) { return fmaxf(most, x); }
  static BGK_DEVICE float largest(float x) { return x; }
  static BGK_DEVICE float total(float x) { return x; }
  static BGK_DEVICE float first(float x) { return x; }
};

// Rows of a state's floats.
BGK_HD int count_sums(const Spec& spec) {
  return each_extra<ScalarMath>(spec, [](const auto&, int, const Offsets&) {}).sums;
}

// Which format serves a pair of models.
enum Size { kHalves, kSingles, kMixedSizes };

inline Size size_of(const Logits& s, const Logits& t) {
  const bool wide_s = s.dtype == kF32, wide_t = t.dtype == kF32;
  // One Source reads one dtype at a time, but both read by the same Format.
  return wide_s != wide_t ? kMixedSizes : wide_s ? kSingles : kHalves;
}

// Blocks in which each thread takes a row.
inline dim3 thread_a_row(int64_t rows) { return dim3((rows + kThreads - 1) / kThreads); }

}  // namespace bgk::cuda
