// Factors of a product as they come from Python.
#pragma once

#include <stdint.h>

#include <tuple>
#include <utility>

#include "cpu/factors.h"

namespace bgk {

typedef std::pair<uintptr_t, uintptr_t> MicroKernels;            // and what releases it, or 0
typedef std::tuple<uintptr_t, int64_t, int64_t> OperandAddress;  // strides of rows and columns
typedef std::tuple<int64_t, int64_t, int64_t> Sizes;             // m, n, k
typedef std::tuple<MicroKernels, int, Sizes, OperandAddress, OperandAddress> FactorArgs;

inline Operand operand(const OperandAddress& x) {
  return {(const uint16_t*)std::get<0>(x), std::get<1>(x), std::get<2>(x)};
}

inline Factors factors_of(const FactorArgs& x) {
  const auto& [kernels, dtype, sizes, a, b] = x;
  const auto& [m, n, k] = sizes;
  const MicroKernel kernel = (MicroKernel)kernels.first;
  return {kernel,    (MicroRelease)kernels.second, (OperandType)dtype, m, n, k, operand(a),
          operand(b)};
}

}  // namespace bgk
