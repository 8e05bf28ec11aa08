// Pass 2: the vector-Jacobian product of the row statistics. bgkernels/stats.py derives the
// coefficients.
#pragma once

#include "math/row_state.h"

namespace bgk::BGK_TARGET {

// One row of bgkernels.stats.COEFFICIENTS.
struct VjpRow {
  float lse_s, lse_t, lse_c, a, b, c, d, h, m, a_y, d_y, h_y, hot;
};

BGK_HD VjpRow scaled(VjpRow x, float by) {
  x.a *= by, x.b *= by, x.c *= by, x.d *= by, x.h *= by, x.m *= by;
  x.a_y *= by, x.d_y *= by, x.h_y *= by, x.hot *= by;
  return x;
}

// e^lp·(A + B·lp - C·lq). A is added first: where the models differ much, it cancels all but a
// little of the rest.
template <class F>
BGK_HD F vjp_softmax(F lp, F lq, F p, float a, float b, float c) {
  F x = F{} + a;
  if (b != 0.0f) x += b * lp;
  if (c != 0.0f) x -= c * lq;
  return times(p, x);
}

// The gradient in the label's tempered or real logit, where the hot term replaces what would
// cancel.
BGK_HD float vjp_label(const VjpRow& row, float z, float v, const Spec& spec, bool compared) {
  float x = row.m + row.hot;
  if (!spec.shared_softmax) x += times(row.h_y, expf(z - row.lse_c));
  if (!compared) return x;
  const float lp = z * spec.inverse_temperature - row.lse_s,
              lq = v * spec.inverse_temperature - row.lse_t;
  const float p = expf(lp);
  return x + vjp_softmax(lp, lq, p, row.a_y, row.b, row.c) - times(row.d_y, expf(lq));
}

}  // namespace bgk::BGK_TARGET
