// The running state of a pair of logits rows. bgkernels/rows/state.py defines its columns and the
// -inf rule. In a vector F, lanes are partial sums at common maxima.
#pragma once

#include "math/extras.h"

namespace bgk::BGK_TARGET {

template <class F>
struct PairSums {
  F d_s, h_s, k_s, d_t, h_t, k_t;
};

template <class S>
struct Label {
  int64_t column;
  S score, z, v;  // z real, v tempered
};

// The neutral element of merge() is empty_state().
template <class M>
struct RowState {
  typedef typename M::F F;
  typedef typename M::S S;
  S m_s, m_t, m_c;
  PairSums<F> pair;
  F d_c, z_sum;
  Label<S> label;
  int64_t argmax_s, argmax_t;
  ExtraSums<M> extras[kMaxExtras];
};

template <class M>
BGK_HD void empty_state(RowState<M>& x, const Spec& spec) {
  x.m_s = x.m_t = x.m_c = kNegInf;
  x.pair = {}, x.d_c = x.z_sum = typename M::F{};
  x.label = {kNone, kNegInf, kNegInf, kNegInf};
  x.argmax_s = x.argmax_t = kNone;
  for (int i = 0; i < spec.extra_count; ++i) x.extras[i] = {kNegInf, {}};
}

// Visits the columns of a state but those of its extras, in the order of bgkernels.rows.spec.FLOATS
// and INTS.
template <class M, class Visit>
BGK_HD void each_column(RowState<M>& x, Visit& visit) {
  visit.number(x.m_s), visit.sum(x.pair.d_s), visit.sum(x.pair.h_s), visit.sum(x.pair.k_s);
  visit.number(x.m_t), visit.sum(x.pair.d_t), visit.sum(x.pair.h_t), visit.sum(x.pair.k_t);
  visit.number(x.m_c), visit.sum(x.d_c), visit.sum(x.z_sum);
  visit.number(x.label.score), visit.number(x.label.z), visit.number(x.label.v);
  visit.index(x.label.column), visit.index(x.argmax_s), visit.index(x.argmax_t);
}

template <class Statistic, class M, class Visit>
BGK_HD void each_column(const Statistic& statistic, ExtraSums<M>& x, Visit& visit) {
  if (statistic.kMaximum) visit.number(x.m);
  for (int k = 0; k < statistic.kSums - statistic.kMaximum; ++k) visit.sum(x.x[k]);
}

template <class M>
struct Reader {
  Column<float> floats;
  Column<int64_t> ints;

  BGK_HD void number(typename M::S& x) { x = floats.next(); }
  BGK_HD void sum(typename M::F& x) { x = M::first(floats.next()); }
  BGK_HD void index(int64_t& x) { x = ints.next(); }
};

template <class M>
struct Writer {
  Column<float> floats;
  Column<int64_t> ints;

  BGK_HD void number(typename M::S x) { floats.next() = x; }
  BGK_HD void sum(typename M::F x) { floats.next() = M::total(x); }
  BGK_HD void index(int64_t x) { ints.next() = x; }
};

template <class M>
BGK_HD void load_state(RowState<M>& x, const State& from, int64_t row, const Spec& spec) {
  Reader<M> read = {{from.floats, row}, {from.ints, row}};
  each_column(x, read);
  each_extra<M>(spec, [&](const auto& statistic, int i, const Offsets&) {
    each_column(statistic, x.extras[i], read);
    statistic.rebase(x.extras[i], x.m_s, x.m_t, -1);
  });
}

template <class M>
BGK_HD void store_state(RowState<M>& x, const State& to, int64_t row, const Spec& spec) {
  Writer<M> write = {{to.floats, row}, {to.ints, row}};
  each_column(x, write);
  each_extra<M>(spec, [&](const auto& statistic, int i, const Offsets&) {
    statistic.rebase(x.extras[i], x.m_s, x.m_t, 1);
    each_column(statistic, x.extras[i], write);
  });
}

template <class F>
BGK_HD void add(PairSums<F>& to, const PairSums<F>& x) {
  to.d_s += x.d_s, to.h_s += x.h_s, to.k_s += x.k_s;
  to.d_t += x.d_t, to.h_t += x.h_t, to.k_t += x.k_t;
}

template <class F, class S>
BGK_HD void recentre(F& d, F& h, F& k, S by, S by_other) {
  const F weight = F{} + exp_of(by);
  h = times(weight, h + times(d, F{} + by));
  k = times(weight, k + times(d, F{} + (by - by_other)));
  d *= weight;
}

// Moves the sums by so much.
template <class F, class S>
BGK_HD void recentre(PairSums<F>& x, S by_s, S by_t) {
  recentre(x.d_s, x.h_s, x.k_s, by_s, by_t);
  recentre(x.d_t, x.h_t, x.k_t, by_t, by_s);
}

// Moves every sum that is centred at m_s and m_t to new maxima.
template <class M, class S>
BGK_HD void raise_pair(RowState<M>& state, S m_s, S m_t, const Spec& spec) {
  const S by_s = moved(state.m_s, m_s), by_t = moved(state.m_t, m_t);
  state.m_s = m_s, state.m_t = m_t;
  recentre(state.pair, by_s, by_t);
  for (int i = 0; i < spec.extra_count; ++i)
    with_statistic<M>(spec, i, [&](const auto& x) { x.raise(state.extras[i], by_s, by_t); });
}

template <class M, class S>
BGK_HD void raise_hard(RowState<M>& state, S m_c) {
  state.d_c *= typename M::F{} + exp_of(moved(state.m_c, m_c));
  state.m_c = m_c;
}

// Whether a maximum `m` found at `column` replaces `best` at `argmax`; a tie goes to the lower
// column, as in torch.argmax.
template <class S>
BGK_HD bool beats(S m, int64_t column, S best, int64_t argmax) {
  return m > best || (m == best && m != kNegInf && (column < argmax || argmax == kNone));
}

template <class S>
BGK_HD S inverse_temperature(const Spec& spec) {
  return sizeof(S) == sizeof(double) ? (S)spec.inverse : (S)spec.inverse_temperature;
}

// Absorbs one column: real student logit z, tempered teacher logit v.
template <class M, class S>
BGK_HD void absorb_column(RowState<M>& state, int64_t column, S z, S v, const Spec& spec) {
  state.z_sum += M::first(z);
  if (!spec.shared_softmax) {
    if (z > state.m_c) raise_hard(state, z);
    state.d_c += M::first(exp_of(z - shift(state.m_c)));
  }
  if (column >= spec.compared) return;
  const S u = z * inverse_temperature<S>(spec);
  if (beats(u, column, state.m_s, state.argmax_s)) state.argmax_s = column;
  if (beats(v, column, state.m_t, state.argmax_t)) state.argmax_t = column;
  raise_pair(state, larger(state.m_s, u), larger(state.m_t, v), spec);
  const S du = u - shift(state.m_s), dv = v - shift(state.m_t);
  const S e_s = exp_of(du), e_t = exp_of(dv);
  add(state.pair, {M::first(e_s), M::first(times(e_s, du)), M::first(times(e_s, du - dv)),
                   M::first(e_t), M::first(times(e_t, dv)), M::first(times(e_t, dv - du))});
  for (int i = 0; i < spec.extra_count; ++i)
    with_statistic<M>(spec, i, [&](const auto& x) { x.absorb_column(state.extras[i], du, dv); });
}

// The better of two labels comes first; a tie goes to the lower column.
template <class S>
BGK_HD bool leads(const Label<S>& x, const Label<S>& y) {
  if (x.score != y.score) return x.score > y.score;
  return x.column != kNone && (x.column < y.column || y.column == kNone);
}

// The state of the union of two disjoint sets of columns, in `state`; `other` is used up. The label
// that loses is absorbed.
template <class M>
BGK_HD void merge(RowState<M>& state, RowState<M>& other, const Spec& spec) {
  if (beats(other.m_s, other.argmax_s, state.m_s, state.argmax_s)) state.argmax_s = other.argmax_s;
  if (beats(other.m_t, other.argmax_t, state.m_t, state.argmax_t)) state.argmax_t = other.argmax_t;
  const auto m_s = larger(state.m_s, other.m_s), m_t = larger(state.m_t, other.m_t);
  raise_pair(state, m_s, m_t, spec), raise_pair(other, m_s, m_t, spec);
  add(state.pair, other.pair);
  const auto m_c = larger(state.m_c, other.m_c);
  raise_hard(state, m_c), raise_hard(other, m_c);
  state.d_c += other.d_c, state.z_sum += other.z_sum;
  each_extra<M>(spec, [&](const auto& statistic, int i, const Offsets&) {
    ExtraSums<M>&x = state.extras[i], &y = other.extras[i];
    const auto m = larger(x.m, y.m);
    statistic.raise_own(x, m), statistic.raise_own(y, m);
    for (int k = 0; k < statistic.kSums - statistic.kMaximum; ++k) x.x[k] += y.x[k];
  });
  auto lost = other.label;
  if (leads(other.label, state.label)) lost = state.label, state.label = other.label;
  if (spec.rule != kIndex && lost.column != kNone)
    absorb_column(state, lost.column, lost.z, lost.v, spec);
}

}  // namespace bgk::BGK_TARGET
