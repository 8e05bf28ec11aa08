// The extra statistics: tilts (their exponent is in row_state.h), mixtures and total variation.
// M supplies F, expm1 and log1p.
#pragma once

#include "math/row_state.h"

namespace bgk::BGK_TARGET {

// Beyond this |log p_t/p_s| one of the two is below e^-80 of the other.
constexpr float kLogRatioBound = 80.0f;

template <class F>
struct MixtureTerms {
  F ratio, log_ratio_s, log_ratio_t;  // p_t/m, log(p_s/m), log(p_t/m)
};

// m = omega·p_t + (1-omega)·p_s. The larger probability's log-ratio is computed from expm1, the
// other one is the difference: exact to first order where the models agree, and free of
// cancellation where they do not.
template <class M, class F = typename M::F>
BGK_HD MixtureTerms<F> mixture_terms(F lp, F lq, float omega) {
  const F delta = (lp == kNegInf) & (lq == kNegInf) ? F{} : lq - lp;
  const auto teacher_leads = delta > 0.0f;
  F gap = teacher_leads ? delta : -delta;
  gap = gap > kLogRatioBound ? F{} + kLogRatioBound : gap;
  const F below = M::expm1(-gap);
  const F weight = teacher_leads ? F{} + (1.0f - omega) : F{} + omega;
  const F leader = -M::log1p(weight * below), other = leader - gap;
  const F ratio = 1.0f / (1.0f + weight * below);
  return {teacher_leads ? ratio : ratio + ratio * below, teacher_leads ? other : leader,
          teacher_leads ? leader : other};
}

template <class F>
BGK_HD F sign(F x) {
  const F zero{}, one = zero + 1.0f;
  return (x > 0.0f ? one : zero) - (x < 0.0f ? one : zero);
}

}  // namespace bgk::BGK_TARGET
