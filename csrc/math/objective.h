// The loss of a row from its state, and the coefficients of its gradient, where a divergence is a
// sum of KLs, or of one pairwise statistic's values, and the weights are constant or the teacher's
// alone: so that a row needs no host between its passes. Formulas: bgkernels/stats.py, vjp.py,
// divergences.py, routing.py, objective.py. In fp64.
#pragma once

#include "math/row_vjp.h"

namespace bgk::BGK_TARGET {

// What objectives read; bgkernels.rows.stats.Final.
struct RowFinal {
  double lse_s, lse_t, lse_c, entropy_t, kl_ts, kl_st, logp_t, max_prob_t, nll, logit_mean;
  double power_sum;               // log Σ p_t^b of the only tilt, if there is one
  double rest_s, rest_t, rest_c;  // 1 - p[label]
};

struct DoubleMath {
  typedef double F;
  static BGK_HD double first(double x) { return x; }
};

BGK_HD RowState<double> widened(const RowState<float>& x, int tilt_count) {
  RowState<double> out;
  out.m_s = x.m_s, out.m_t = x.m_t, out.m_c = x.m_c;
  out.pair = {x.pair.d_s, x.pair.h_s, x.pair.k_s, x.pair.d_t, x.pair.h_t, x.pair.k_t};
  out.d_c = x.d_c, out.z_sum = x.z_sum;
  out.label = x.label, out.argmax_s = x.argmax_s, out.argmax_t = x.argmax_t;
  for (int i = 0; i < tilt_count; ++i)
    out.tilts[i] = {x.tilts[i].m, x.tilts[i].d, x.tilts[i].k, x.tilts[i].q};
  return out;
}

BGK_HD double not_below_zero(double x) { return x < 0.0 ? 0.0 : x; }  // a NaN stays
BGK_HD double in_unit(double x) { return x < 0.0 ? 0.0 : x > 1.0 ? 1.0 : x; }

BGK_HD double log_prob(double rest, double logit, double lse) {
  return rest < 0.5 ? ::log1p(-rest) : logit - lse;
}

// `columns`: of the whole student vocabulary.
BGK_HD RowFinal finalize(const RowState<float>& state, const Spec& spec, int64_t columns) {
  RowState<double> all = widened(state, spec.tilt_count);
  const Label& y = state.label;
  if (y.column != kNone) absorb_column<DoubleMath>(all, y.column, y.z, y.v, spec);
  const bool compared = y.column >= 0 && y.column < spec.compared;
  const PairSums<double>& sums = all.pair;
  RowFinal x;
  const double log_s = ::log(sums.d_s), log_t = ::log(sums.d_t);
  x.lse_s = shift(all.m_s) + log_s, x.lse_t = shift(all.m_t) + log_t;
  x.rest_s = times((double)state.pair.d_s, ::exp(shift(state.m_s) - x.lse_s));
  x.rest_t = times((double)state.pair.d_t, ::exp(shift(state.m_t) - x.lse_t));
  x.entropy_t = not_below_zero(log_t - sums.h_t / sums.d_t);
  x.kl_st = not_below_zero(sums.k_s / sums.d_s + log_t - log_s);
  x.kl_ts = not_below_zero(sums.k_t / sums.d_t + log_s - log_t);
  x.logp_t = log_prob(x.rest_t, compared ? y.v : kNegInf, x.lse_t);
  x.max_prob_t = 1.0 / sums.d_t;
  x.lse_c = x.lse_s, x.rest_c = x.rest_s;
  double logit = compared ? (double)y.z * spec.inverse_temperature : kNegInf;
  if (!spec.shared_softmax) {
    x.lse_c = shift(all.m_c) + ::log(all.d_c), logit = y.z;
    x.rest_c = times((double)state.d_c, ::exp(shift(state.m_c) - x.lse_c));
  }
  // A label that no column has is a bad one: it must not look plausible.
  x.nll = y.column < 0 ? NAN : -log_prob(x.rest_c, logit, x.lse_c);
  x.logit_mean = all.z_sum / columns;
  x.power_sum = 0.0;
  if (spec.tilt_count)
    x.power_sum = shift(all.tilts[0].m) + ::log(all.tilts[0].d) - spec.tilts[0].b * x.lse_t;
  return x;
}

// Weights of the hard and the soft label.
struct Weights {
  double hard, soft;
};

BGK_HD Weights weights_of(const Objective& how, const RowFinal& x, const Spec& spec) {
  const double vocab = (double)spec.compared;
  const double shannon = in_unit(x.entropy_t / ::log(vocab < 2.0 ? 2.0 : vocab));
  double soft = how.soft, hard = how.hard;
  switch (how.policy) {
    case kConstant:
      break;
    case kLabelConfidence:
      hard = ::exp(x.logp_t), soft = 1.0 - hard;
      break;
    case kMaxConfidence:
      hard = x.max_prob_t, soft = 1.0 - hard;
      break;
    case kPowerEntropy: {
      const double most = ::pow(vocab, 1.0 - spec.tilts[0].b) - 1.0;
      soft = in_unit(::expm1(x.power_sum) / (most < 1e-12 ? 1e-12 : most)), hard = 1.0 - soft;
      break;
    }
    case kShannonEntropy:
      soft = shannon, hard = 1.0 - soft;
      break;
    case kThreshold:
      soft = 1.0 / (1.0 + ::exp(-how.sharpness * (shannon - how.tau))), hard = 1.0 - soft;
      break;
  }
  if (how.reversed) return {soft, hard};
  return {hard, soft};
}

// The pairwise statistic's part of a divergence, and the factors of its terms in the gradient.
struct PairPart {
  double value, factors[3];
};

// `sums`: of the second read, for the only mixture or the total variation.
BGK_HD PairPart pair_part(const Objective& how, const double* sums, const Spec& spec) {
  if (spec.mixture_count) {
    const double omega = spec.omegas[0], kl_tm = not_below_zero(sums[0]);
    const double kl_sm = not_below_zero(sums[1]), overlap = sums[2];
    return {times(how.kl_tm, kl_tm) + times(how.kl_sm, kl_sm),
            {how.kl_tm * (1.0 - omega) * overlap - how.kl_sm * (omega * overlap + kl_sm),
             how.kl_sm * omega - how.kl_tm * (1.0 - omega), how.kl_sm}};
  }
  if (spec.total_variation)
    return {how.variation * sums[0], {-0.5 * how.variation * sums[1], 0.5 * how.variation, 0.0}};
  return {};
}

struct LossOfRow {
  double loss;
  VjpRow row;
  double pairs[3];  // of the pairwise statistic, as bgkernels.rows.vjp.Coefficients.pairs
};

// `sums`: of the pairwise statistic, if there is one; `scale`: factor of the row's loss.
BGK_HD LossOfRow loss_of_row(const Objective& how, const RowFinal& x, const double* sums,
                             const Spec& spec, int64_t columns, double scale) {
  const Weights w = weights_of(how, x, spec);
  const double inv = spec.inverse_temperature, smooth = how.label_smoothing;
  const PairPart pairs = pair_part(how, sums, spec);
  double divergence = times(how.kl_ts, x.kl_ts) + times(how.kl_st, x.kl_st) + pairs.value;
  // A masked column can make it infinite in a token that gives it no weight.
  if (w.soft == 0.0 && divergence - divergence != 0.0) divergence = 0.0;
  const double hard = (1.0 - smooth) * x.nll + times(smooth, x.lse_c - x.logit_mean);
  LossOfRow out;
  out.loss =
      times(w.hard, hard) + w.soft * divergence / (inv * inv) + how.z_loss * x.lse_c * x.lse_c;
  out.loss *= scale;
  const double soft = scale * w.soft / (inv * inv), g_hard = scale * w.hard;
  const double g_ts = times(how.kl_ts, soft), g_st = times(how.kl_st, soft);
  for (int k = 0; k < 3; ++k) out.pairs[k] = times(soft, pairs.factors[k]) * inv;
  const double g_nll = g_hard * (1.0 - smooth);
  const double g_lse = g_hard * smooth + scale * 2.0 * how.z_loss * x.lse_c;
  const double free = -times(g_st, x.kl_st) * inv;
  VjpRow& row = out.row;
  row.lse_s = x.lse_s, row.lse_t = x.lse_t, row.lse_c = x.lse_c;
  row.a = free + g_ts * inv, row.b = row.c = g_st * inv, row.d = g_ts * inv;
  row.h = g_lse + g_nll, row.m = -g_hard * smooth / columns;
  row.a_y = free, row.d_y = 0.0, row.h_y = g_lse;
  row.hot = times(g_ts, x.rest_t - x.rest_s) * inv - times(g_nll, x.rest_c);
  if (spec.shared_softmax) {
    row.a += row.h, row.a_y += row.h_y;
    row.h = row.h_y = 0.0;
  }
  return out;
}

}  // namespace bgk::BGK_TARGET
