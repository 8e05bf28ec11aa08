// The extra statistics of bgkernels/rows/extras.py, which derives the formulas: one struct a
// statistic, with all that it does in any kernel. A new one is a struct here and a line of
// with_statistic().
#pragma once

#include "math/numbers.h"

namespace bgk::BGK_TARGET {

typedef Column<const double> In;
typedef Column<double> Out;

// The sums of one statistic: a maximum of its own, where it has one, and up to 4 others.
template <class M>
struct ExtraSums {
  typename M::S m;
  typename M::F x[4];
};

struct DoubleMath {
  typedef double F;
  typedef double S;
  static BGK_HD double first(double x) { return x; }
};
typedef ExtraSums<DoubleMath> Totals;

// What the last step reads: maxima with and without the label's column, and its tempered logits,
// -inf where it is not compared.
struct Finished {
  double m_s, m_t, m_s_without, m_t_without, u_y, v_y;
};

// What a term of the gradient needs of a row: `offset` of an exponent, and factors, all zero where
// there is no term.
struct VjpTerm {
  float offset, x[3];

  BGK_HD VjpTerm scaled(float by) const { return {offset, {by * x[0], by * x[1], by * x[2]}}; }
  BGK_HD bool active() const { return x[0] != 0.0f || x[1] != 0.0f || x[2] != 0.0f; }
};

// Hooks that a statistic may do without. Its sums are about the maxima m_s and m_t of both models'
// tempered logits u and v, with du = u - m_s and dv = v - m_t, and a maximum of its own counts from
// that at both: a common offset of the logits takes no digits.
template <class M>
struct Statistic {
  typedef typename M::F F;
  typedef typename M::S S;
  typedef ExtraSums<M> Sums;
  static constexpr bool kMaximum = false, kSecondRead = false;
  const Spec& spec;

  // b where the only sum is Σ e^(b·v), else 0: kernels keep that one in a register.
  BGK_HD double power() const { return 0.0; }
  // Whether it has a term in the gradient.
  BGK_HD bool reaches_student() const { return true; }
  // Both maxima rise: by_s and by_t are the old ones minus the new, -inf where there was none.
  BGK_HD void raise(Sums&, S, S) const {}
  // Its own maximum rises.
  BGK_HD void raise_own(Sums&, S) const {}
  // Its own maximum from that at both maxima to 0 (`sign` 1), or back (-1).
  BGK_HD void rebase(Sums&, S, S, int) const {}
  // First read: one column, or a block of b.n columns, b.du(i) and b.dv(i).
  BGK_HD void absorb_column(Sums&, S, S) const {}
  template <class Block>
  BGK_HD void absorb(Sums&, const Block&) const {}
  // Second read: columns of log-probabilities.
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

// log Σ e^w with w = a·u + b·v, and moments of u - v under its softmax: m = max w, and
// Σ e^(w-m)·(du-dv)^i.
template <class M>
struct Tilt : Statistic<M> {
  using typename Statistic<M>::F, typename Statistic<M>::S, typename Statistic<M>::Sums;
  static constexpr int kKind = 0, kSums = 4, kFactors = 4;
  static constexpr bool kMaximum = true;
  double a, b;
  bool moments;

  BGK_HD Tilt(const Extra& x, const Spec& spec)
      : Statistic<M>{spec}, a(x.a), b(x.b), moments(x.moments) {}
  BGK_HD int fields() const { return moments ? 3 : 1; }
  BGK_HD bool reaches_student() const { return a != 0.0 || moments; }
  BGK_HD double power() const { return a == 0.0 && b > 0.0 && !moments ? b : 0.0; }
  template <class T>
  BGK_HD T exponent(T u, T v) const {
    return tilt_exponent((S)a, (S)b, u, v);
  }

  BGK_HD void raise(Sums& x, S by_s, S by_t) const {
    const F by = F{} + (by_s - by_t);
    const F more = times(x.x[1], 2.0f * by) + times(x.x[0], by * by);
    x.x[2] = x.x[2] == HUGE_VALF ? x.x[2] : x.x[2] + more;  // k may be infinite of either sign
    x.x[1] += times(x.x[0], by);
    x.m += exponent(shift(by_s), shift(by_t));
  }
  BGK_HD void scale(Sums& x, F weight) const {
    x.x[0] *= weight, x.x[1] = times(weight, x.x[1]), x.x[2] = times(weight, x.x[2]);
  }
  BGK_HD void raise_own(Sums& x, S m) const {
    scale(x, F{} + exp_of(moved(x.m, m)));
    x.m = m;
  }
  BGK_HD void rebase(Sums& x, S m_s, S m_t, int sign) const {
    if (m_t == kNegInf && power() != 0.0) x.m = kNegInf;
    const double m = x.m + sign * tilt_exponent<double>(a, b, shift(m_s), shift(m_t));
    x.m = (S)m;
    if (x.m - x.m == 0.0f) scale(x, F{} + (S)::exp(m - x.m));
  }
  BGK_HD void absorb_column(Sums& x, S du, S dv) const {
    const S w = exponent(du, dv), gap = du - dv;
    if (w > x.m) raise_own(x, w);
    const S e = exp_of(w - shift(x.m));
    x.x[0] += M::first(e);
    x.x[1] += M::first(times(e, gap)), x.x[2] += M::first(times(e, gap * gap));
  }
  template <class Block>
  BGK_HD void absorb(Sums& x, const Block& block) const {
    F d{}, k{}, q{}, most = F{} + kNegInf;
    if (power() != 0.0) {  // its heaviest column is the teacher's
      if (x.m != 0.0f) raise_own(x, 0.0f);
      BGK_UNROLL
      for (int i = 0; i < block.n; i += M::kLanes) d += M::exp((S)b * block.dv(i));
      x.x[0] += d;
      return;
    }
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes)
      most = M::larger(most, exponent(block.du(i), block.dv(i)));
    if (M::largest(most) > x.m) raise_own(x, M::largest(most));
    const S centre = shift(x.m);
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes) {
      const F du = block.du(i), dv = block.dv(i), gap = du - dv;
      const F e = M::exp(exponent(du, dv) - centre);
      d += e;
      if (moments) k += times(e, gap), q += times(e, gap * gap);
    }
    x.x[0] += d, x.x[1] += k, x.x[2] += q;
  }

  BGK_HD void finalize(const Totals& x, const Totals&, const Finished& row, Out out) const {
    const double c_s = shift(row.m_s), c_t = shift(row.m_t), mean = x.x[1] / x.x[0];
    out[0] = shift(x.m) + tilt_exponent(a, b, c_s, c_t) + ::log(x.x[0]);
    if (!moments) return;
    const double centre = c_s - c_t;
    out[1] = mean + centre, out[2] = x.x[2] / x.x[0] + centre * (2.0 * mean + centre);
  }
  // e^(w-lse)·(P0 + P1·x + P2·x²), x = u - v.
  BGK_HD void fold(In y, In g, Out out, double&) const {
    const double inv = this->spec.inverse;
    out[0] = y[0], out[1] = a * g[0] * inv, out[2] = out[3] = 0.0;
    if (!moments) return;
    out[1] = (a * (g[0] - g[1] * y[1] - g[2] * y[2]) + g[1]) * inv;
    out[2] = (a * g[1] + 2.0 * g[2]) * inv, out[3] = a * g[2] * inv;
  }
  BGK_HD VjpTerm prepare(In factors, double lse_s, double lse_t) const {
    const double gap = lse_s - lse_t;  // u - v = lp - lq + gap
    const double p0 = factors[1], p1 = factors[2], p2 = factors[3];
    const float offset = (float)(tilt_exponent(a, b, lse_s, lse_t) - factors[0]);
    if (!moments) return {offset, {(float)p0, 0.0f, 0.0f}};
    return {offset, {(float)(p0 + (p1 + p2 * gap) * gap), (float)(p1 + 2.0 * p2 * gap), (float)p2}};
  }
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const F gap = lp - lq, e = M::exp(exponent(lp, lq) + y.offset);
    return times(e, moments ? y.x[0] + (y.x[1] + y.x[2] * gap) * gap : F{} + y.x[0]);
  }
};

// Each distribution at a temperature of its own: with r = T / tau, Σ e^(r·du)·(r·du)^i, and the
// same of the teacher.
template <class M>
struct Tempered : Statistic<M> {
  using typename Statistic<M>::F, typename Statistic<M>::S, typename Statistic<M>::Sums;
  static constexpr int kKind = 1, kSums = 4, kFactors = 3;
  double tau;

  BGK_HD Tempered(const Extra& x, const Spec& spec) : Statistic<M>{spec}, tau(x.a) {}
  BGK_HD int fields() const { return 8; }
  BGK_HD S ratio() const { return (S)this->spec.temperature / (S)tau; }

  BGK_HD void raise(Sums& x, S by_s, S by_t) const {
    recentre(x.x[0], x.x[1], ratio() * by_s), recentre(x.x[2], x.x[3], ratio() * by_t);
  }
  BGK_HD void absorb_column(Sums& x, S du, S dv) const {
    const S u = ratio() * du, v = ratio() * dv, e_s = exp_of(u), e_t = exp_of(v);
    x.x[0] += M::first(e_s), x.x[1] += M::first(times(e_s, u));
    x.x[2] += M::first(e_t), x.x[3] += M::first(times(e_t, v));
  }
  template <class Block>
  BGK_HD void absorb(Sums& x, const Block& block) const {
    const S r = ratio();
    F d_s{}, h_s{}, d_t{}, h_t{};
    BGK_UNROLL
    for (int i = 0; i < block.n; i += M::kLanes) {
      const F u = r * block.du(i), v = r * block.dv(i), e_s = M::exp(u), e_t = M::exp(v);
      d_s += e_s, h_s += times(e_s, u);
      d_t += e_t, h_t += times(e_t, v);
    }
    x.x[0] += d_s, x.x[1] += h_s, x.x[2] += d_t, x.x[3] += h_t;
  }

  BGK_HD void finalize(const Totals& x, const Totals& without, const Finished& row, Out out) const {
    finalize_model(row.m_s, x.x, row.m_s_without, without.x, row.u_y, out);
    finalize_model(row.m_t, x.x + 2, row.m_t_without, without.x + 2, row.v_y, out.from(4));
  }
  BGK_HD void finalize_model(double m, const double* sums, double m_without, const double* without,
                             double logit, Out out) const {
    const double r = ratio(), log_d = ::log(sums[0]), lse = r * shift(m) + log_d;
    const double rest = times(without[0], ::exp(r * shift(m_without) - lse));
    out[0] = lse, out[1] = not_below_zero(log_d - sums[1] / sums[0]);
    out[2] = log_prob(rest, r * logit, lse), out[3] = 1.0 / sums[0];
  }
  // e^lp·(A + B·lp) with lp = r·u - lse, and 1 at the label.
  BGK_HD void fold(In y, In g, Out out, double& hot) const {
    const double inv = 1.0 / tau;
    out[0] = y[0], out[1] = (g[0] - g[2] - times<double>(g[1], y[1])) * inv, out[2] = -g[1] * inv;
    hot += g[2] * inv;
  }
  BGK_HD VjpTerm prepare(In factors, double lse_s, double) const {
    const double offset = this->spec.temperature / tau * lse_s - factors[0];
    return {(float)offset, {(float)factors[1], (float)factors[2], 0.0f}};
  }
  BGK_HD F term(const VjpTerm& y, F lp, F) const {
    const F x = ratio() * lp + y.offset;
    return times(M::exp(x), y.x[0] + y.x[1] * x);
  }
};

// Beyond this |log p_t/p_s| one of the two is below e^-80 of the other.
constexpr float kLogRatioBound = 80.0f;

// KL(t ‖ m), KL(s ‖ m) and Σ p_s·p_t/m with m = omega·p_t + (1-omega)·p_s.
template <class M>
struct Mixture : Statistic<M> {
  using typename Statistic<M>::F;
  static constexpr int kKind = 2, kSums = 3, kFactors = 3;
  static constexpr bool kSecondRead = true;
  double omega;

  BGK_HD Mixture(const Extra& x, const Spec& spec) : Statistic<M>{spec}, omega(x.a) {}
  BGK_HD int fields() const { return 3; }

  struct Ratios {
    F t, log_s, log_t;  // p_t/m, log(p_s/m), log(p_t/m)
  };
  // The larger probability's log-ratio is computed from expm1, the other one is the difference:
  // exact to first order where the models agree, and free of cancellation where they do not.
  BGK_HD Ratios ratios(F lp, F lq) const {
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
  BGK_HD void add(F* sums, F lp, F lq) const {
    const F p = M::exp(lp);
    const Ratios x = ratios(lp, lq);
    sums[0] += times(M::exp(lq), x.log_t);
    sums[1] += times(p, x.log_s), sums[2] += times(p, x.t);
  }

  BGK_HD void finalize(const Totals& x, const Totals&, const Finished&, Out out) const {
    out[0] = not_below_zero(x.x[0]), out[1] = not_below_zero(x.x[1]), out[2] = x.x[2];
  }
  // e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m)).
  BGK_HD void fold(In y, In g, Out out, double&) const {
    const double g_tm = g[0] * this->spec.inverse, g_sm = g[1] * this->spec.inverse;
    out[0] = g_tm * (1.0 - omega) * y[2] - g_sm * (omega * y[2] + y[1]);
    out[1] = omega * g_sm - (1.0 - omega) * g_tm, out[2] = g_sm;
  }
  BGK_HD VjpTerm prepare(In factors, double, double) const {
    return {0.0f, {(float)factors[0], (float)factors[1], (float)factors[2]}};
  }
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const Ratios x = ratios(lp, lq);
    return times(M::exp(lp), y.x[0] + y.x[1] * x.t + y.x[2] * x.log_s);
  }
};

// ½ Σ |p_s - p_t|, and Σ p_s·sgn(p_s - p_t).
template <class M>
struct TotalVariation : Statistic<M> {
  using typename Statistic<M>::F;
  static constexpr int kKind = 3, kSums = 2, kFactors = 2;
  static constexpr bool kSecondRead = true;

  BGK_HD TotalVariation(const Extra&, const Spec& spec) : Statistic<M>{spec} {}
  BGK_HD int fields() const { return 2; }

  BGK_HD void add(F* sums, F lp, F lq) const {
    const F p = M::exp(lp), gap = p - M::exp(lq);
    sums[0] += 0.5f * gap * sign(gap), sums[1] += p * sign(gap);
  }

  BGK_HD void finalize(const Totals& x, const Totals&, const Finished&, Out out) const {
    out[0] = x.x[0], out[1] = x.x[1];
  }
  // e^lp·(V0 + V1·sgn(p_s - p_t)).
  BGK_HD void fold(In y, In g, Out out, double&) const {
    const double half = 0.5 * g[0] * this->spec.inverse;
    out[0] = -half * y[1], out[1] = half;
  }
  BGK_HD VjpTerm prepare(In factors, double, double) const {
    return {0.0f, {(float)factors[0], (float)factors[1], 0.0f}};
  }
  BGK_HD F term(const VjpTerm& y, F lp, F lq) const {
    const F p = M::exp(lp);
    return p * (y.x[0] + y.x[1] * sign(p - M::exp(lq)));
  }
};

constexpr int kKinds = 4;

// act(statistic) of an extra.
BGK_ANY_SIDE
template <class M, class Act>
BGK_HD auto with_statistic(const Spec& spec, int i, Act act) {
  const Extra& x = spec.extras[i];
  if (x.kind == Tempered<M>::kKind) return act(Tempered<M>(x, spec));
  if (x.kind == Mixture<M>::kKind) return act(Mixture<M>(x, spec));
  if (x.kind == TotalVariation<M>::kKind) return act(TotalVariation<M>(x, spec));
  return act(Tilt<M>(x, spec));
}

// Where an extra's numbers begin, behind those of every row.
struct Offsets {
  int sums = kFloatColumns, fields = kFields, factors = kCoefficients;
};

// act(statistic, i, offsets) of all extras; where the numbers end.
BGK_ANY_SIDE
template <class M, class Act>
BGK_HD Offsets each_extra(const Spec& spec, Act act) {
  Offsets at;
  for (int i = 0; i < spec.extra_count; ++i) {
    with_statistic<M>(spec, i, [&](const auto& statistic) {
      act(statistic, i, at);
      at.sums += statistic.kSums, at.fields += statistic.fields();
      at.factors += statistic.kFactors;
    });
  }
  return at;
}

}  // namespace bgk::BGK_TARGET
