// Pass 2: the vector-Jacobian product of the row statistics. bgkernels/vjp.py derives the
// coefficients.
#pragma once

#include "math/row_state.h"

namespace bgk::BGK_TARGET {

// One row of bgkernels.rows.vjp.COEFFICIENTS.
struct VjpRow {
  double lse_s, lse_t, lse_c, a, b, c, d, h, m, a_y, d_y, h_y, hot;
};

BGK_HD VjpRow scaled(VjpRow x, double by) {
  x.a *= by, x.b *= by, x.c *= by, x.d *= by, x.h *= by, x.m *= by;
  x.a_y *= by, x.d_y *= by, x.h_y *= by, x.hot *= by;
  return x;
}

// e^lp·(A + B·lp - C·lq). A is added first: where the models differ much, it cancels all but a
// little of the rest.
template <class F, class S>
BGK_HD F vjp_softmax(F lp, F lq, F p, S a, S b, S c) {
  F x = F{} + a;
  if (b != S{}) x += b * lp;
  if (c != S{}) x -= c * lq;
  return times(p, x);
}

// The gradient in the label's tempered or real logit, where the hot term replaces what would
// cancel.
BGK_HD double vjp_label(const VjpRow& row, double z, double v, const Spec& spec, bool compared) {
  double x = row.m + row.hot;
  if (!spec.shared_softmax) x += times(row.h_y, ::exp(z - row.lse_c));
  if (!compared) return x;
  const double by = spec.inverse_temperature, lp = z * by - row.lse_s, lq = v * by - row.lse_t;
  x -= times(row.d_y, ::exp(lq));
  return x + vjp_softmax(lp, lq, ::exp(lp), row.a_y, row.b, row.c);
}

// e^x of an x that is nearly always tiny, without the cost of an exponential in fp64.
BGK_HD double exp_of_rest(double x) {
  const bool tiny = x > -1e-4 && x < 1e-4;  // then the next term is below 1e-17
  return tiny ? 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0))) : ::exp(x);
}

// A log-sum-exp as a float to subtract, and what e^(centre - lse) that leaves to the coefficients.
struct Centre {
  float value;
  double rest, factor;  // lse - value, and e^-rest

  Centre() = default;
  BGK_HD explicit Centre(double lse)
      : value((float)lse), rest(lse - value), factor(exp_of_rest(-rest)) {}
};

// The coefficients for columns other than the label, of probabilities e^(x - centre): so a common
// offset of the logits, which takes digits from lse as a float, takes none from the gradient.
struct VjpColumns {
  float s, t, c_hard;  // centres
  float a, b, c, d, h, m;
};

BGK_HD VjpColumns columns_of(const VjpRow& x) {
  const Centre s(x.lse_s), t(x.lse_t), hard(x.lse_c);
  const double a = x.a - times(x.b, s.rest) + times(x.c, t.rest);
  const double b = s.factor * x.b, c = s.factor * x.c;
  const double d = times(x.d, t.factor), h = times(x.h, hard.factor);
  return {s.value,  t.value,  hard.value, (float)(s.factor * a), (float)b, (float)c,
          (float)d, (float)h, (float)x.m};
}

// What a row's gradient has in common from column to column.
struct VjpPlan {
  VjpRow row;      // for the label
  VjpColumns x;    // for the compared columns
  float h_beyond;  // H for the others
  bool curved;     // whether the log-probabilities themselves come in
  bool extras;     // whether an extra has a term, which the caller finds out
  bool teacher;    // whether the gradient depends on the teacher's logits
};

// `scale`: of the student's linear map, a factor of every term.
BGK_HD VjpPlan plan_row(const VjpRow& row, double scale, const Spec& spec) {
  VjpPlan plan;
  plan.row = scaled(row, scale);
  VjpRow folded = plan.row;
  plan.h_beyond = (float)times(folded.h, Centre(folded.lse_c).factor);
  if (spec.inverse_temperature == 1.0f && folded.h != 0.0) {
    // Both softmaxes of the student differ by a factor only.
    folded.a += folded.h * ::exp(folded.lse_s - folded.lse_c);
    folded.h = 0.0;
  }
  const VjpColumns& x = plan.x = columns_of(folded);
  plan.curved = x.b != 0.0f || x.c != 0.0f;
  plan.extras = false;
  plan.teacher = plan.curved || x.d != 0.0f || plan.row.d_y != 0.0;
  return plan;
}

BGK_HD VjpPlan plan_row(const VjpArgs& args, int64_t row) {
  VjpRow values;
  static_assert(sizeof(VjpRow) == kCoefficients * sizeof(double), "one field a coefficient");
  double* to = (double*)&values;
  for (int k = 0; k < kCoefficients; ++k) to[k] = args.factors.data[k * args.factors.stride + row];
  return plan_row(values, args.tile.student.scale, args.spec);
}

}  // namespace bgk::BGK_TARGET
