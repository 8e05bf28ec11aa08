// Arithmetic of rows, for host and device. Include with BGK_TARGET defined: every build of math/
// lives in a namespace of its own, so that no linker can mix instruction sets.
//
// Kernels supply a class M: S, a float or a double; F, which is S, or a vector whose kLanes lanes
// are partial sums; exp, expm1 and log1p of an F; larger() of two and largest() of the lanes, NaNs
// ignored; total() of the lanes; and first(), which puts a number into a sum.
#pragma once

#include <math.h>
#include <stdint.h>

#include "row_args.h"

#ifndef BGK_TARGET
#error "define BGK_TARGET, the namespace of this build of the kernels"
#endif
#ifdef __CUDACC__
#define BGK_HD __host__ __device__ __forceinline__
#define BGK_UNROLL _Pragma("unroll")
#define BGK_ANY_SIDE _Pragma("nv_exec_check_disable")  // of what it is given to call
#else
#define BGK_HD inline __attribute__((always_inline))
#define BGK_UNROLL
#define BGK_ANY_SIDE
#endif

namespace bgk::BGK_TARGET {

constexpr float kNegInf = -HUGE_VALF;

BGK_HD float exp_of(float x) { return expf(x); }
BGK_HD double exp_of(double x) { return ::exp(x); }

// weight · x with 0 · (±inf) = 0; a NaN weight stays a NaN.
template <class F>
BGK_HD F times(F weight, F x) {
  return weight == 0.0f ? F{} : weight * x;
}

// The centre that belongs to a maximum: itself, or 0 for an empty state.
template <class S>
BGK_HD S shift(S m) {
  return m == kNegInf ? S{} : m;
}

// The larger of two, a NaN in `x` ignored.
template <class S>
BGK_HD S larger(S m, S x) {
  return x > m ? x : m;
}

// How far sums centred at `from` move when they are centred at `to`; -inf for an empty state.
template <class S>
BGK_HD S moved(S from, S to) {
  return from == to ? S{} : from - to;
}

BGK_HD double not_below_zero(double x) { return x < 0.0 ? 0.0 : x; }  // a NaN stays

// log p of a column, where `rest` is the probability of all others.
BGK_HD double log_prob(double rest, double logit, double lse) {
  return rest < 0.5 ? ::log1p(-rest) : logit - lse;
}

template <class F>
BGK_HD F sign(F x) {
  const F zero{}, one = zero + 1.0f;
  return (x > 0.0f ? one : zero) - (x < 0.0f ? one : zero);
}

// Σ e^x and Σ e^x·x, of x about a maximum, when x moves by so much.
template <class F, class S>
BGK_HD void recentre(F& d, F& h, S by) {
  const F weight = F{} + exp_of(by);
  h = times(weight, h + times(d, F{} + by));
  d *= weight;
}

// Numbers of one row of a Matrix.
template <class T>
struct Column {
  T* data;
  int64_t stride;

  template <class U>
  BGK_HD Column(const Matrix<U>& x, int64_t row) : data(x.data + row), stride(x.stride) {}
  BGK_HD Column(T* data, int64_t stride) : data(data), stride(stride) {}
  BGK_HD T& operator[](int k) const { return data[k * stride]; }
  BGK_HD T& next() { return data += stride, data[-stride]; }
  BGK_HD Column from(int k) const { return {data + k * stride, stride}; }
};

}  // namespace bgk::BGK_TARGET
