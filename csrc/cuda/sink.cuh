// Where pass 2 writes.
#pragma once

#include "cuda/rows.cuh"

namespace bgk::cuda {

// Where a row's gradient goes.
struct Sink {
  char* row;
  DType dtype;

  BGK_DEVICE Sink(const Logits& x, int64_t r)
      : row((char*)x.data + r * x.row_stride * bytes_of(x.dtype)), dtype(x.dtype) {}

  // Whether `count` columns from one on can be stored at once.
  BGK_DEVICE bool aligned(int64_t column, int count) const {
    const int bytes = bytes_of(dtype) * count;
    const int most = bytes < 16 ? bytes : 16;  // a power of two
    return (((intptr_t)row + column * bytes_of(dtype)) & (most - 1)) == 0;
  }
  BGK_DEVICE uint32_t narrowed(float x) const { return dtype == kBF16 ? to_bf16(x) : to_f16(x); }

  BGK_DEVICE void put_one(int64_t column, float g) const {
    if (dtype == kF32) ((float*)row)[column] = g;
    if (dtype != kF32) ((uint16_t*)row)[column] = (uint16_t)narrowed(g);
  }
  template <int kCount>
  BGK_DEVICE void put_vector(int64_t column, const float* g) const {
    uint32_t words[kCount];
    if (dtype == kF32) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) words[k] = as_bits(g[k]);
#pragma unroll
      for (int k = 0; k < kCount; k += 4) store_words<4>(row + 4 * (column + k), words + k);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) words[k / 2] = narrowed(g[k]) | narrowed(g[k + 1]) << 16;
      store_words<kCount / 2>(row + 2 * column, words);
    }
  }

  template <class Format>
  BGK_DEVICE void put(const Step& step, const float* g) const {
    if (step.vectors) {
      if constexpr (Format::kVector > 1) {
#pragma unroll
        for (int k = 0; k < kColumns; k += Format::kVector) {
          const int column = step.column<Format>(k);
          if (column < step.stop) put_vector<Format::kVector>(column, g + k);
        }
      }
    } else {
      unrolled([&](int k) {
        const int column = step.column<Format>(k);
        if (column < step.stop) put_one(column, g[k]);
      });
    }
  }
};

}  // namespace bgk::cuda
