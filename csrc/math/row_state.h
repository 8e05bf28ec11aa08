// The running state of a pair of logits rows, for host and device. bgkernels/state.py defines its
// columns and the -inf rule. F is a float, or a vector of floats whose lanes are partial sums at
// common maxima. Include with BGK_TARGET defined: every build of this text lives in a namespace of
// its own, so that no linker can mix instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>

#include "row_args.h"

#ifndef BGK_TARGET
#error "define BGK_TARGET, the namespace of this build of the kernels"
#endif
#ifdef __CUDACC__
#define BGK_HD __host__ __device__ __forceinline__
#else
#define BGK_HD inline __attribute__((always_inline))
#endif

namespace bgk::BGK_TARGET {

constexpr float kNegInf = -HUGE_VALF;

// weight · x with 0 · (±inf) = 0; a NaN weight stays a NaN.
template <class F>
BGK_HD F times(F weight, F x) {
  return weight == 0.0f ? F{} : weight * x;
}

// The centre that belongs to a maximum: itself, or 0 for an empty state.
BGK_HD float shift(float m) { return m == kNegInf ? 0.0f : m; }

// How far sums centred at `from` move when they are centred at `to`; -inf for an empty state.
BGK_HD float moved(float from, float to) { return from == to ? 0.0f : from - to; }

template <class F>
struct PairSums {
  F d_s, h_s, k_s, d_t, h_t, k_t;
};

template <class F>
struct TiltState {
  float m;
  F d, k, q;
};

struct Label {
  int64_t column;
  float score, z, v;  // z real, v tempered
};

// The neutral element of merge() is empty_state().
template <class F>
struct RowState {
  float m_s, m_t, m_c;
  PairSums<F> pair;
  F d_c, z_sum;
  Label label;
  int64_t argmax_s, argmax_t;
  TiltState<F> tilts[kMaxTilts];
};

template <class F>
BGK_HD void empty_state(RowState<F>& x, int tilt_count) {
  x.m_s = x.m_t = x.m_c = kNegInf;
  x.pair = {}, x.d_c = x.z_sum = F{};
  x.label = {kNone, kNegInf, kNegInf, kNegInf};
  x.argmax_s = x.argmax_t = kNone;
  for (int i = 0; i < tilt_count; ++i) x.tilts[i] = {kNegInf, F{}, F{}, F{}};
}

// Visits the columns of a state in the order of bgkernels.rows.state.FLOATS, then TILT for each tilt.
template <class F, class Visit>
BGK_HD void each_column(RowState<F>& x, int tilt_count, Visit& visit) {
  visit(x.m_s), visit(x.pair.d_s), visit(x.pair.h_s), visit(x.pair.k_s);
  visit(x.m_t), visit(x.pair.d_t), visit(x.pair.h_t), visit(x.pair.k_t);
  visit(x.m_c), visit(x.d_c), visit(x.z_sum);
  visit(x.label.score), visit(x.label.z), visit(x.label.v);
  for (int i = 0; i < tilt_count; ++i) {
    TiltState<F>& tilt = x.tilts[i];
    visit(tilt.m), visit(tilt.d), visit(tilt.k), visit(tilt.q);
  }
}

template <class F>
BGK_HD void add(PairSums<F>& to, const PairSums<F>& x) {
  to.d_s += x.d_s, to.h_s += x.h_s, to.k_s += x.k_s;
  to.d_t += x.d_t, to.h_t += x.h_t, to.k_t += x.k_t;
}

template <class F>
BGK_HD void recentre(F& d, F& h, F& k, float by, float by_other) {
  const F weight = F{} + expf(by);
  h = times(weight, h + times(d, F{} + by));
  k = times(weight, k + times(d, F{} + (by - by_other)));
  d *= weight;
}

// Moves the sums by so much.
template <class F>
BGK_HD void recentre(PairSums<F>& x, float by_s, float by_t) {
  recentre(x.d_s, x.h_s, x.k_s, by_s, by_t);
  recentre(x.d_t, x.h_t, x.k_t, by_t, by_s);
}

// The moments of a tilt are of (u-m_s) - (v-m_t), whose origin moves by `step`.
template <class F>
BGK_HD void move_moments(TiltState<F>& tilt, float step) {
  const F by = F{} + step;
  const F more = times(tilt.k, 2.0f * by) + times(tilt.d, by * by);
  tilt.q = tilt.q == HUGE_VALF ? tilt.q : tilt.q + more;  // k may then be infinite of either sign
  tilt.k += times(tilt.d, by);
}

// Moves every sum that is centred at m_s and m_t to new maxima.
template <class F>
BGK_HD void raise_pair(RowState<F>& state, float m_s, float m_t, int tilt_count) {
  const float by_s = moved(state.m_s, m_s), by_t = moved(state.m_t, m_t);
  state.m_s = m_s, state.m_t = m_t;
  recentre(state.pair, by_s, by_t);
  for (int i = 0; i < tilt_count; ++i) move_moments(state.tilts[i], by_s - by_t);
}

template <class F>
BGK_HD void raise_hard(RowState<F>& state, float m_c) {
  state.d_c *= F{} + expf(moved(state.m_c, m_c));
  state.m_c = m_c;
}

template <class F>
BGK_HD void raise_tilt(TiltState<F>& tilt, float m) {
  const F weight = F{} + expf(moved(tilt.m, m));
  tilt.d *= weight;
  tilt.k = times(weight, tilt.k);
  tilt.q = times(weight, tilt.q);
  tilt.m = m;
}

// Whether a maximum `m` found at `column` replaces `best` at `argmax`; a tie goes to the lower
// column, as in torch.argmax.
BGK_HD bool beats(float m, int64_t column, float best, int64_t argmax) {
  return m > best || (m == best && m != kNegInf && (column < argmax || argmax == kNone));
}

// a·u + b·v with 0 · (±inf) = 0; -inf where the column is absent from both models, whatever the
// signs of a and b.
template <class F, class S>
BGK_HD F tilt_exponent(S a, S b, F u, F v) {
  F w{};
  if (a != S{}) w += a * u;
  if (b != S{}) w += b * v;
  return (u == kNegInf) & (v == kNegInf) ? F{} + kNegInf : w;
}

// Absorbs one column: real student logit z, tempered teacher logit v. M puts a number into a sum
// (M::first).
template <class M, class F>
BGK_HD void absorb_column(RowState<F>& state, int64_t column, float z, float v, const Spec& spec) {
  state.z_sum += M::first(z);
  if (!spec.shared_softmax) {
    if (z > state.m_c) raise_hard(state, z);
    state.d_c += M::first(expf(z - shift(state.m_c)));
  }
  if (column >= spec.compared) return;
  const float u = z * spec.inverse_temperature;
  if (beats(u, column, state.m_s, state.argmax_s)) state.argmax_s = column;
  if (beats(v, column, state.m_t, state.argmax_t)) state.argmax_t = column;
  raise_pair(state, fmaxf(state.m_s, u), fmaxf(state.m_t, v), spec.tilt_count);
  const float du = u - shift(state.m_s), dv = v - shift(state.m_t);
  const float e_s = expf(du), e_t = expf(dv);
  add(state.pair, {M::first(e_s), M::first(times(e_s, du)), M::first(times(e_s, du - dv)),
                   M::first(e_t), M::first(times(e_t, dv)), M::first(times(e_t, dv - du))});
  for (int i = 0; i < spec.tilt_count; ++i) {
    TiltState<F>& tilt = state.tilts[i];
    const double w = tilt_exponent<double>(spec.tilts[i].a, spec.tilts[i].b, u, v);
    if (w > tilt.m) raise_tilt(tilt, (float)w);
    const float e = (float)::exp(w - shift(tilt.m)), x = du - dv;
    tilt.d += M::first(e);
    tilt.k += M::first(times(e, x));
    tilt.q += M::first(times(e, x * x));
  }
}

// The better of two labels comes first; a tie goes to the lower column.
BGK_HD bool leads(const Label& x, const Label& y) {
  if (x.score != y.score) return x.score > y.score;
  return x.column != kNone && (x.column < y.column || y.column == kNone);
}

// The state of the union of two disjoint sets of columns, in `state`; `other` is used up. The label
// that loses is absorbed.
template <class M, class F>
BGK_HD void merge(RowState<F>& state, RowState<F>& other, const Spec& spec) {
  if (beats(other.m_s, other.argmax_s, state.m_s, state.argmax_s)) state.argmax_s = other.argmax_s;
  if (beats(other.m_t, other.argmax_t, state.m_t, state.argmax_t)) state.argmax_t = other.argmax_t;
  const float m_s = fmaxf(state.m_s, other.m_s), m_t = fmaxf(state.m_t, other.m_t);
  raise_pair(state, m_s, m_t, spec.tilt_count), raise_pair(other, m_s, m_t, spec.tilt_count);
  add(state.pair, other.pair);
  const float m_c = fmaxf(state.m_c, other.m_c);
  raise_hard(state, m_c), raise_hard(other, m_c);
  state.d_c += other.d_c, state.z_sum += other.z_sum;
  for (int i = 0; i < spec.tilt_count; ++i) {
    TiltState<F>&x = state.tilts[i], &y = other.tilts[i];
    const float m = fmaxf(x.m, y.m);
    raise_tilt(x, m), raise_tilt(y, m);
    x.d += y.d, x.k += y.k, x.q += y.q;
  }
  Label lost = other.label;
  if (leads(other.label, state.label)) lost = state.label, state.label = other.label;
  if (spec.rule != kIndex && lost.column != kNone)
    absorb_column<M>(state, lost.column, lost.z, lost.v, spec);
}

}  // namespace bgk::BGK_TARGET
