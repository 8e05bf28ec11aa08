// States of a block's warps, in shared memory; and the sampler.
#pragma once

#include "cuda/rows.cuh"
#include "math/row_state.h"

namespace bgk::cuda {

// Merges the states of a block's warps, and the one after them, into the first; warp 0 does it.
BGK_DEVICE void merge_warps(RowState<ScalarMath>* states, const Spec& spec) {
  for (int half = kWarps / 2;; half /= 2) {  // one call, so that the code is there once
    const int apart = half ? half : kWarps;
    if (lane() < half || lane() == 0) merge(states[lane()], states[lane() + apart], spec);
    sync_warp();
    if (half == 0) return;
  }
}

// bgkernels/sampling.py: a standard Gumbel number, the same in every backend.
BGK_DEVICE float gumbel(uint32_t column, uint32_t row, uint32_t key) {
#pragma unroll
  for (int round = 0; round < 10; ++round, key += 0x9E3779B9u) {
    const uint32_t high = high_product(column, 0xD256D193u);
    const uint32_t low = column * 0xD256D193u;
    column = high ^ key ^ row, row = low;
  }
  return -logf(-logf(((float)(column >> 9) + 0.5f) * 0x1p-23f));
}
constexpr float kMostNoise = 16.7f;  // no Gumbel number is larger, roundings included

}  // namespace bgk::cuda
