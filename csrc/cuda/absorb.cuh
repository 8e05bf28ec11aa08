// Pass 1: a block absorbs a row of a tile, or its share of one.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/states.cuh"
#include "math/row_state.h"

namespace bgk::cuda {

// The tilts of an objective: none; one that weighs columns by a power of the teacher's
// probabilities (b > 0, a = 0, no moments), in registers; any, in shared memory.
enum Tilts { kNoTilt, kPower, kAny };

// The label that a warp holds out, the same in all its lanes. z, v: real logits.
struct Held {
  float score, z, v;
  int column;  // of the tile
};

// One lane's part of the sums, about maxima that its warp has in common: so sharing a row needs no
// exponentials, and the rare rise of a maximum happens to all lanes at once.
template <class Format, Tilts kTilts, bool kChoose>
struct Lane {
  const AbsorbArgs& args;
  const Spec& spec;
  const RowPair<Format>& rows;
  int64_t row;
  int given;   // column of the label if it is known, else -1
  float* own;  // shared memory of this lane's tilts: m, d, k, q, kThreads apart; m and the
               // exponents are counted from those at both maxima
  float z_top = kNegInf, v_top = kNegInf, m_c = kNegInf;  // maxima of real logits
  int argmax_s = -1, argmax_t = -1;
  Held held = {kNegInf, kNegInf, kNegInf, -1};
  PairSums<float> sums = {};
  float d_c = 0.0f, z_sum = 0.0f, power = 0.0f;

  BGK_DEVICE Lane(const AbsorbArgs& args, const Spec& spec, const RowPair<Format>& rows,
                  int64_t row, int given)
      : args(args),
        spec(spec),
        rows(rows),
        row(row),
        given(given),
        own((float*)dynamic_shared() + thread()) {
    if constexpr (kTilts == kAny) {
      for (int i = 0; i < spec.tilt_count; ++i)
        tilt(i, 0) = kNegInf, tilt(i, 1) = tilt(i, 2) = tilt(i, 3) = 0.0f;
    }
  }

  BGK_DEVICE float by() const { return spec.inverse_temperature; }
  BGK_DEVICE float power_base2() const { return (float)spec.tilts[0].b * kLog2E; }
  BGK_DEVICE float m_s() const { return z_top * by(); }
  BGK_DEVICE float m_t() const { return v_top * by(); }
  BGK_DEVICE float& tilt(int i, int column) { return own[(kTiltColumns * i + column) * kThreads]; }

  // The lanes' logits of a step. `slot` holds another column than it should: the label that lost.
  struct Logits8 {
    const Step& step;
    float z[kColumns], v[kColumns];
    int slot = -1, slot_column = -1;
    uint32_t kept = (1u << kColumns) - 1;  // columns that are there

    BGK_DEVICE explicit Logits8(const Step& step) : step(step) {}
    BGK_DEVICE int column(int k) const {
      return kChoose && k == slot ? slot_column : step.column<Format>(k);
    }
    // The warp's first column where x is `top`.
    BGK_DEVICE int first(const float* x, float top) const {
      int found = INT32_MAX;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int at = column(k);
        found = x[k] == top && at < found ? at : found;
      }
      return warp_min(found);
    }
  };

  BGK_DEVICE static float largest(const float* x) {
    float most = x[0];
#pragma unroll
    for (int k = 1; k < kColumns; ++k) most = fmaxf(most, x[k]);
    return most;
  }

  BGK_DEVICE void take(const Step& step, const Batch<Format>& s, const Batch<Format>& t,
                       bool paired) {
    Logits8 x(step);
    rows.s.real(s, x.z);
    if (paired) rows.t.real(t, x.v);
    if (!step.whole() || step.has(given)) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int column = step.column<Format>(k);
        if (column < step.stop && column != given) continue;
        x.z[k] = x.v[k] = kNegInf, x.kept &= ~(1u << k);
      }
    }
    if (kChoose && paired && spec.rule != kIndex) choose(x);
    if (spec.logit_sum) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) z_sum += x.kept >> k & 1 ? x.z[k] : 0.0f;
    }
    const float z_most = largest(x.z);
    if (paired) take_pair(x, z_most);
    // At T = 1 the cross-entropy's terms are the comparison's: finish() takes them from there.
    if (!paired || by() != 1.0f) take_hard(x.z, z_most);
  }

  BGK_DEVICE void take_hard(const float* z, float most) {
    if (any_lane(most > m_c)) {
      const float top = fmaxf(m_c, warp_max(most));
      d_c *= expf(moved(m_c, top));
      m_c = top;
    }
    const float centre = shift(m_c);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) d_c += fast_exp(z[k] - centre);
  }

  BGK_DEVICE void take_pair(Logits8& x, float z_most) {
    const float v_most = largest(x.v);
    if (any_lane(z_most > z_top || v_most > v_top)) raise(x, z_most, v_most);
    const float c_s = shift(m_s()), c_t = shift(m_t());
    float du[kColumns], dv[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      du[k] = x.z[k] * by() - c_s, dv[k] = x.v[k] * by() - c_t;
      const float e_s = fast_exp(du[k]), e_t = fast_exp(dv[k]), gap = du[k] - dv[k];
      sums.d_s += e_s, sums.d_t += e_t;
      if (e_s != 0.0f) sums.h_s += e_s * du[k], sums.k_s += e_s * gap;
      if (e_t != 0.0f) sums.h_t += e_t * dv[k], sums.k_t -= e_t * gap;
      if (kTilts == kPower) power += fast_exp2(dv[k] * power_base2());
    }
    if (kTilts == kAny) {
      for (int i = 0; i < spec.tilt_count; ++i) take_tilt(i, du, dv);
    }
  }

  BGK_DEVICE void take_tilt(int i, const float* du, const float* dv) {
    const float a = (float)spec.tilts[i].a, b = (float)spec.tilts[i].b;
    const bool moments = spec.tilts[i].moments;
    TiltState<float> x = {tilt(i, 0), tilt(i, 1), tilt(i, 2), tilt(i, 3)};
    float w[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) w[k] = tilt_exponent(a, b, du[k], dv[k]);
    const float most = largest(w);
    if (most > x.m) raise_tilt(x, most);
    const float centre = shift(x.m);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float e = fast_exp(w[k] - centre), gap = du[k] - dv[k];
      x.d += e;
      if (moments && e != 0.0f) x.k += e * gap, x.q += e * gap * gap;
    }
    tilt(i, 0) = x.m, tilt(i, 1) = x.d, tilt(i, 2) = x.k, tilt(i, 3) = x.q;
  }

  BGK_DEVICE void raise(const Logits8& x, float z_most, float v_most) {
    const float z = fmaxf(z_top, warp_max(z_most)), v = fmaxf(v_top, warp_max(v_most));
    if (z > z_top) argmax_s = x.first(x.z, z);
    if (v > v_top) argmax_t = x.first(x.v, v);
    const float by_s = moved(m_s(), z * by()), by_t = moved(m_t(), v * by());
    recentre(sums, by_s, by_t);
    if (kTilts == kPower) power *= expf((float)spec.tilts[0].b * by_t);
    if (kTilts == kAny) {
      for (int i = 0; i < spec.tilt_count; ++i) {
        if (tilt(i, 1) == 0.0f) continue;
        TiltState<float> x = {tilt(i, 0), tilt(i, 1), tilt(i, 2), tilt(i, 3)};
        move_moments(x, by_s - by_t);
        tilt(i, 0) =
            x.m + tilt_exponent((float)spec.tilts[i].a, (float)spec.tilts[i].b,
                                z_top == kNegInf ? 0.0f : by_s, v_top == kNegInf ? 0.0f : by_t);
        tilt(i, 2) = x.k, tilt(i, 3) = x.q;
      }
    }
    z_top = z, v_top = v;
  }

  // Changes places with a better label among these columns, if there is one.
  BGK_DEVICE void choose(Logits8& x) {
    float scores[kColumns];
    if (spec.rule == kSample &&
        !any_lane(largest(x.v) + kMostNoise > held.score || held.column < 0))
      return;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int64_t column = args.tile.first_column + x.column(k);
      scores[k] = x.v[k];
      if (spec.rule == kSample)
        scores[k] += gumbel((uint32_t)column, (uint32_t)(args.tile.first_row + row), spec.key);
    }
    const float best = largest(scores);
    if (!any_lane(best > held.score || held.column < 0)) return;
    const float top = fmaxf(held.score, warp_max(best));
    const int column = x.first(scores, top);
    if (column == INT32_MAX) return;  // NaN
    Held found = {top, 0.0f, 0.0f, column};
    int owner = kWarpSize;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (x.column(k) != column) continue;
      found.z = x.z[k], found.v = x.v[k], owner = lane();
      x.z[k] = held.z, x.v[k] = held.v, x.slot = k;
      if (held.column < 0) x.kept &= ~(1u << k);
    }
    x.slot_column = held.column;
    if (held.column >= 0) {  // the one that lost is absorbed with this step
      if (held.z == z_top && held.column < argmax_s) argmax_s = held.column;
      if (held.v == v_top && held.column < argmax_t) argmax_t = held.column;
    }
    owner = warp_min(owner);
    held = {top, of_lane(found.z, owner), of_lane(found.v, owner), column};
  }

  // The warp's state.
  BGK_DEVICE void finish(RowState<float>& out) {
    PairSums<float>& x = sums;
    x.d_s = warp_sum(x.d_s), x.h_s = warp_sum(x.h_s), x.k_s = warp_sum(x.k_s);
    x.d_t = warp_sum(x.d_t), x.h_t = warp_sum(x.h_t), x.k_t = warp_sum(x.k_t);
    d_c = warp_sum(d_c), z_sum = warp_sum(z_sum), power = warp_sum(power);
    const int64_t first = args.tile.first_column;
    if (lane() == 0) {
      empty_state(out, spec.tilt_count);
      out.m_s = m_s(), out.m_t = m_t(), out.m_c = m_c;
      out.pair = x, out.d_c = d_c, out.z_sum = z_sum;
      if (argmax_s >= 0) out.argmax_s = first + argmax_s;
      if (argmax_t >= 0) out.argmax_t = first + argmax_t;
      if (held.column >= 0) out.label = {first + held.column, held.score, held.z, held.v * by()};
      if (by() == 1.0f && !spec.shared_softmax) {
        raise_hard(out, fmaxf(m_c, out.m_s));
        out.d_c += x.d_s * expf(moved(out.m_s, out.m_c));
      }
      if (kTilts == kPower) centre_tilt(out.tilts[0], 0, {0.0f, power, 0.0f, 0.0f});
    }
    if (kTilts == kAny) {
      for (int i = 0; i < spec.tilt_count; ++i) {
        TiltState<float> y = {tilt(i, 0), tilt(i, 1), tilt(i, 2), tilt(i, 3)};
        raise_tilt(y, warp_max(y.m));
        y.d = warp_sum(y.d), y.k = warp_sum(y.k), y.q = warp_sum(y.q);
        if (lane() == 0) centre_tilt(out.tilts[i], i, y);
      }
    }
  }

  // From an exponent counted from that at both maxima to the exponent itself.
  BGK_DEVICE void centre_tilt(TiltState<float>& out, int i, const TiltState<float>& x) const {
    const double exponent =
        x.m + tilt_exponent<double>(spec.tilts[i].a, spec.tilts[i].b, shift(m_s()), shift(m_t()));
    out.m = x.d == 0.0f ? kNegInf : (float)exponent;
    const float factor = out.m - out.m == 0.0f ? (float)::exp(exponent - out.m) : 1.0f;
    out.d = x.d * factor, out.k = x.k * factor, out.q = x.q * factor;
  }
};

template <class Format, Tilts kTilts, bool kChoose>
BGK_DEVICE void absorb_range(Lane<Format, kTilts, kChoose>& lane, const Range& range, bool paired) {
  const RowPair<Format>& rows = lane.rows;
  const int steps = range.steps();
  Batch<Format> s, t, next_s, next_t;
  auto fetch = [&](int i) {
    const Step step = range.step(i);
    rows.s.fetch(step, next_s);
    if (paired) rows.t.fetch(step, next_t);
  };
  int i = warp();
  if (i < steps) fetch(i);
  for (; i < steps; i += kWarps) {
    s = next_s, t = next_t;
    if (i + kWarps < steps) fetch(i + kWarps);  // in flight under the arithmetic
    lane.take(range.step(i), s, t, paired);
  }
}

// The states of a block's share of a row, one a warp.
template <class Format, Tilts kTilts, bool kChoose>
BGK_DEVICE void absorb_share(const AbsorbArgs& args, const Spec& spec, int64_t row,
                             const RowPair<Format>& rows, const Share& share,
                             RowState<float>* states) {
  const int64_t label = args.labels[row] - args.tile.first_column;
  const bool here = spec.rule == kIndex && label >= share.start && label < share.stop;
  const int given = here ? (int)label : -1;
  Lane<Format, kTilts, kChoose> x(args, spec, rows, row, given);
  for (int paired = 1; paired >= 0; --paired) {  // a loop, so that the code is there once
    const int start = paired ? share.start : share.pair_stop;
    const int stop = paired ? share.pair_stop : share.stop;
    absorb_range(x, rows.range(start, stop, paired), paired);
  }
  if (here && warp() == 0) {
    const float v = given < share.pair_stop ? rows.t.at(given) : kNegInf;
    x.held = {0.0f, rows.s.at(given), v, given};
  }
  x.finish(states[warp()]);
}

// Blocks a multiprocessor that registers are to suffice for. In fp32 each thread has twice the
// bytes in flight, so that fewer will do; Blackwell's paired instructions want more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 2;
#else
constexpr int kMostBlocks = 3;
#endif
template <class Format, Tilts kTilts, bool kChoose>
constexpr int kResidency = Format::kWords == 4 && kTilts != kAny && !kChoose ? kMostBlocks : 2;

// Grid (rows, splits). One split merges into the state; several write theirs beside it, as
// (splits, 14 + 4·tilts, rows) and (splits, 3, rows).
template <class Format, Tilts kTilts, bool kChoose>
__global__ void __launch_bounds__(kThreads, kResidency<Format, kTilts, kChoose>)
    absorb_kernel(const __grid_constant__ Launched<AbsorbArgs> in) {
  __shared__ RowState<float> states[kWarps + 1];
  const AbsorbArgs& args = in.args;
  const Spec spec = in.spec();
  const int64_t row = block().x, split = block().y, stride = args.floats_stride;
  if (args.labels[row] == kSkip) return;
  const int tilts = spec.tilt_count;
  float* floats = args.floats + split * (kFloatColumns + kTiltColumns * tilts) * stride + row;
  int64_t* ints = args.ints + split * 3 * args.ints_stride + row;
  RowState<float>& before = states[kWarps];
  if (thread() == 0) {
    if (blocks().y == 1) load_state(before, floats, stride, ints, args.ints_stride, tilts);
    if (blocks().y > 1) empty_state(before, tilts);
  }
  const RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, split, blocks().y);
  absorb_share<Format, kTilts, kChoose>(args, spec, row, rows, share, states);
  sync_block();
  if (warp() == 0) merge_warps(states, spec);
  if (thread() == 0) store_state(states[0], floats, stride, ints, args.ints_stride, tilts);
}

}  // namespace bgk::cuda
