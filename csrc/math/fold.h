// From the derivatives of a loss in the statistics to the coefficients of pass 2.
// bgkernels/rows/vjp.py derives the formulas. In fp64.
#pragma once

#include "math/finalize.h"
#include "math/row_vjp.h"

namespace bgk::BGK_TARGET {

BGK_HD VjpRow fold_base(In y, In g, const Spec& spec) {
  const double inv = spec.inverse;
  VjpRow x;
  x.lse_s = y[kLseS], x.lse_t = y[kLseT], x.lse_c = y[kLseHard];
  const double bend = times<double>(g[kEntropyS], y[kEntropyS]) + times<double>(g[kKlSt], y[kKlSt]);
  x.a_y = (g[kLseS] - bend) * inv;
  x.a = x.a_y + (g[kKlTs] - g[kLogpS]) * inv;
  x.b = (g[kKlSt] - g[kEntropyS]) * inv, x.c = g[kKlSt] * inv;
  x.d = g[kKlTs] * inv, x.d_y = 0.0;
  x.h = g[kLseHard] + g[kNll], x.h_y = g[kLseHard];
  x.m = g[kLogitMean] / (double)spec.columns;
  x.hot = times<double>(g[kLogpS], y[kRestS]) * inv - times<double>(g[kNll], y[kRestC]) +
          times<double>(g[kKlTs], y[kRestT] - y[kRestS]) * inv;
  if (spec.shared_softmax) {
    x.a += x.h, x.a_y += x.h_y;
    x.h = x.h_y = 0.0;
  }
  return x;
}

BGK_HD void fold_row(const FoldArgs& args, int64_t row) {
  const Spec& spec = args.spec;
  const In y(args.statistics, row), g(args.grads, row);
  const Out out(args.out, row);
  VjpRow x = fold_base(y, g, spec);
  each_extra<DoubleMath>(spec, [&](const auto& statistic, int, const Offsets& at) {
    statistic.fold(y.from(at.fields), g.from(at.fields), out.from(at.factors), x.hot);
  });
  const double* from = (const double*)&x;
  for (int k = 0; k < kCoefficients; ++k) out[k] = from[k];
}

}  // namespace bgk::BGK_TARGET
