// Pass 1: rows of logits into running states.
#pragma once

#include "cpu/blocks.h"
#include "cpu/code.inl"
#include "cpu/vec_math.h"
#include "math/row_state.h"

namespace bgk::BGK_TARGET {

typedef RowState<VecMath> VecState;
typedef PairSums<Vec> Sums;

struct Scratch {
  alignas(64) float z[kBlock], v[kBlock], w[kBlock];
};

// A run of columns that are all compared, or all not.
struct Block {
  Source z, v;
  int n;
  bool compared;
  int64_t first, row;  // of the whole input
  float z_max = kNegInf, v_max = kNegInf;

  void find_maxima() {
    z_max = block_max(z.x, padded(n));
    if (compared) v_max = block_max(v.x, padded(n));
  }
};

// Scores of the columns as candidates for the label, or null if none of them can win.
inline const float* scores(const Spec& spec, const Block& b, float best, float* scratch) {
  if (spec.rule == kArgmax) return b.v.x;
  // Few draws are lucky enough to win. For the others no logarithm is taken, and in blocks of
  // unlikely columns none is drawn.
  const int32_t least = least_draw(b.v_max, best);
  if (least >= 1 << 23) return nullptr;
  for (int i = 0; i < b.n; i += kStreams * kLanes) {
    IVec draws[kStreams], lucky{};
    philox((uint32_t)(b.first + i), (uint32_t)b.row, spec.key, draws);
    for (int k = 0; k < kStreams; ++k) lucky |= draws[k] >= least;
    const bool some = any(lucky);
    for (int k = 0; k < kStreams && i + k * kLanes < b.n; ++k) {
      const int at = i + k * kLanes;
      store(scratch + at, some ? b.v.at(at) + gumbel(draws[k]) : splat(kNegInf));
    }
  }
  return scratch;
}

// Position of the label in the block if it is there, else -1; a label that it displaces is
// absorbed.
inline int choose_label(VecState& state, const Spec& spec, const Block& b, int64_t given,
                        Scratch& scratch) {
  if (spec.rule == kIndex) {
    const int64_t at = given - b.first;
    if (at < 0 || at >= b.n) return -1;
    state.label.score = 0.0f;
    return (int)at;
  }
  const float* s = b.compared ? scores(spec, b, state.label.score, scratch.w) : nullptr;
  if (!s) return -1;
  const float best = block_max(s, padded(b.n));
  const Label<float>& held = state.label;
  if (best < held.score || (best == held.score && held.column != kNone && held.column < b.first))
    return -1;
  const int at = first_index(s, padded(b.n), best);
  if (held.column != kNone) absorb_column(state, held.column, held.z, held.v, spec);
  state.label.score = best;
  return at;
}

inline void hold_out(VecState& state, const Spec& spec, Block& b, int at, Scratch& scratch) {
  state.label.column = b.first + at;
  state.label.z = b.z.x[at];
  writable(b.z, padded(b.n), scratch.z)[at] = kNegInf;
  state.label.v = kNegInf;
  if (b.compared) {
    state.label.v = b.v.x[at] * spec.inverse_temperature;
    writable(b.v, padded(b.n), scratch.v)[at] = kNegInf;
  }
  b.find_maxima();
}

// One model's tempered logits about a centre.
struct Centred {
  Source from;
  float scale, centre;

  BGK_INLINE Vec at(int i) const { return from.at(i) * scale - centre; }
};

// Sums over some compared columns of a block. kPlain: no column is absent; where one is, the result
// is not finite and the careful loop has to decide. Not inlined: it needs all registers, and amid
// other code GCC spills the sums.
template <bool kPlain>
__attribute__((noinline)) Sums pair_sums(Centred s, Centred t, int begin, int end) {
  Sums x{};
  for (int i = begin; i < end; i += kLanes) {
    s.from.fetch_ahead(i), t.from.fetch_ahead(i);
    const Vec u = s.at(i), v = t.at(i), gap = u - v;
    const Vec e_s = kPlain ? exp_floored(u) : exp(u), e_t = kPlain ? exp_floored(v) : exp(v);
    x.d_s += e_s, x.d_t += e_t;
    x.h_s += kPlain ? e_s * u : times(e_s, u);
    x.h_t += kPlain ? e_t * v : times(e_t, v);
    x.k_s += kPlain ? e_s * gap : times(e_s, gap);
    x.k_t -= kPlain ? e_t * gap : times(e_t, gap);
  }
  return x;
}

BGK_INLINE bool finite(const Sums& x) {
  const Vec all = (x.h_s + x.h_t) + (x.k_s + x.k_t);
  return !any(all - all != 0.0f);
}

// The same, whatever the block holds. Care is needed for the label's vector (`at` < 0: none), for
// the one that the padding completes, and from where plain sums failed on: `careful` is set there.
inline Sums block_sums(const Centred& s, const Centred& t, int n, int at, bool& careful) {
  if (careful) return pair_sums<false>(s, t, 0, n);
  const int whole = n & -kLanes, cut = at < 0 || at >= whole ? whole : at & -kLanes;
  Sums x = pair_sums<true>(s, t, 0, cut);
  if (cut < whole) add(x, pair_sums<true>(s, t, cut + kLanes, whole));
  if (!finite(x)) {
    careful = true;
    return pair_sums<false>(s, t, 0, n);
  }
  if (cut < whole) add(x, pair_sums<false>(s, t, cut, cut + kLanes));
  if (whole < n) add(x, pair_sums<false>(s, t, whole, n));
  return x;
}

inline Vec hard_sum(Source z, int n, float centre) {
  Vec sum{};
  for (int i = 0; i < n; i += kLanes) {
    z.fetch_ahead(i);
    sum += exp(z.at(i) - centre);
  }
  return sum;
}

// A block as math/extras.h takes it.
struct CentredBlock {
  Centred s, t;
  int n;

  BGK_INLINE Vec du(int i) const { return s.at(i); }
  BGK_INLINE Vec dv(int i) const { return t.at(i); }
};

template <class Statistic>
__attribute__((noinline)) void absorb_extra(const Statistic& statistic, const CentredBlock& block,
                                            ExtraSums<VecMath>& sums) {
  statistic.absorb(sums, block);
}

// `at`: where the label is held out, or -1.
inline void absorb_pair(VecState& state, const Spec& spec, const Block& b, int at, bool& careful) {
  const float u_max = b.z_max * spec.inverse_temperature;
  const float v_max = b.v_max * spec.inverse_temperature;
  if (beats(u_max, b.first, state.m_s, state.argmax_s))
    state.argmax_s = b.first + first_index(b.z.x, padded(b.n), b.z_max);
  if (beats(v_max, b.first, state.m_t, state.argmax_t))
    state.argmax_t = b.first + first_index(b.v.x, padded(b.n), b.v_max);
  if (u_max > state.m_s || v_max > state.m_t)
    raise_pair(state, larger(state.m_s, u_max), larger(state.m_t, v_max), spec);
  const Centred s = {b.z, spec.inverse_temperature, shift(state.m_s)};
  const Centred t = {b.v, spec.inverse_temperature, shift(state.m_t)};
  const bool tempered = spec.inverse_temperature != 1.0f;
  const Sums x = block_sums(s, t, b.n, at, careful);
  add(state.pair, x);
  // At T = 1 the cross-entropy's terms are the comparison's, about another maximum.
  if (tempered) {
    state.d_c += hard_sum(b.z, b.n, shift(state.m_c));
  } else if (!spec.shared_softmax) {
    state.d_c += times(x.d_s, splat(expf(s.centre - shift(state.m_c))));
  }
  each_extra<VecMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
    if (!statistic.kSecondRead) absorb_extra(statistic, {s, t, b.n}, state.extras[i]);
  });
}

inline Vec sum_except(const Block& b, int at) {
  Vec sum{};
  for (int i = 0; i < b.n; i += kLanes) {
    const IVec column = lane_numbers() + i;
    sum += (column < b.n) & (column != at) ? b.z.at(i) : Vec{};
  }
  return sum;
}

// `careful` remembers from block to block that columns are absent.
inline void absorb_block(VecState& state, const Spec& spec, Block b, int64_t given, bool& careful,
                         Scratch& scratch) {
  const int at = choose_label(state, spec, b, given, scratch);
  if (at >= 0) hold_out(state, spec, b, at, scratch);
  if (spec.logit_sum) state.z_sum += sum_except(b, at);
  if (!spec.shared_softmax && b.z_max > state.m_c) raise_hard(state, b.z_max);
  if (b.compared) {
    absorb_pair(state, spec, b, at, careful);
  } else if (!spec.shared_softmax) {
    state.d_c += hard_sum(b.z, b.n, shift(state.m_c));
  }
}

// The label is part of the code.
inline void encode(const Tile& tile, int64_t row, int64_t first, const Block& b) {
  if (!b.compared) return encode_alone(tile, row, first, b.n, b.z);
  encode_block(tile, row, first, b.n, b.z, b.v, b.z_max, b.v_max);
}

inline void absorb_row(const AbsorbArgs& args, int64_t row) {
  if (args.labels[row] == kSkip) return;
  const Tile& tile = args.tile;
  Scratch scratch;
  VecState state;
  load_state(state, args.state, row, args.spec);
  bool careful = false;
  const int64_t compared = compared_columns(tile), width = tile.student.columns;
  for (int64_t first = 0; first < width;) {
    const int n = block_size(first, compared, width);
    Block b = {read_block(tile.student, row, first, n, scratch.z),
               {},
               n,
               first < compared,
               tile.first_column + first,
               tile.first_row + row};
    if (b.compared) b.v = read_block(tile.teacher, row, first, n, scratch.v);
    b.find_maxima();
    if (is_coded(tile)) encode(tile, row, first, b);
    absorb_block(state, args.spec, b, args.labels[row], careful, scratch);
    first += n;
  }
  store_state(state, args.state, row, args.spec);
}

}  // namespace bgk::BGK_TARGET
