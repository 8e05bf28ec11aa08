// Log-probabilities in fp32, of normalisers in fp64.
#pragma once

#include "cuda/rows.cuh"
#include "math/extras.h"
#include "math/row_vjp.h"

namespace bgk::cuda {

// Log-probabilities of a row's columns.
struct LogProbs {
  Centre s, t;
  float by;

  BGK_DEVICE float of_s(float z) const { return (z * by - s.value) - (float)s.rest; }
  BGK_DEVICE float of_t(float v) const { return (v * by - t.value) - (float)t.rest; }
};

}  // namespace bgk::cuda
