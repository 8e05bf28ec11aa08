// Coded tiles (bgkernels/backends/code.py): pass 1 writes them beside its sums, and what comes
// later reads them instead of logits. The columns of a step share centres.
#pragma once

#include "cuda/rows.cuh"

namespace bgk::cuda {

static_assert(kStep == kCodeBlock, "the columns of a step share centres");

// Where the code of a row goes.
struct CodeSink {
  uint32_t* words;
  float* centres;

  BGK_DEVICE CodeSink(const Code& code, int64_t row)
      : words(code.words.data + row * code.words.stride),
        centres(code.centres.data + row * code.centres.stride) {}

  BGK_DEVICE bool aligned() const { return ((intptr_t)words & 15) == 0; }

  template <class Format>
  BGK_DEVICE void put(const Step& step, bool paired, const float* z, const float* v) const {
    if (!paired) {  // the student's logit itself
      unrolled([&](int k) {
        const int column = step.column<Format>(k);
        if (column < step.stop) words[column] = as_bits(z[k]);
      });
      return;
    }
    float s = kNegInf, t = kNegInf;
    unrolled([&](int k) {
      const bool there = step.column<Format>(k) < step.stop;
      s = fmaxf(s, there ? z[k] : kNegInf), t = fmaxf(t, there ? v[k] : kNegInf);
    });
    s = shift(warp_max(s)), t = shift(warp_max(t));
    uint32_t coded[kColumns];
    unrolled([&](int k) {
      const float du = z[k] - s, dv = v[k] - t;
      const float gap = z[k] == kNegInf && v[k] == kNegInf ? 0.0f : du - dv;
      coded[k] = to_f16(du > dv ? du : dv) | (uint32_t)to_f16(gap) << 16;
    });
    if (lane() < 2) centres[step.first / kStep * 2 + lane()] = lane() ? t : s;
    unrolled([&](int k) {
      const int column = step.column<Format>(k);
      if (column >= step.stop) return;
      if (!step.vectors) words[column] = coded[k];
      if (step.vectors && k % 4 == 0) store_words<4>(words + column, coded + k);
    });
  }
};

// A format: a lane's words of both models.
struct Coded : Single {};

template <>
struct RowPair<Coded> {
  Source<Coded> words;
  const float* centres;  // of student and teacher in turn
  int compared;

  BGK_DEVICE RowPair(const Tile& tile, int64_t row)
      : words({tile.code.words.data, tile.code.words.stride, 0, kF32, 1.0f, 0.0f}, row),
        centres(tile.code.centres.data + row * tile.code.centres.stride),
        compared(tile.teacher.data ? (int)tile.teacher.columns : 0) {}

  template <class Also>
  BGK_DEVICE Range range(int start, int stop, bool, Also also) const {
    return Range(start, stop, 0, words.misaligned(start) == 0 && also(start) ? kStep : 1);
  }
  BGK_DEVICE Range range(int start, int stop, bool paired) const {
    return range(start, stop, paired, [](int) { return true; });
  }

  // `to_t`: the step's centres.
  BGK_DEVICE void fetch(const Step& step, bool, Batch<Coded>& to_s, Batch<Coded>& to_t) const {
    words.fetch(step, to_s);
    if (step.first >= compared) return;
    const float* at = centres + step.first / kStep * 2;
    to_t.words[0] = as_bits(at[0]), to_t.words[1] = as_bits(at[1]);
  }

  BGK_DEVICE static float student(uint32_t word, float centre) {
    return centre + (from_f16(word & 0xffff) + fminf(from_f16(word >> 16), 0.0f));
  }
  BGK_DEVICE static float teacher(uint32_t word, float centre) {
    return centre + (from_f16(word & 0xffff) - fmaxf(from_f16(word >> 16), 0.0f));
  }

  BGK_DEVICE void real(const Step& step, bool both, const Batch<Coded>& from_s,
                       const Batch<Coded>& from_t, float* z, float* v) const {
    const float s = as_float(from_t.words[0]), t = as_float(from_t.words[1]);
    const bool alone = step.first >= compared;
    unrolled([&](int k) {
      z[k] = alone ? as_float(from_s.words[k]) : student(from_s.words[k], s);
      if (both) v[k] = teacher(from_s.words[k], t);
    });
  }
  BGK_DEVICE float student_at(int column) const {
    const uint32_t word = Coded::load(words.row, column, kF32);
    return column >= compared ? as_float(word) : student(word, centres[column / kStep * 2]);
  }
  BGK_DEVICE float teacher_at(int column) const {
    return teacher(Coded::load(words.row, column, kF32), centres[column / kStep * 2 + 1]);
  }
};

}  // namespace bgk::cuda
