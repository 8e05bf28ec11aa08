// From a state to statistics. bgkernels/rows/stats.py derives the formulas. In fp64.
#pragma once

#include "math/row_state.h"

namespace bgk::BGK_TARGET {

// bgkernels.rows.stats: the statistics of every row, before those of the extras. Those from kRestS
// on are 1 - p[label], summed without cancellation.
enum Field {
  kLseS,
  kLseT,
  kEntropyS,
  kEntropyT,
  kKlTs,
  kKlSt,
  kLogpS,
  kLogpT,
  kMaxProbS,
  kMaxProbT,
  kNll,
  kLseHard,
  kLogitMean,
  kRestS,
  kRestT,
  kRestC
};
static_assert(kRestC + 1 == kFields, "one a field");

// log-sum-exp, and the probability outside the label.
struct Softmax {
  double log_d, lse, rest;

  BGK_HD Softmax(double m, double d, double m_without, double d_without)
      : log_d(::log(d)),
        lse(shift(m) + log_d),
        rest(times(d_without, ::exp(shift(m_without) - lse))) {}
};

// `u_y`, `v_y`: the label's tempered logits, -inf where it is not compared.
BGK_HD void finalize_pair(const RowState<DoubleMath>& all, const RowState<DoubleMath>& without,
                          double u_y, double v_y, Out out) {
  const PairSums<double>& sums = all.pair;
  const Softmax s(all.m_s, sums.d_s, without.m_s, without.pair.d_s);
  const Softmax t(all.m_t, sums.d_t, without.m_t, without.pair.d_t);
  out[kLseS] = s.lse, out[kLseT] = t.lse;
  out[kEntropyS] = not_below_zero(s.log_d - sums.h_s / sums.d_s);
  out[kEntropyT] = not_below_zero(t.log_d - sums.h_t / sums.d_t);
  out[kKlSt] = not_below_zero(sums.k_s / sums.d_s + t.log_d - s.log_d);
  out[kKlTs] = not_below_zero(sums.k_t / sums.d_t + s.log_d - t.log_d);
  out[kLogpS] = log_prob(s.rest, u_y, s.lse), out[kLogpT] = log_prob(t.rest, v_y, t.lse);
  out[kMaxProbS] = 1.0 / sums.d_s, out[kMaxProbT] = 1.0 / sums.d_t;
  out[kRestS] = s.rest, out[kRestT] = t.rest;
}

BGK_HD void finalize_row(const FinalizeArgs& args, int64_t row) {
  const Spec& spec = args.spec;
  Out out(args.out, row);
  const bool skip = args.labels[row] == kSkip;
  RowState<DoubleMath> without;
  load_state(without, args.state, row, spec);
  RowState<DoubleMath> all = without;
  const Label<double>& y = without.label;
  if (!skip && y.column >= 0) absorb_column(all, y.column, y.z, y.v, spec);
  const bool compared = y.column >= 0 && y.column < spec.compared;
  const double u_y = compared ? y.z * spec.inverse : kNegInf;
  const double v_y = compared ? y.v : kNegInf;
  int64_t* ints = args.state.ints.data + row;
  if (skip) ints[0] = kSkip;
  ints[args.state.ints.stride] = all.argmax_s, ints[2 * args.state.ints.stride] = all.argmax_t;
  for (int k = 0; k < kFields; ++k) out[k] = 0.0;
  if (spec.compared) finalize_pair(all, without, u_y, v_y, out);
  if (spec.shared_softmax) {
    out[kNll] = -out[kLogpS], out[kLseHard] = out[kLseS], out[kRestC] = out[kRestS];
  } else {
    const Softmax c(all.m_c, all.d_c, without.m_c, without.d_c);
    out[kNll] = -log_prob(c.rest, y.z, c.lse), out[kLseHard] = c.lse, out[kRestC] = c.rest;
  }
  out[kLogitMean] = all.z_sum / (double)spec.columns;
  // A label that no column has is a bad one that could not be refused: it must not look plausible.
  if (y.column < 0) {
    for (int k = 0; k < kRestS; ++k) out[k] = NAN;
  }
  const Finished maxima = {all.m_s, all.m_t, without.m_s, without.m_t, u_y, v_y};
  const Offsets end = each_extra<DoubleMath>(spec, [&](const auto& x, int i, const Offsets& at) {
    x.finalize(all.extras[i], without.extras[i], maxima, out.from(at.fields));
  });
  if (!skip) return;
  for (int k = 0; k < end.fields; ++k) out[k] = 0.0;
}

}  // namespace bgk::BGK_TARGET
