// The extra statistics of bgkernels/rows/extras.py, which derives the formulas: one struct a
// statistic, with all that it does in any kernel. A new one is a struct here and a line of
// with_statistic(); it has every hook of Statistic, or inherits it.
#pragma once

#include "math/numbers.h"

namespace bgk::BGK_TARGET {

// The sums of one statistic: a maximum of its own, where it has one, and up to 4 others.
template <class F>
struct ExtraSums {
  Scalar<F> m;
  F x[4];
};

// What a statistic's last step reads: the maxima of the pair, with and without the label's column,
// and its logits there (-inf where it is not compared).
struct Finished {
  struct Maxima {
    double s, t;
  } all, without;
  double u_y, v_y;
};

// What a statistic's term of the gradient needs of a row: `offset` of an exponent, and factors,
// without which there is no term.
struct VjpTerm {
  float offset, x[3];

  BGK_HD bool active() const { return x[0] != 0.0f || x[1] != 0.0f || x[2] != 0.0f; }
};

// Hooks of the first read, for statistics without them. Sums are about the maxima m_s and m_t of
// both models' tempered logits, u and v.
struct Statistic {
  static constexpr bool kMaximum = false, kSecondRead = false;

  // Both maxima rose: by `by_s` and `by_t`, negative, or -inf where there was none.
  template <class F, class S>
  BGK_HD void raise(ExtraSums<F>&, S, S) const {}
  // Moves sums to a maximum of their own.
  template <class F, class S>
  BGK_HD void raise_own(ExtraSums<F>&, S) const {}
  // One more column; du = u - m_s, dv = v - m_t.
  template <class M, class F, class S>
  BGK_HD void absorb_column(ExtraSums<F>&, S, S, S, S) const {}

  // Kernels absorb a block of columns at a time, b.n of them with b.s(i) = u - m_s and
  // b.t(i) = v - m_t. Meanwhile a maximum of its own counts from that at both maxima, so that a
  // common offset of the logits takes no digits: raise_block() instead of raise(), and in the end
  // settle().
  template <class M, class Block>
  BGK_HD void absorb(ExtraSums<typename M::F>&, const Block&) const {}
  template <class F, class S>
  BGK_HD void raise_block(ExtraSums<F>&, S, S) const {}
  template <class F, class S>
  BGK_HD void settle(ExtraSums<F>&, S, S) const {}

  // The second read: adds a column, of log-probabilities.
  template <class M, class F>
  BGK_HD void add(F*, F, F) const {}
};

// a·u + b·v with 0 · (±inf) = 0; -inf where the column is absent from both models, whatever the
// signs of a and b.
template <class F, class S>
BGK_HD F tilt_exponent(S a, S b, F u, F v) {
  F w{};
  if (a != S{}) w += a * u;
  if (b != S{}) w += b * v;
  return (u == kNegInf) & (v == kNegInf) ? F{} + kNegInf : w;
}

// log Σ e^(a·u + b·v), and moments of u - v under its softmax. Sums d, k, q: Σ e^w·x^i with
// x = (u-m_s) - (v-m_t).
struct Tilt : Statistic {
  static constexpr int kKind = 0, kSums = 4, kFactors = 4;
  static constexpr bool kMaximum = true;
  double a, b, inverse_temperature;
  bool moments;

  BGK_HD Tilt(const Extra& x, const Spec& spec)
      : a(x.a), b(x.b), inverse_temperature(1.0 / spec.temperature), moments(x.moments) {}
  BGK_HD int fields() const { return moments ? 3 : 1; }
  BGK_HD bool reaches_student() const { return a != 0.0 || moments; }
  // Of the teacher's probabilities: its heaviest column is the teacher's.
  BGK_HD bool is_power() const { return a == 0.0 && b > 0.0 && !moments; }

  template <class F, class S>
  BGK_HD void raise(ExtraSums<F>& x, S by_s, S by_t) const {
    const F by = F{} + (by_s - by_t);
    const F more = times(x.x[1], 2.0f * by) + times(x.x[0], by * by);
    x.x[2] = x.x[2] == HUGE_VALF ? x.x[2] : x.x[2] + more;  // k may be infinite of either sign
    x.x[1] += times(x.x[0], by);
  }
  template <class F, class S>
  BGK_HD void raise_own(ExtraSums<F>& x, S m) const {
    const F weight = F{} + exp_of(moved(x.m, m));
    x.x[0] *= weight;
    x.x[1] = times(weight, x.x[1]), x.x[2] = times(weight, x.x[2]);
    x.m = m;
  }
  template <class M, class F, class S>
  BGK_HD void absorb_column(ExtraSums<F>& x, S u, S v, S du, S dv) const {
    const double w = tilt_exponent<double>(a, b, u, v);
    if (w > x.m) raise_own(x, (S)w);
    const S e = (S)::exp(w - shift(x.m)), gap = du - dv;
    x.x[0] += M::first(e);
    x.x[1] += M::first(times(e, gap)), x.x[2] += M::first(times(e, gap * gap));
  }

  template <class M, class Block>
  BGK_HD void absorb(ExtraSums<typename M::F>& x, const Block& block) const {
    typedef typename M::F F;
    const float a = (float)this->a, b = (float)this->b;
    F d{}, k{}, q{};
    if (is_power()) {
      if (x.m != 0.0f) raise_own(x, 0.0f);
      BGK_UNROLL
      for (int i = 0; i < block.n; i += M::kLanes) d += M::exp(b * block.t(i));
      x.x[0] += d;
      return;
    }
    F most = F{} + kNegInf;
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes)
      most = M::larger(most, tilt_exponent(a, b, block.s(i), block.t(i)));
    const float top = M::largest(most);
    if (top > x.m) raise_own(x, top);
    const float centre = shift(x.m);
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes) {
      const F s = block.s(i), t = block.t(i), gap = s - t;
      const F e = M::exp(tilt_exponent(a, b, s, t) - centre);
      d += e;
      if (moments) k += times(e, gap), q += times(e, gap * gap);
    }
    x.x[0] += d, x.x[1] += k, x.x[2] += q;
  }
  template <class F, class S>
  BGK_HD void raise_block(ExtraSums<F>& x, S by_s, S by_t) const {
    raise(x, by_s, by_t);
    x.m += tilt_exponent((S)a, (S)b, shift(by_s), shift(by_t));
  }
  template <class F, class S>
  BGK_HD void settle(ExtraSums<F>& x, S m_s, S m_t) const {
    if (is_power() && m_t == kNegInf) x.m = kNegInf;
    const double w = x.m + tilt_exponent<double>(a, b, shift(m_s), shift(m_t));
    x.m = (S)w;
    if (x.m - x.m != 0.0f) return;
    const F factor = F{} + (S)::exp(w - x.m);
    x.x[0] *= factor, x.x[1] = times(factor, x.x[1]), x.x[2] = times(factor, x.x[2]);
  }

  BGK_HD void finalize(const ExtraSums<double>& x, const ExtraSums<double>&, const Finished& row,
                       Column<double> out) const {
    out[0] = shift(x.m) + ::log(x.x[0]);
    if (!moments) return;
    const double centre = shift(row.all.s) - shift(row.all.t), mean = x.x[1] / x.x[0];
    out[1] = mean + centre, out[2] = x.x[2] / x.x[0] + centre * (2.0 * mean + centre);
  }
  // e^(a·u + b·v - lse)·(P0 + P1·x + P2·x²), x = u - v.
  BGK_HD void fold(Column<const double> y, Column<const double> g, Column<double> out,
                   double&) const {
    out[0] = y[0];
    out[1] = a * g[0] * inverse_temperature, out[2] = out[3] = 0.0;
    if (!moments) return;
    out[1] = (a * (g[0] - g[1] * y[1] - g[2] * y[2]) + g[1]) * inverse_temperature;
    out[2] = (a * g[1] + 2.0 * g[2]) * inverse_temperature;
    out[3] = a * g[2] * inverse_temperature;
  }
  BGK_HD VjpTerm prepare(Column<const double> factors, double lse_s, double lse_t,
                         double scale) const {
    const double gap = lse_s - lse_t;  // u - v = lp - lq + gap
    const double p0 = scale * factors[1], p1 = scale * factors[2], p2 = scale * factors[3];
    const double offset = tilt_exponent(a, b, lse_s, lse_t) - factors[0];
    if (!moments) return {(float)offset, {(float)p0, 0.0f, 0.0f}};
    return {(float)offset,
            {(float)(p0 + (p1 + p2 * gap) * gap), (float)(p1 + 2.0 * p2 * gap), (float)p2}};
  }
  template <class M, class F>
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const F gap = lp - lq, e = M::exp(tilt_exponent((float)a, (float)b, lp, lq) + y.offset);
    return times(e, moments ? y.x[0] + (y.x[1] + y.x[2] * gap) * gap : F{} + y.x[0]);
  }
};

// The distributions at a temperature of their own: with r = T / tau, sums d and h of
// Σ e^(r·(u-m_s))·(r·(u-m_s))^i, and the same of v.
struct Tempered : Statistic {
  static constexpr int kKind = 1, kSums = 4, kFactors = 3;
  double tau, temperature;

  BGK_HD Tempered(const Extra& x, const Spec& spec) : tau(x.a), temperature(spec.temperature) {}
  BGK_HD int fields() const { return 8; }
  BGK_HD bool reaches_student() const { return true; }
  template <class S>
  BGK_HD S ratio() const {
    return (S)temperature / (S)tau;
  }

  template <class F, class S>
  BGK_HD void raise(ExtraSums<F>& x, S by_s, S by_t) const {
    recentre(x.x[0], x.x[1], ratio<S>() * by_s);
    recentre(x.x[2], x.x[3], ratio<S>() * by_t);
  }
  template <class M, class F, class S>
  BGK_HD void absorb_column(ExtraSums<F>& x, S, S, S du, S dv) const {
    const S u = ratio<S>() * du, v = ratio<S>() * dv, e_s = exp_of(u), e_t = exp_of(v);
    x.x[0] += M::first(e_s), x.x[1] += M::first(times(e_s, u));
    x.x[2] += M::first(e_t), x.x[3] += M::first(times(e_t, v));
  }

  template <class M, class Block>
  BGK_HD void absorb(ExtraSums<typename M::F>& x, const Block& block) const {
    typedef typename M::F F;
    const float r = ratio<float>();
    F d_s{}, h_s{}, d_t{}, h_t{};
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes) {
      const F u = r * block.s(i), v = r * block.t(i), e_s = M::exp(u), e_t = M::exp(v);
      d_s += e_s, h_s += times(e_s, u);
      d_t += e_t, h_t += times(e_t, v);
    }
    x.x[0] += d_s, x.x[1] += h_s, x.x[2] += d_t, x.x[3] += h_t;
  }
  template <class F, class S>
  BGK_HD void raise_block(ExtraSums<F>& x, S by_s, S by_t) const {
    raise(x, by_s, by_t);
  }

  // lse, entropy, log p[label] and the largest probability of one model.
  BGK_HD void finalize_model(double m, double d, double h, double m_without, double d_without,
                             double logit, Column<double> out) const {
    const double r = ratio<double>(), log_d = ::log(d), lse = r * shift(m) + log_d;
    const double rest = times(d_without, ::exp(r * shift(m_without) - lse));
    out[0] = lse, out[1] = not_below_zero(log_d - h / d);
    out[2] = log_prob(rest, r * logit, lse), out[3] = 1.0 / d;
  }
  BGK_HD void finalize(const ExtraSums<double>& x, const ExtraSums<double>& without,
                       const Finished& row, Column<double> out) const {
    finalize_model(row.all.s, x.x[0], x.x[1], row.without.s, without.x[0], row.u_y, out);
    finalize_model(row.all.t, x.x[2], x.x[3], row.without.t, without.x[2], row.v_y, out.from(4));
  }
  // e^lp·(A + B·lp) with lp = r·u - lse, and `hot` at the label.
  BGK_HD void fold(Column<const double> y, Column<const double> g, Column<double> out,
                   double& hot) const {
    out[0] = y[0];
    out[1] = (g[0] - g[2] - times((double)g[1], (double)y[1])) / tau, out[2] = -g[1] / tau;
    hot += g[2] / tau;
  }
  BGK_HD VjpTerm prepare(Column<const double> factors, double lse_s, double, double scale) const {
    const double offset = ratio<double>() * lse_s - factors[0];
    return {(float)offset, {(float)(scale * factors[1]), (float)(scale * factors[2]), 0.0f}};
  }
  template <class M, class F>
  BGK_HD F term(const VjpTerm& y, F lp, F) const {
    const F x = ratio<float>() * lp + y.offset;
    return times(M::exp(x), y.x[0] + y.x[1] * x);
  }
};

// Beyond this |log p_t/p_s| one of the two is below e^-80 of the other.
constexpr float kLogRatioBound = 80.0f;

// KL(t ‖ m), KL(s ‖ m) and Σ p_s·p_t/m with m = omega·p_t + (1-omega)·p_s.
struct Mixture : Statistic {
  static constexpr int kKind = 2, kSums = 3, kFactors = 3;
  static constexpr bool kSecondRead = true;
  double omega, inverse_temperature;

  BGK_HD Mixture(const Extra& x, const Spec& spec)
      : omega(x.a), inverse_temperature(1.0 / spec.temperature) {}
  BGK_HD int fields() const { return 3; }
  BGK_HD bool reaches_student() const { return true; }

  template <class F>
  struct Ratios {
    F t, log_s, log_t;  // p_t/m, log(p_s/m), log(p_t/m)
  };
  // The larger probability's log-ratio is computed from expm1, the other one is the difference:
  // exact to first order where the models agree, and free of cancellation where they do not.
  template <class M, class F>
  BGK_HD Ratios<F> ratios(F lp, F lq) const {
    const float omega = (float)this->omega;
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
  template <class M, class F>
  BGK_HD void add(F* sums, F lp, F lq) const {
    const F p = M::exp(lp);
    const Ratios<F> x = ratios<M>(lp, lq);
    sums[0] += times(M::exp(lq), x.log_t);
    sums[1] += times(p, x.log_s), sums[2] += times(p, x.t);
  }

  BGK_HD void finalize(const ExtraSums<double>& x, const ExtraSums<double>&, const Finished&,
                       Column<double> out) const {
    out[0] = not_below_zero(x.x[0]), out[1] = not_below_zero(x.x[1]), out[2] = x.x[2];
  }
  // e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m)).
  BGK_HD void fold(Column<const double> y, Column<const double> g, Column<double> out,
                   double&) const {
    const double free = g[0] * (1.0 - omega) * y[2] - g[1] * (omega * y[2] + y[1]);
    out[0] = free * inverse_temperature;
    out[1] = (omega * g[1] - (1.0 - omega) * g[0]) * inverse_temperature;
    out[2] = g[1] * inverse_temperature;
  }
  BGK_HD VjpTerm prepare(Column<const double> factors, double, double, double scale) const {
    return {0.0f,
            {(float)(scale * factors[0]), (float)(scale * factors[1]),
             (float)(scale * factors[2])}};
  }
  template <class M, class F>
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const Ratios<F> x = ratios<M>(lp, lq);
    return times(M::exp(lp), y.x[0] + y.x[1] * x.t + y.x[2] * x.log_s);
  }
};

// ½ Σ |p_s - p_t|, and Σ p_s·sgn(p_s - p_t).
struct TotalVariation : Statistic {
  static constexpr int kKind = 3, kSums = 2, kFactors = 2;
  static constexpr bool kSecondRead = true;
  double inverse_temperature;

  BGK_HD TotalVariation(const Extra&, const Spec& spec)
      : inverse_temperature(1.0 / spec.temperature) {}
  BGK_HD int fields() const { return 2; }
  BGK_HD bool reaches_student() const { return true; }

  template <class M, class F>
  BGK_HD void add(F* sums, F lp, F lq) const {
    const F p = M::exp(lp), gap = p - M::exp(lq);
    sums[0] += 0.5f * gap * sign(gap), sums[1] += p * sign(gap);
  }

  BGK_HD void finalize(const ExtraSums<double>& x, const ExtraSums<double>&, const Finished&,
                       Column<double> out) const {
    out[0] = x.x[0], out[1] = x.x[1];
  }
  // e^lp·(V0 + V1·sgn(p_s - p_t)).
  BGK_HD void fold(Column<const double> y, Column<const double> g, Column<double> out,
                   double&) const {
    out[0] = -0.5 * g[0] * y[1] * inverse_temperature, out[1] = 0.5 * g[0] * inverse_temperature;
  }
  BGK_HD VjpTerm prepare(Column<const double> factors, double, double, double scale) const {
    return {0.0f, {(float)(scale * factors[0]), (float)(scale * factors[1]), 0.0f}};
  }
  template <class M, class F>
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const F p = M::exp(lp);
    return p * (y.x[0] + y.x[1] * sign(p - M::exp(lq)));
  }
};

// act(statistic) of an extra.
template <class Act>
BGK_HD auto with_statistic(const Spec& spec, int i, Act act) {
  const Extra& x = spec.extras[i];
  switch (x.kind) {
    case Tempered::kKind: return act(Tempered(x, spec));
    case Mixture::kKind: return act(Mixture(x, spec));
    case TotalVariation::kKind: return act(TotalVariation(x, spec));
    default: return act(Tilt(x, spec));
  }
}
constexpr int kKinds = 4;

// Where an extra's numbers begin, behind those of every row.
struct Offsets {
  int sums = 0, fields = 0, factors = 0;
};

// act(statistic, i, offsets) of all extras.
template <class Act>
BGK_HD Offsets each_extra(const Spec& spec, Act act) {
  Offsets at;
  for (int i = 0; i < spec.extra_count; ++i) {
    with_statistic(spec, i, [&](const auto& statistic) {
      act(statistic, i, at);
      at.sums += statistic.kSums, at.fields += statistic.fields();
      at.factors += statistic.kFactors;
    });
  }
  return at;
}

}  // namespace bgk::BGK_TARGET
